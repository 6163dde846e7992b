import importlib.util
import os
import re
from unittest import mock

import pytest
import torch
from hypothesis import settings

# Machines differ in speed; a property must hold however long an example takes.
settings.register_profile("default", deadline=None, max_examples=60)
settings.load_profile("default")

# Without these packages (a GPU machine with no more than torch, timm and transformers) the other tests still run.
OPTIONAL = ("mmcv", "mmdet", "mmengine", "mmseg", "lmms_eval")
MISSING = [name for name in OPTIONAL if importlib.util.find_spec(name) is None]
NEEDED = re.compile(rf"^(?:from|import) (?:apt_backbones\.mm|{'|'.join(OPTIONAL)})\b", re.MULTILINE)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _environment():
    """What a test sets in the environment, such as a launcher's LOCAL_RANK, is gone after it."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A stock LLaVA as on the hub (tests/llava_tiny.py), for reading only."""
    from tests.llava_tiny import save_hub_checkpoint

    return save_hub_checkpoint(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="session")
def task(tmp_path_factory):
    """A model and data for LLaVA's short fine-tune, for reading only."""
    from tests.llava_tiny import save_task

    return save_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="session")
def finished(task, tmp_path_factory):
    """The folder of a short fine-tune of that task, for reading only."""
    from tests.llava_tiny import run_finetune

    output = tmp_path_factory.mktemp("finished")
    run_finetune(task, output, "--save_steps", "3", "--save_total_limit", "5")
    return output


@pytest.fixture(scope="session")
def photoshapes(tmp_path_factory):
    """PhotoShapes with six images for training and three for validation, for reading only."""
    from examples.make_photoshapes import make_photoshapes

    folder = tmp_path_factory.mktemp("data") / "photoshapes"
    make_photoshapes(folder, train=6, val=3, size=192)
    return folder


def pytest_ignore_collect(collection_path):
    is_test = collection_path.name.startswith("test_") and collection_path.suffix == ".py"
    return True if MISSING and is_test and NEEDED.search(collection_path.read_text()) else None


def pytest_terminal_summary(terminalreporter):
    if MISSING:
        terminalreporter.line(f"left out: tests that need packages not installed here ({', '.join(MISSING)})")
