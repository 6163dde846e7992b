"""Only the layers that APT adds, as a safetensors file of a few MB: what a short fine-tune produces."""

import os
from pathlib import Path

from torch import nn

from apt_backbones import new_layers

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
    return new_layers.save_new_layers(model, _file(path), model.config.vision_config.thresholds)


def options_of(path: str | os.PathLike) -> dict:
    """``merge`` and ``adapter_rank`` with which ``from_pretrained`` gives a model a file's layers."""
    return new_layers.options_of(_file(path))


def load_new_layers(model: nn.Module, path: str | os.PathLike) -> nn.Module:
    """Fill the new layers of a model (in place) with those of a file. Returns the model.

    Raises:
        FileNotFoundError, ValueError: as ``apt_backbones.new_layers.load_new_layers``; or they were trained with other
            sizes of patches.
    """
    path = _file(path)
    _, trained_with = new_layers.read_new_layers(path)
    if trained_with and trained_with.keys() != model.config.vision_config.thresholds.keys():
        raise ValueError(
            f"{path} was trained with thresholds {trained_with}; load the model and the processor with them"
        )
    return new_layers.load_new_layers(model, path)


def _file(path: str | os.PathLike) -> Path:
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / FILE_NAME
