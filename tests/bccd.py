"""Images with boxes in the form of BCCD's, which is Pascal VOC's."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

from PIL import Image

Box = tuple[str, tuple[int, int, int, int]]  # class, and corners


def save_bccd(folder: Path, images: Mapping[str, tuple[Image.Image, Sequence[Box]]]) -> None:
    """Write a data set whose three splits all have the same images."""
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    for split in ("train", "val", "test"):
        (folder / f"ImageSets/Main/{split}.txt").write_text("\n".join(images) + "\n")
    for name, (image, boxes) in images.items():
        image.save(folder / f"JPEGImages/{name}.jpg")
        root = ElementTree.Element("annotation")
        add(root, "size", dict(width=image.width, height=image.height, depth=3))
        for label, corners in boxes:
            entry = add(root, "object", dict(name=label, difficult=0))
            add(entry, "bndbox", dict(zip(("xmin", "ymin", "xmax", "ymax"), corners)))
        ElementTree.ElementTree(root).write(folder / f"Annotations/{name}.xml")


def add(parent: ElementTree.Element, tag: str, values: Mapping[str, object]) -> ElementTree.Element:
    element = ElementTree.SubElement(parent, tag)
    for name, value in values.items():
        ElementTree.SubElement(element, name).text = str(value)
    return element
