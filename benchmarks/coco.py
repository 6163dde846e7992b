"""COCO's annotations, and which of its images are at hand."""

import contextlib
import io
from pathlib import Path

from pycocotools.coco import COCO


def read_coco(annotations: Path) -> COCO:
    """A file of annotations, without what COCO prints of it."""
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(annotations))


def images_in(folder: Path, coco: COCO) -> list[tuple[dict, Path]]:
    """Entries and files of the images that a folder holds, ordered by their ids.

    Raises:
        FileNotFoundError: it holds none of them.
    """
    files = {path.name: path for path in folder.rglob("*.jpg")}
    entries = sorted(coco.dataset["images"], key=lambda entry: entry["id"])
    found = [(entry, files[entry["file_name"]]) for entry in entries if entry["file_name"] in files]
    if not found:
        raise FileNotFoundError(f"{folder} holds none of the images that the annotations name")
    return found
