"""Running this project's scripts, and mmdetection's and mmsegmentation's own, as a user does."""

import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def data_options(data: Path) -> dict:
    """Settings of a configuration for a run on PhotoShapes in a folder, without worker processes."""
    loaders = ("train_dataloader", "val_dataloader", "test_dataloader")
    options = {f"{loader}.dataset.data_root": f"{data}/" for loader in loaders}
    options |= {f"{loader}.num_workers": 0 for loader in loaders}
    return options | {f"{loader}.persistent_workers": False for loader in loaders}


def evaluator_options(data: Path) -> dict:
    """The same for a detector's evaluation."""
    annotations = f"{data}/annotations/instances_validation.json"
    return {f"{split}_evaluator.ann_file": annotations for split in ("val", "test")}


def wait_for(process: subprocess.Popen, condition: Callable[[], object]) -> None:
    """Until a condition holds, which it has to before the process ends."""
    while not condition():
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.02)


def interrupt(monkeypatch, model: type, call: int) -> list:
    """Have the forward of a class interrupt the run once, at this call. Returns a list that grows with every call."""
    forward, calls = model.forward, []

    def stop(self, *args, **kwargs):
        calls.append(0)
        if len(calls) == call:
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(model, "forward", stop)
    return calls


def run_script(monkeypatch, script: str | Path, *arguments) -> None:
    """Run a script, named relative to the repository's root, as a program in this process."""
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
    runpy.run_path(str(ROOT / script), run_name="__main__")
