"""Photographs with people in the form of COCO's."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

PERSON, CUP = 1, 47  # COCO's numbers


def save_coco(folder: Path, ids: Sequence[int], size: tuple[int, int] = (64, 48)) -> Path:
    """Noise of width x height pixels, with a person and a cup each but for number 0, which has a cup."""
    rng = np.random.default_rng(0)
    (folder / "val2017").mkdir(parents=True)
    (folder / "annotations").mkdir()
    images, annotations = [], []
    for number in ids:
        pixels = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"val2017/{number:012}.jpg")
        images.append({"id": number, "file_name": f"{number:012}.jpg", "width": size[0], "height": size[1]})
        for category in (PERSON, CUP)[number == 0 :]:
            box = {"image_id": number, "category_id": category, "bbox": [8, 4, 40, 36], "area": 1440, "iscrowd": 0}
            annotations.append({"id": len(annotations) + 1, **box})
    categories = [{"id": PERSON, "name": "person"}, {"id": CUP, "name": "cup"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations/instances_val2017.json").write_text(json.dumps(content))
    return folder
