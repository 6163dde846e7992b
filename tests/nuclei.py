"""Images with nuclei in the form of the Data Science Bowl's."""

from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 8  # of a nucleus, pixels


def save_nuclei(folder: Path, count: int = 5, height: int = 24, width: int = 40) -> Path:
    """Noise named 0, 1, ..., of which number n has n bright nuclei in a row, neighbours touching."""
    rng = np.random.default_rng(0)
    for name in range(count):
        image, masks = (folder / str(name) / kind for kind in ("images", "masks"))
        image.mkdir(parents=True)
        masks.mkdir()
        pixels = rng.integers(0, 50, (height, width, 4), np.uint8)
        for nucleus in range(name):
            mask = np.zeros((height, width), np.uint8)
            mask[4 : 4 + SIDE, SIDE * nucleus : SIDE * (nucleus + 1)] = 255
            pixels[mask > 0] = 200
            Image.fromarray(mask).save(masks / f"{nucleus}.png")
        Image.fromarray(pixels).save(image / f"{name}.png")
    return folder
