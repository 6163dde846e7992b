#!/usr/bin/env python
"""Arrange scanned receipts for segmentation: text and paper.

examples:
  python examples/make_receipts.py ICDAR-2019-SROIE/data data/receipts

The source is the folder data of github.com/zzzDavid/ICDAR-2019-SROIE (MIT): 626 receipts of the ICDAR 2019 challenge,
with the corners of every line of text. Five of them are twice there, and taken once. In the order of the names 60 % are
for training, 20 % for validation and 20 % for the test. What is written:

    images/{training,validation,test}/NAME.jpg       RGB, the longest side at most 1568 pixels
    annotations/{training,validation,test}/NAME.png  1 inside a line of text, else 0
"""

import hashlib
from pathlib import Path

from PIL import Image, ImageDraw
from rich.progress import track

from tools.cli import run
from examples.new_folder import new_folder, source_and_destination, splits_of

LONGEST = 1568


def make_receipts(source: Path, destination: Path) -> dict[str, int]:
    """Write the data set into a new folder, which appears only when everything is written.

    Returns:
        split -> number of images.

    Raises:
        FileNotFoundError: the source does not hold img/NAME.jpg with box/NAME.csv.
        FileExistsError: the destination holds something.
        ValueError: a line of box/NAME.csv is not x1,y1,x2,y2,x3,y3,x4,y4,text.
    """
    paths = {
        hashlib.sha256(path.read_bytes()).digest(): path for path in sorted(source.glob("img/*.jpg"), reverse=True)
    }
    if not paths:
        raise FileNotFoundError(f"no img/NAME.jpg in {source}; name the folder data")
    splits = splits_of(sorted(paths.values()))
    with new_folder(destination) as whole:
        for split, of_split in splits.items():
            for kind in ("images", "annotations"):
                (whole / kind / split).mkdir(parents=True)
            for path in track(of_split, description=split):
                image = Image.open(path).convert("RGB")
                lines = lines_of(source / "box" / f"{path.stem}.csv")
                scale = min(1.0, LONGEST / max(image.size))
                image = image.resize([round(scale * side) for side in image.size], Image.Resampling.LANCZOS)
                text = Image.new("L", image.size)
                for corners in lines:
                    ImageDraw.Draw(text).polygon([scale * value for value in corners], fill=1)
                image.save(whole / "images" / split / path.name, quality=95)
                text.save(whole / "annotations" / split / f"{path.stem}.png")
    return {split: len(of_split) for split, of_split in splits.items()}


def lines_of(path: Path) -> list[list[int]]:
    """The corners of the lines of text, x1, y1, ..., x4, y4 in pixels."""
    try:
        lines = [list(map(int, line.split(",")[:8])) for line in path.read_text(errors="replace").splitlines()]
        if any(len(corners) != 8 for corners in lines):
            raise ValueError("fewer than 8 numbers")
    except ValueError as error:
        raise ValueError(f"{path} has a line that is not x1,y1,x2,y2,x3,y3,x4,y4,text ({error})") from error
    return lines


def main() -> None:
    for split, count in make_receipts(*source_and_destination(__doc__, "the folder data")).items():
        print(f"{split}: {count} images")


if __name__ == "__main__":
    run(main)
