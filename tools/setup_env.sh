#!/usr/bin/env bash
# Create (or complete) the environment in which everything here runs: tools/setup_env.sh VENV
#
# Order matters. onedl-mmcv compiles its operators against the torch that is already installed, so torch
# comes first and pip's build isolation is off; the wheel is kept under a name that holds the torch version,
# because pip's own cache would hand a wheel built for one torch to another. A second run does no work.
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=${1:-.venv}
PYTHON=${PYTHON:-python3}
TORCH=2.13.0 TORCHVISION=0.28.0 MMCV=2.3.6
NEEDED_GB=12

say() { printf '\033[1m[setup]\033[0m %s\n' "$*"; }
die() { printf '[setup] error: %s\n' "$*" >&2; exit 1; }

pins=$(cat tools/setup_env.sh tools/requirements.txt setup.py | sha256sum | cut -c1-12)
installed="$VENV/.apt-pins-$pins"
checkout="$VENV/.apt-checkout"

install_dependencies() {
    command -v "$PYTHON" >/dev/null || die "no $PYTHON on the PATH; install Python 3.10-3.12 or set PYTHON=/path/to/python"
    "$PYTHON" - <<'PY' || die "$("$PYTHON" --version 2>&1) is not supported; set PYTHON= to a Python 3.10, 3.11 or 3.12"
import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))
PY
    command -v c++ >/dev/null || command -v g++ >/dev/null ||
        die "no C++ compiler found (mmcv is compiled here); on Debian or Ubuntu: apt-get install build-essential"
    mkdir -p "$VENV"
    local free_gb; free_gb=$(($(df -Pk "$VENV" | awk 'NR==2 {print $4}') / 1024 / 1024))
    if [ ! -x "$VENV/bin/torchrun" ] && [ "$free_gb" -lt $NEEDED_GB ]; then
        die "the environment needs $NEEDED_GB GB and $VENV has $free_gb GB free; free some or set VENV=/other/disk/venv"
    fi

    say "creating $VENV (about 15 minutes the first time: mmcv is compiled)"
    "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || "$PYTHON" -m venv "$VENV" ||
        die "python -m venv failed; on Debian or Ubuntu: apt-get install python3-venv"
    local pip=("$VENV/bin/python" -m pip --disable-pip-version-check) python_tag cuda wheels
    "${pip[@]}" install -q --upgrade "pip>=24" "setuptools>=77,<81" wheel ninja psutil packaging

    say "torch $TORCH"
    # '===': '==' also accepts local builds such as 2.13.0+cpu, with which torchvision does not import.
    "${pip[@]}" install -q "torch===$TORCH" "torchvision===$TORCHVISION"

    python_tag=$("$VENV/bin/python" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
    cuda=$("$VENV/bin/python" -c 'import os, torch; print("cuda" if torch.cuda.is_available() or os.environ.get("FORCE_CUDA") == "1" else "cpu")')
    wheels=${XDG_CACHE_HOME:-$HOME/.cache}/apt-wheels/torch-$TORCH-$python_tag-$cuda
    if ! compgen -G "$wheels/onedl_mmcv-$MMCV-*.whl" >/dev/null; then
        say "compiling mmcv $MMCV for torch $TORCH ($cuda; about 10 minutes on two cores)"
        mkdir -p "$wheels"
        MMCV_WITH_OPS=1 MAX_JOBS=${MAX_JOBS:-$(nproc)} PATH="$PWD/$VENV/bin:$VENV/bin:$PATH" \
            "${pip[@]}" wheel -q --no-deps --no-build-isolation --no-cache-dir -w "$wheels" "onedl-mmcv==$MMCV" ||
            die "compiling mmcv failed; the compiler's message is above (a C++17 compiler and the Python headers are needed)"
    fi

    say "the other requirements"
    "${pip[@]}" install -q -r tools/requirements.txt "torch===$TORCH" "torchvision===$TORCHVISION" "$wheels"/onedl_mmcv-$MMCV-*.whl
    "$VENV/bin/python" -c 'import mmcv.ops, torchvision.ops' ||
        die "the environment in $VENV does not import; remove it and run make setup again"
    rm -f "$VENV"/.apt-pins-* "$checkout"
    touch "$installed"
}

[ -e "$installed" ] || install_dependencies
if [ "$(cat "$checkout" 2>/dev/null)" != "$PWD" ]; then
    "$VENV/bin/python" -m pip --disable-pip-version-check install -q --no-deps --no-build-isolation -e .
    printf '%s' "$PWD" >"$checkout"
    say "ready: $VENV"
fi
