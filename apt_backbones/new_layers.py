"""The layers that APT adds to a model, in a safetensors file of a few MB: what a short fine-tune produces."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .files import write_atomically
from .freeze import NEW_LAYERS, is_new


def save_new_layers(model: nn.Module, path: str | os.PathLike, thresholds: Mapping[int, float] | None = None) -> Path:
    """Write the new layers of a model, trunk or tower.

    Args:
        thresholds: that they were trained with, to be kept with them.

    Raises:
        ValueError: the model has none.
    """
    tensors = {name: layer.detach().contiguous() for name, layer in _new_layers(model).items()}
    if not tensors:
        raise ValueError(
            'the model has no new layers; it needs thresholds, and merge="apt", adapter_rank=16 or map_fill="learned"'
        )
    metadata = {"format": "pt", "apt": json.dumps({"thresholds": dict(thresholds or {})})}
    return write_atomically(path, lambda unfinished: save_file(tensors, unfinished, metadata=metadata))


def read_new_layers(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[int, float]]:
    """Tensors and thresholds of a file that ``save_new_layers`` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged or of another kind.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist; give a file or folder that save_new_layers wrote")
    try:
        with safe_open(path, framework="pt") as file:
            options = json.loads((file.metadata() or {}).get("apt", "{}"))
            tensors = {_own_name(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        return tensors, {int(size): threshold for size, threshold in options.get("thresholds", {}).items()}
    except (SafetensorError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged or no file of new layers ({error}); save_new_layers writes one") from error


def options_of(path: str | os.PathLike) -> dict:
    """``merge`` and ``adapter_rank`` with which a trunk or tower has a file's layers.

    Raises:
        FileNotFoundError, ValueError: as ``read_new_layers``.
    """
    return _options_of(read_new_layers(path)[0])


def _options_of(tensors: Mapping[str, Tensor]) -> dict:
    first = tensors.get("token_adapters.0.qkv.down.weight")
    merge = "apt" if any(name.startswith("conv_down") for name in tensors) else "resizing"
    return {"merge": merge, "adapter_rank": 0 if first is None else len(first)}


def load_new_layers(model: nn.Module, path: str | os.PathLike) -> nn.Module:
    """Fill the new layers of a model (in place) with those of a file. Returns the model.

    Raises:
        FileNotFoundError, ValueError: as ``read_new_layers``; or the tensors are not those of the model's new layers.
    """
    tensors, _ = read_new_layers(path)
    layers = _new_layers(model)
    if tensors.keys() != layers.keys():
        different = sorted(tensors.keys() ^ layers.keys())
        options = ", ".join(f"{name}={value!r}" for name, value in _options_of(tensors).items())
        maps = "with" if any(name.startswith("map_detail") for name in tensors) else "without"
        raise ValueError(
            f"{path} and the model differ in {len(different)} tensors of new layers, such as {different[0]}; those of "
            f"the file are a model's with {options}, {maps} learned maps"
        )
    for name, tensor in tensors.items():
        if tensor.shape != layers[name].shape:
            shapes = tuple(tensor.shape), tuple(layers[name].shape)
            raise ValueError(f"{name} is {shapes[0]} in {path} and {shapes[1]} in the model")
    for name, tensor in tensors.items():
        layers[name].data.copy_(tensor)
    return model


def _new_layers(model: nn.Module) -> dict[str, nn.Parameter]:
    return {_own_name(name): parameter for name, parameter in model.named_parameters() if is_new(name)}


def _own_name(name: str) -> str:
    """A parameter's name without that of what its layer belongs to, which differs between hosts."""
    parts = name.split(".")
    return ".".join(parts[next((at for at, part in enumerate(parts) if part in NEW_LAYERS), 0) :])
