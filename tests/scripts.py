"""Running this project's scripts, and mmdetection's and mmsegmentation's own, as a user does."""

import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run_script(monkeypatch, script: str | Path, *arguments) -> None:
    """Run a script, named relative to the repository's root, as a program in this process."""
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
    runpy.run_path(str(ROOT / script), run_name="__main__")
