"""Segmentation data in mmseg: PhotoShapes, CamVid, a check of masks, and mIoU where it is hardest, along borders."""

from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from mmcv.transforms import BaseTransform
from mmseg.datasets import BaseSegDataset
from mmseg.evaluation import IoUMetric
from mmseg.registry import DATASETS, METRICS, TRANSFORMS
from torch import Tensor


@DATASETS.register_module()
class PhotoShapesDataset(BaseSegDataset):
    """PhotoShapes (examples/make_photoshapes.py) with its six shapes as one class: figure against ground.

    Telling the shapes apart as well takes longer training than a processor gives in half an hour; for all seven
    classes use mmseg's ``BaseSegDataset`` with ``reduce_zero_label=True``.
    """

    METAINFO = dict(classes=("background", "shape"), palette=[[128, 128, 128], [220, 50, 47]])

    def __init__(self, **kwargs):
        super().__init__(reduce_zero_label=True, **kwargs)

    @classmethod
    def get_label_map(cls, new_classes=None) -> dict[int, int]:
        """After ``reduce_zero_label``: 0 is background, 1 to 6 are the shapes."""
        return {shape: 1 for shape in range(2, 7)}


@DATASETS.register_module()
class CamVidDataset(BaseSegDataset):
    """CamVid's 11 classes, as the SegNet tutorial has them; what is none of them (label 11) is ignored."""

    METAINFO = dict(
        classes=(
            "sky",
            "building",
            "pole",
            "road",
            "pavement",
            "tree",
            "sign",
            "fence",
            "car",
            "pedestrian",
            "bicyclist",
        ),
        palette=[
            [128, 128, 128],
            [128, 0, 0],
            [192, 192, 128],
            [128, 64, 128],
            [60, 40, 222],
            [128, 128, 0],
            [192, 128, 128],
            [64, 64, 128],
            [64, 0, 128],
            [64, 64, 0],
            [0, 128, 192],
        ],
    )

    def __init__(self, **kwargs):
        super().__init__(img_suffix=".png", seg_map_suffix=".png", **kwargs)

    @classmethod
    def get_label_map(cls, new_classes=None) -> dict[int, int]:
        return {11: 255}


@TRANSFORMS.register_module()
class CheckSegMap(BaseTransform):
    """Refuse masks that do not belong to their image; put it right after ``LoadAnnotations``.

    Without it a wrong label id is an assertion deep inside the loss (on a GPU, one that ends the process), and in
    evaluation it is silently left out.

    Args:
        num_classes: valid ids are 0 .. num_classes - 1, after mmseg's ``reduce_zero_label``.
        ignore_index: an id that is valid too.

    Raises:
        ValueError: a mask's size differs from its image's, or it holds other ids; the message names the file.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255):
        self.num_classes, self.ignore_index = num_classes, ignore_index

    def transform(self, results: dict) -> dict:
        if "gt_seg_map" not in results:  # mmseg's inference takes LoadAnnotations out of the pipeline
            return results
        mask, path = results["gt_seg_map"], results["seg_map_path"]
        if mask.shape != tuple(results["ori_shape"]):
            raise ValueError(
                f"{path} is {' x '.join(map(str, mask.shape))} pixels, its image {results['img_path']} "
                f"{' x '.join(map(str, results['ori_shape']))} (height x width); make them the same size"
            )
        ids = np.unique(mask)
        wrong = ids[(ids >= self.num_classes) & (ids != self.ignore_index)]
        if len(wrong):
            raise ValueError(
                f"{path} holds label ids {wrong[:8].tolist()} (counted as the network does), and there are "
                f"{self.num_classes} classes; correct the mask, num_classes or reduce_zero_label"
            )
        return results


@METRICS.register_module()
class TrimapIoUMetric(IoUMetric):
    """mmseg's ``IoUMetric`` over a trimap: the pixels at most ``width`` pixels (in a square) from one of another class,
    as Kohli et al. (IJCV 2009) evaluate borders.

    Args:
        width: in pixels of the original image.
        Others are mmseg's; give a ``prefix`` to tell the figures from those of the whole image.
    """

    def __init__(self, width: int = 3, **kwargs):
        super().__init__(**kwargs)
        self.width = width

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        for sample in data_samples:
            label = sample["gt_sem_seg"]["data"]
            outside = ~border_band(label.squeeze(0), self.width)
            sample = {**sample, "gt_sem_seg": {"data": label.masked_fill(outside, self.ignore_index)}}
            super().process(data_batch, [sample])


def border_band(label_HW: Tensor, width: int) -> Tensor:
    """Bool (H, W): where a square of side 2 * width + 1 around the pixel holds more than one label."""
    label_1HW = label_HW[None].float()
    largest, smallest = (
        sign * F.max_pool2d(sign * label_1HW, 2 * width + 1, stride=1, padding=width) for sign in (1, -1)
    )
    return (largest != smallest)[0]
