"""Photographs in the shape that a model is run on."""

from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from apt_backbones.images import find_images, read_rgb, to_tensor

PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")  # scikit-image's, 1:1 and three of 3:2


@dataclass
class Batch:
    """One image, as often as the batch is large; so a batch's rectangle is exact, and no sequence is filled up.

    Attributes:
        square: (B, 3, side, side), normalized and padded with zeros at the right and bottom.
        rectangle: (B, 3, height, width), padded to whole patches only.
        size: height and width in pixels before any padding.
        content_cells: base cells of all the batch's rectangles.
    """

    square: Tensor
    rectangle: Tensor
    size: tuple[int, int]
    content_cells: int

    def to(self, device: torch.device) -> "Batch":
        return replace(self, square=self.square.to(device), rectangle=self.rectangle.to(device))


def load_images(source: list[str] | None, side: int, limit: int, aspect: float | None = None) -> list[Image.Image]:
    """Images whose longer side is the training square's.

    Args:
        source: files and folders; None for scikit-image's photographs.
        side: of the training square in pixels.
        limit: at most so many images.
        aspect: width / height to which images are cut around their center, upright ones to its inverse; None leaves
            them whole.

    Raises:
        FileNotFoundError: scikit-image is not installed and no source is given, or there is no such file.
    """
    images = []
    for path in (find_images(source) if source else photographs())[:limit]:
        image = read_rgb(path)
        if aspect is not None:
            image = _cut(image, aspect if image.width >= image.height else 1 / aspect)
        scale = side / max(image.size)
        size = [max(1, round(length * scale)) for length in image.size]
        images.append(image.resize(size, Image.Resampling.BICUBIC))
    return images


def make_batch(image: Image.Image, normalization: Tensor, patch_size: int, side: int, batch_size: int) -> Batch:
    """
    Args:
        normalization: mean and standard deviation (2, 3, 1, 1) in 0..255.
    """
    mean, std = normalization
    normalized = (to_tensor(image) - mean) / std
    right, bottom = -image.width % patch_size, -image.height % patch_size
    rectangle = F.pad(normalized, (0, right, 0, bottom)).repeat(batch_size, 1, 1, 1)
    square = F.pad(normalized, (0, side - image.width, 0, side - image.height)).repeat(batch_size, 1, 1, 1)
    cells = batch_size * (rectangle.shape[2] // patch_size) * (rectangle.shape[3] // patch_size)
    return Batch(square, rectangle, (image.height, image.width), cells)


def photographs() -> list[Path]:
    found = find_spec("skimage")
    if found is None:
        raise FileNotFoundError("the photographs are scikit-image's, which is not installed; name others with --images")
    return [Path(found.submodule_search_locations[0], "data", name) for name in PHOTOS]


def _cut(image: Image.Image, aspect: float) -> Image.Image:
    width, height = min(image.width, round(image.height * aspect)), min(image.height, round(image.width / aspect))
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
