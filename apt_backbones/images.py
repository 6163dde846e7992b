"""Reading users' image files."""

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})


def read_rgb(path: str | Path) -> Image.Image:
    """An image file as 8-bit RGB, turned as its EXIF orientation says; transparency is laid over white.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no image, or damaged, or has floating point pixels.
    """
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            image.load()
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(f"no image at {path}") from error
        raise ValueError(f"{path} is not a readable image ({error})") from error
    if image.mode.startswith("F"):
        raise ValueError(f"{path} has floating point pixels, whose range is not known; convert it to 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 bits and more: keep the value range instead of clipping it
        values = np.asarray(image, dtype=np.float64)
        scale = 257.0 if values.max(initial=0) > 255 else 1.0
        image = Image.fromarray((values / scale).clip(0, 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image -> float tensor (1, 3, H, W) in 0..255, as ``score_patches`` takes it."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()


def find_images(paths: list[str], suffixes: frozenset[str] = IMAGE_SUFFIXES) -> list[Path]:
    """Files among the paths and, recursively, those of the suffixes in the folders among them; sorted in each folder.

    Raises:
        FileNotFoundError: a path does not exist, or no image was found.
    """
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            found += sorted(file for file in path.rglob("*") if file.suffix.lower() in suffixes)
        elif path.exists():
            found.append(path)
        else:
            raise FileNotFoundError(f"no file or folder {path}")
    if not found:
        raise FileNotFoundError(f"no images in {', '.join(paths)}")
    return found


def evenly(count: int, most: int | None) -> range:
    """Of so many images some that lie evenly among them, at most ``most``; None for all."""
    return range(0, count, math.ceil(count / most) if most else 1)


def representative(costs: np.ndarray, count: int, tries: int = 5000) -> list[int]:
    """Columns, at most ``count``, whose mean is nearest to that of all columns: of random choices the one whose largest
    relative difference in any row is the smallest.

    Args:
        costs: of images (columns) by several measures (rows), above 0.
    """
    count, chance = min(count, costs.shape[1]), np.random.default_rng(0)
    relative = costs / costs.mean(1, keepdims=True) - 1
    choices = [chance.choice(costs.shape[1], count, replace=False) for _ in range(tries)]
    return sorted(min(choices, key=lambda choice: np.abs(relative[:, choice].mean(1)).max()).tolist())
