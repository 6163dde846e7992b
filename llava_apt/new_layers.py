"""Only the layers that APT adds, as a safetensors file of a few MB: what a short fine-tune produces."""

import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from apt_backbones.files import write_atomically
from apt_backbones.freeze import is_new

from .configuration import TOWER_OPTIONS

FILE_NAME = "apt_new_layers.safetensors"


def save_new_layers(model: nn.Module, path: str | os.PathLike) -> Path:
    """Write ConvDown and ZeroMLP, and the thresholds that they were trained with, to one safetensors file.

    Args:
        model: a LlavaAptForConditionalGeneration.
        path: file to write, or a folder to write ``apt_new_layers.safetensors`` in.

    Returns:
        The file's path.

    Raises:
        ValueError: the model has no new layers.
    """
    tensors = {name: parameter.detach().contiguous() for name, parameter in model.named_parameters() if is_new(name)}
    if not tensors:
        raise ValueError('the model has no new layers; load it with thresholds and merge="apt"')
    vision_config = model.config.vision_config
    options = {name: getattr(vision_config, name) for name in TOWER_OPTIONS}
    metadata = {"format": "pt", "apt": json.dumps(options)}
    return write_atomically(_file(path), lambda unfinished: save_file(tensors, unfinished, metadata=metadata))


def load_new_layers(model: nn.Module, path: str | os.PathLike) -> nn.Module:
    """Fill the new layers of a model (in place) with those that ``save_new_layers`` wrote. Returns the model.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, or holds other tensors than the model's new layers, or of other shapes or
            thresholds.
    """
    path = _file(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a file or folder that save_new_layers wrote")
    parameters = {name: parameter for name, parameter in model.named_parameters() if is_new(name)}
    try:
        with safe_open(path, framework="pt") as file:
            options = json.loads((file.metadata() or {}).get("apt", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        trained_with = {int(size): threshold for size, threshold in options.get("thresholds", {}).items()}
    except (SafetensorError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged or no file of new layers ({error}); save_new_layers writes one") from error
    if tensors.keys() != parameters.keys():
        raise ValueError(f"{path} holds {sorted(tensors)}, but the model's new layers are {sorted(parameters)}")
    for name, tensor in tensors.items():
        if tensor.shape != parameters[name].shape:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} in {path} and {tuple(parameters[name].shape)} in the model"
            )
    if trained_with and trained_with.keys() != model.config.vision_config.thresholds.keys():
        raise ValueError(
            f"{path} was trained with thresholds {trained_with}; load the model and the processor with them"
        )
    for name, tensor in tensors.items():
        parameters[name].data.copy_(tensor)
    return model


def _file(path: str | os.PathLike) -> Path:
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / FILE_NAME
