#!/usr/bin/env bash
# Build mmcv with its CUDA operators from source, for the torch that is installed: benchmarks/build_mmcv_cuda.sh [SDIST]
#
# For GPU machines that bring their own torch. SDIST is a source archive that was carried along (benchmarks/carry_wheels.sh);
# without it pip fetches one. Only operators for this machine's GPU are compiled, on all cores, so that it takes
# minutes; CUDA_ARCH=9.0 names another architecture. TARGET=DIR installs into a folder, which belongs on PYTHONPATH.
# Whole detectors and segmenters (benchmark.py --whole) need this; trunks, LLaVA and `pytest -m gpu` do not.
set -euo pipefail

PYTHON=${PYTHON:-python3}
MMCV=2.3.6 # as in setup_env.sh
SDIST=${1:-onedl-mmcv==$MMCV}
target=(${TARGET:+--target "$TARGET"})

die() { printf '[mmcv] error: %s\n' "$*" >&2; exit 1; }

"$PYTHON" -c 'import torch' 2>/dev/null || die "$PYTHON has no torch; install it first or set PYTHON="
cuda=$("$PYTHON" -c 'import torch; print(torch.version.cuda or "")')
[ -n "$cuda" ] || die "torch was built without CUDA; install a CUDA build of torch first"
command -v nvcc >/dev/null || [ -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ] ||
    die "no nvcc found; install the CUDA $cuda toolkit, or set CUDA_HOME to it"
"$PYTHON" -c 'import setuptools, wheel, ninja, psutil' 2>/dev/null ||
    die "setuptools, wheel, ninja and psutil are needed: $PYTHON -m pip install setuptools wheel ninja psutil"
arch=${CUDA_ARCH:-$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())' 2>/dev/null)} ||
    die "no GPU is visible; name its architecture, e.g. CUDA_ARCH=9.0 for an H100 or H200"

printf '[mmcv] compiling %s for CUDA %s, architecture %s, on %s cores\n' "$SDIST" "$cuda" "$arch" "$(nproc)"
# No build isolation: it must be compiled against the installed torch. No cache: that may hold a wheel for another one.
MMCV_WITH_OPS=1 FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST="$arch" MAX_JOBS="${MAX_JOBS:-$(nproc)}" \
    "$PYTHON" -m pip install --no-deps --no-build-isolation --no-cache-dir --disable-pip-version-check \
    "${target[@]}" "$SDIST" ||
    die "compiling failed; the compiler's message is above"
PYTHONPATH="${TARGET:+$TARGET:}${PYTHONPATH:-}" "$PYTHON" - <<'PY' || die "mmcv was built, but its CUDA operators do not run"
import torch
from mmcv.ops import nms, roi_align

boxes = torch.tensor([[0.0, 0.0, 8.0, 8.0], [0.0, 0.0, 8.0, 7.9]], device="cuda")
assert len(nms(boxes, torch.tensor([0.9, 0.8], device="cuda"), 0.5)[1]) == 1
rois = torch.tensor([[0.0, 0.0, 0.0, 7.0, 7.0]], device="cuda")
assert roi_align(torch.ones(1, 1, 8, 8, device="cuda"), rois, (2, 2)).sum() == 4
print("[mmcv] built, and its CUDA operators run")
PY
