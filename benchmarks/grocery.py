#!/usr/bin/env python
"""GroceryStoreDataset's pictures in a folder per class, as ``benchmarks.equal_tokens_classes`` reads them.

examples:
  git clone https://github.com/marcusklasson/GroceryStoreDataset
  python -m benchmarks.grocery GroceryStoreDataset/dataset grocery
"""

import shutil
from pathlib import Path

from tools.cli import parser_of, run

SPLITS = {"train": "train", "val": "validation", "test": "test"}


def arrange(dataset: Path, out: Path) -> None:
    """Copy what the lists name; a folder is called by a class's number and name.

    Raises:
        FileNotFoundError: a list, or a picture that one names, is missing.
    """
    if missing := [f"{split}.txt" for split in SPLITS if not (dataset / f"{split}.txt").is_file()]:
        raise FileNotFoundError(f"{dataset} lacks {', '.join(missing)}: give the repository's folder called dataset")
    for split, folder in SPLITS.items():
        for line in (dataset / f"{split}.txt").read_text().splitlines():
            picture, number, _ = (part.strip() for part in line.split(","))
            to = out / folder / f"{int(number):02d}_{Path(picture).parent.name}"
            to.mkdir(parents=True, exist_ok=True)
            shutil.copy(dataset / picture, to)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("dataset", type=Path, help="the repository's folder of this name")
    parser.add_argument("out", type=Path, help="folder that gets train, validation and test")
    args = parser.parse_args()
    arrange(args.dataset, args.out)


if __name__ == "__main__":
    run(main)
