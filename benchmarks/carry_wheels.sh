#!/usr/bin/env bash
# What a GPU machine without a package index needs beside its own torch: benchmarks/carry_wheels.sh DIR
#
# Run it where pip works, and copy DIR (40 MB) to the machine together with the checkout; docs/benchmarks/README.md says
# how to go on there.
#
# PYTHON_VERSION is the machine's (3.12); torch, torchvision, numpy, scipy, matplotlib, opencv, pillow, pytest and
# hypothesis are taken to be there.
set -euo pipefail
cd "$(dirname "$0")/.."

DIR=${1:?usage: benchmarks/carry_wheels.sh DIR}
PYTHON=${PYTHON:-python3}
die() { printf '[wheels] error: %s\n' "$*" >&2; exit 1; }

pin() { grep -E "^$1==" tools/requirements.txt; }
TRUNKS="$(pin onedl-mmengine) $(pin timm) addict termcolor yapf platformdirs rich markdown-it-py mdurl pygments"
LLAVA="$(pin transformers) huggingface_hub hf-xet httpx2 httpcore2 truststore anyio idna h11 click tokenizers regex safetensors"
WHOLE="pycocotools shapely imaug terminaltables prettytable wcwidth ftfy six"
TESTS="pytest-timeout hypothesis sortedcontainers"
BUILT="$(pin onedl-mmdetection) $(pin onedl-mmsegmentation)" # pure Python, published as source
MMCV=onedl-mmcv==$(sed -n 's/.*MMCV=\([0-9.]*\).*/\1/p' tools/setup_env.sh | head -1)
platforms=(--platform any --platform manylinux2014_x86_64 --platform manylinux1_x86_64)
for glibc in 28 27 24 17 12 5; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done

mkdir -p "$DIR"
pip() { "$PYTHON" -m pip --disable-pip-version-check "$1" -q --no-deps "${@:2}" || die "pip $1 failed; its message is above"; }
# shellcheck disable=SC2086  # lists of words
{
    pip download -d "$DIR" --only-binary=:all: --python-version "${PYTHON_VERSION:-3.12}" --implementation cp \
        "${platforms[@]}" $TRUNKS $LLAVA $WHOLE $TESTS
    pip wheel -w "$DIR" --no-build-isolation $BUILT
    pip download -d "$DIR" --no-binary=:all: --no-build-isolation "$MMCV"
}
"$PYTHON" - "$DIR/photos" <<'PY' || die "the photographs come from scikit-image; install it, or set PYTHON="
import shutil, sys
from pathlib import Path
from benchmarks.images import photographs

target = Path(sys.argv[1])
target.mkdir(exist_ok=True)
for path in photographs():
    shutil.copy(path, target)
PY
du -sh "$DIR"
