"""Setting up the environment fails early, in one line that says what to do. (That it succeeds, every test shows.)"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "tools" / "setup_env.sh"
NEEDED = ("bash", "dirname", "cat", "sha256sum", "cut", "mkdir", "df", "awk", "rm", "touch")


@pytest.fixture
def run(tmp_path):
    """Runs the script on a machine that has the basics, and what a test adds to its folder of commands."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in NEEDED:
        (commands / name).symlink_to(shutil.which(name))

    def script(**programs):
        for name, text in programs.items():
            (commands / name).unlink(missing_ok=True)  # not to write through a link
            (commands / name).write_text(f"#!/bin/bash\n{text}\n")
            (commands / name).chmod(0o755)
        environment = {"PATH": str(commands), "HOME": str(tmp_path), "XDG_CACHE_HOME": os.devnull}
        command = [shutil.which("bash"), str(SCRIPT), str(tmp_path / "venv")]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    return script


PYTHON = 'if [ "$1" = --version ]; then echo Python 3.11.7; fi'
OLD_PYTHON = 'if [ "$1" = --version ]; then echo Python 3.9.1; else exit 1; fi'
SMALL_DISK = 'echo "Filesystem 1024-blocks Used Available Capacity Mounted"; echo "/dev/x 9 9 2097152 9% /"'


@pytest.mark.parametrize(
    "programs, message",
    [
        ({}, "no python3 on the PATH; install Python 3.10-3.12"),
        ({"python3": OLD_PYTHON}, "Python 3.9.1 is not supported; set PYTHON= to a Python 3.10, 3.11 or 3.12"),
        ({"python3": PYTHON}, r"no C\+\+ compiler found"),
        ({"python3": PYTHON, "c++": "true", "df": SMALL_DISK}, "needs 12 GB and .* has 2 GB free"),
    ],
)
def test_what_is_missing_is_named(run, programs, message):
    done = run(**programs)
    assert done.returncode == 1
    assert done.stderr.startswith("[setup] error: ") and len(done.stderr.splitlines()) == 1
    assert re.search(message, done.stderr)


def test_an_environment_without_pip_is_made_again(run):
    """Debian's python3 leaves one when it says that the package python3-venv is missing."""
    unfinished = 'if [ "$2" = venv ]; then mkdir -p "$3/bin"; ln -sf "$(type -P false)" "$3/bin/python"; exit 1; fi'
    large_disk = SMALL_DISK.replace("2097152", "20971520")
    linked = {name: f'exec {shutil.which(name)} "$@"' for name in ("ln", "false")}
    for _ in range(2):
        done = run(python3=f"{PYTHON}; {unfinished}", df=large_disk, **linked, **{"c++": "true"})
        assert "python -m venv failed; on Debian or Ubuntu: apt-get install python3-venv" in done.stderr
