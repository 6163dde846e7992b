import importlib.util
import re

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


def pytest_ignore_collect(collection_path):
    is_test = collection_path.name.startswith("test_") and collection_path.suffix == ".py"
    return True if MISSING and is_test and NEEDED.search(collection_path.read_text()) else None


def pytest_terminal_summary(terminalreporter):
    if MISSING:
        terminalreporter.line(f"left out: tests that need packages not installed here ({', '.join(MISSING)})")
