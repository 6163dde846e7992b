#!/usr/bin/env python
"""Split the photographs of COCO val2017 that show people, for a detector of persons.

examples:
  python examples/make_persons.py data/coco data/coco/persons

The source is COCO's folder with val2017/*.jpg and annotations/instances_val2017.json. Of the 2,693 photographs with
people, ordered by their ids, 60 % are for training, 20 % for validation and 20 % for the test. What is written:

    {training,validation,test}.json  COCO boxes and masks of persons; images stay where they are
"""

import json
from pathlib import Path

from tools.cli import run
from examples.new_folder import new_folder, source_and_destination, splits_of


def make_persons(source: Path, destination: Path) -> dict[str, dict]:
    """Write the annotations into a new folder, which appears only when everything is written.

    Returns:
        split -> COCO dictionary, as written.

    Raises:
        FileNotFoundError: the source lacks the annotations or a photograph.
        FileExistsError: the destination holds something.
        ValueError: the annotations have no persons.
    """
    file = source / "annotations/instances_val2017.json"
    if not file.is_file():
        raise FileNotFoundError(f"no {file}; name COCO's folder, with annotations/ and val2017/")
    coco = json.loads(file.read_text())
    categories = [category for category in coco["categories"] if category["name"] == "person"]
    persons = {}
    for annotation in coco["annotations"]:
        if annotation["category_id"] in {category["id"] for category in categories}:
            persons.setdefault(annotation["image_id"], []).append(annotation)
    if not persons:
        raise ValueError(f"{file} has no annotations of the category person")
    photographs = sorted((image for image in coco["images"] if image["id"] in persons), key=lambda image: image["id"])
    for image in photographs:
        if not (source / "val2017" / image["file_name"]).is_file():
            raise FileNotFoundError(f"no {image['file_name']} in {source / 'val2017'}")
    made = {}
    with new_folder(destination) as folder:
        for split, images in splits_of(photographs).items():
            annotations = [annotation for image in images for annotation in persons[image["id"]]]
            made[split] = {"categories": categories, "images": images, "annotations": annotations}
            (folder / f"{split}.json").write_text(json.dumps(made[split]))
    return made


def main() -> None:
    for split, coco in make_persons(*source_and_destination(__doc__, "COCO's folder")).items():
        print(f"{split}: {len(coco['images'])} photographs, {len(coco['annotations'])} persons")


if __name__ == "__main__":
    run(main)
