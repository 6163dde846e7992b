"""The new layers of a trunk, in a file of their own."""

from pathlib import Path

from torch import nn

from .checkpoint import read_checkpoint
from .distill import save_tensors
from .freeze import is_new
from .trunk import find_trunk


def save_new_layers(model: nn.Module, path: str | Path) -> None:
    """Write the new layers of a model's trunk as safetensors."""
    weights = find_trunk(model).state_dict()
    save_tensors(Path(path), {name: tensor for name, tensor in weights.items() if is_new(name)})


def load_new_layers(model: nn.Module, path: str | Path) -> None:
    """Load what ``save_new_layers`` wrote into a model with the same new layers.

    Raises:
        FileNotFoundError, ValueError: as ``read_checkpoint``; or the layers are not those of the model's trunk.
    """
    weights, trunk = read_checkpoint(path), find_trunk(model)
    own = {name: tensor.shape for name, tensor in trunk.state_dict().items() if is_new(name)}
    if {name: tensor.shape for name, tensor in weights.items()} != own:
        raise ValueError(f"{path} does not hold the {len(own)} new layers' tensors of this model's trunk")
    trunk.load_state_dict(weights, strict=False)
