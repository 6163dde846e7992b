import pytest
import torch
from hypothesis import settings

# Machines differ in speed; a property must hold however long an example takes.
settings.register_profile("default", deadline=None, max_examples=60)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
