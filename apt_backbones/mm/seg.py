"""mmseg: what an encoder-decoder with an adaptive backbone does beyond mmseg's own."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from mmengine.structures import PixelData
from mmseg.models import EncoderDecoder, Feature2Pyramid
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from mmseg.utils import add_prefix
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from ..layout import PatchLayout
from ..trunk import find_trunk, named_trunk
from .short_finetune import ShortFinetune
from .upernet import FastUPerHead, Unfinished, unfinished_pyramid


@MODELS.register_module()
class APTEncoderDecoder(EncoderDecoder):
    """mmseg's ``EncoderDecoder`` over an ``APTEva02`` or ``APTTimm`` backbone. What is modified:

    - ``slide_inference`` runs the crops of an image together, as many at a time as ``test_cfg.token_budget`` allows;
      the result is that of mmseg's one-by-one slide.
    - ``encode_decode`` pads its input to whole patches and cuts the logits back, and ``loss`` pads masks, too, so that
      they stay aligned with the pixels when a crop or an image is not a multiple of the patch.
    - With ``own_resolution`` merged patches are read at their own resolution.
    - Loading resamples positions of a model that was trained on crops of another size, and says so; a checkpoint of
      another number of classes is refused unless ``new_classifier`` is set.

    Args:
        own_resolution: neck and decode head also read the maps averaged over 2 x 2, 4 x 4, ... cells, and the logits of
            patches of that side are taken from there. A head that mixes neighbouring cells and was trained on images of
            several sizes then sees a merged patch as it sees a patch of a smaller image; on the grid of base patches it
            is stretched. Costs a quarter of the time of neck and head, and a sixteenth, ... Heads of pixels learn from
            what they say so; auxiliary heads, and those of mask classification, from the grid of base patches.
        new_classifier: keep this model's own, untrained classifiers where a checkpoint's have another number of
            classes: the start of fine-tuning on another data set.
        test_cfg: mmseg's, with one more entry for mode "slide": ``token_budget``, the most tokens (CLS included)
            that go through the backbone at a time. A single crop may exceed it. None or absent: no limit.
        Others are mmseg's.

    Raises:
        ValueError: crops that are smaller than a patch, or strides that leave gaps between them.
    """

    def __init__(self, *args, own_resolution: bool = False, new_classifier: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.own_resolution = own_resolution
        self.new_classifier = new_classifier
        # Called by mmengine's way of loading, too.
        self.register_load_state_dict_pre_hook(_adapt_state_dict)
        patch = find_trunk(self).patch_size
        sizes = {"data_preprocessor.size": self.data_preprocessor.size}
        if self.test_cfg.get("mode") == "slide":
            sizes["test_cfg.crop_size"] = self.test_cfg.crop_size
            if any(not 0 < step <= side for step, side in zip(self.test_cfg.stride, self.test_cfg.crop_size)):
                raise ValueError(
                    f"test_cfg.stride {tuple(self.test_cfg.stride)} must be at least 1 and at most the crop size, "
                    f"{tuple(self.test_cfg.crop_size)}"
                )
        for name, size in sizes.items():
            if size is not None and min(size) < patch:
                raise ValueError(f"{name} {tuple(size)} is smaller than a patch; use at least {patch} x {patch} pixels")

    def loss(self, inputs: Tensor, data_samples: list[SegDataSample]) -> dict[str, Tensor]:
        """Losses of normalized images (B, 3, height, width) of any size; padding is ignored."""
        padded = self._pad(inputs)
        if padded is not inputs:
            data_samples = [sample.clone() for sample in data_samples]
            for sample in data_samples:
                mask_1HW = sample.gt_sem_seg.data
                bottom, right = (whole - side for whole, side in zip(padded.shape[2:], mask_1HW.shape[1:]))
                sample.gt_sem_seg = PixelData(
                    data=F.pad(mask_1HW, (0, right, 0, bottom), value=self.decode_head.ignore_index)
                )
        if not (self.own_resolution and isinstance(self.decode_head, BaseDecodeHead)):
            return super().loss(padded, data_samples)
        maps, layout = self.backbone.with_layout(padded)
        metas = [sample.metainfo for sample in data_samples]
        logits = self._read_at_own_resolution(maps, layout, padded.shape[2:], metas)
        losses = add_prefix(self.decode_head.loss_by_feat(logits, data_samples), "decode")
        if self.with_auxiliary_head:
            losses |= self._auxiliary_head_forward_train(self.neck(maps) if self.with_neck else maps, data_samples)
        return losses

    def encode_decode(self, inputs: Tensor, batch_img_metas: list[dict]) -> Tensor:
        """Logits (B, classes, height, width) of normalized images (B, 3, height, width) of any size."""
        padded = self._pad(inputs)
        size = padded.shape[2:]
        if self.own_resolution:
            logits = self._read_at_own_resolution(*self.backbone.with_layout(padded), size, batch_img_metas)
        else:
            logits = self._read(self.backbone(padded), size, batch_img_metas)
        return logits[:, :, : inputs.shape[2], : inputs.shape[3]]

    def _read_at_own_resolution(
        self, maps: Sequence[Tensor], layout: PatchLayout, image_size: Sequence[int], batch_img_metas: list[dict]
    ) -> Tensor:
        """Logits (B, classes, *image_size), those of a merged patch from maps of which it is one cell."""
        height, width = image_size
        side_B1HW = layout.refine(layout.side_BHW[:, None], layout.patch_size)
        logits = self._read(maps, (height, width), batch_img_metas)
        for size, tokens in layout.sizes.items():
            factor = size // layout.patch_size
            grid = [-(-cells // factor) for cells in layout.grid]
            if factor == 1 or not len(tokens) or min(grid) < self._least_cells():
                continue
            means = [F.avg_pool2d(x, factor, ceil_mode=True) for x in maps]
            coarser = self._read(means, [cells * size for cells in grid], batch_img_metas)
            logits = torch.where(side_B1HW == size, coarser[..., :height, :width], logits)
        return logits

    def _read(self, maps: Sequence[Tensor], size: Sequence[int], batch_img_metas: list[dict]) -> Tensor:
        """Logits (B, classes, *size) of the backbone's maps."""
        # Heads take the size of their output from here; mask classification prefers the second.
        shapes = dict.fromkeys(("img_shape", "pad_shape"), torch.Size(size))
        metas = [{**meta, **shapes} for meta in batch_img_metas]
        return self.decode_head.predict(self.head_inputs(maps), metas, self.test_cfg)

    def head_inputs(self, maps: Sequence[Tensor]) -> Sequence[Tensor | Unfinished]:
        """What the decode head reads, of the backbone's maps."""
        if not self.with_neck:
            return maps
        if (
            type(self.neck) is Feature2Pyramid
            and isinstance(self.decode_head, FastUPerHead)
            and self.decode_head.is_fast
        ):
            return unfinished_pyramid(self.neck, maps)
        return self.neck(maps)

    def slide_inference(self, inputs: Tensor, batch_img_metas: list[dict]) -> Tensor:
        """Logits (B, classes, height, width), averaged where crops overlap; crops are placed as mmseg places them."""
        height, width = (min(side, crop) for side, crop in zip(inputs.shape[2:], self.test_cfg.crop_size))
        tops, lefts = (
            _starts(side, crop, stride)
            for side, crop, stride in zip(inputs.shape[2:], (height, width), self.test_cfg.stride)
        )
        places = [(image, y, x) for y in tops for x in lefts for image in range(len(inputs))]
        crops = torch.stack([inputs[image, :, y : y + height, x : x + width] for image, y, x in places])

        total = inputs.new_zeros(len(inputs), self.out_channels, *inputs.shape[2:])
        count = inputs.new_zeros(len(inputs), 1, *inputs.shape[2:])
        for batch in pack(self._lengths(crops), self.test_cfg.get("token_budget")):
            metas = [batch_img_metas[places[crop][0]] for crop in batch]
            for crop, logits in zip(batch, self.encode_decode(crops[batch.start : batch.stop], metas)):
                image, y, x = places[crop]
                total[image, :, y : y + height, x : x + width] += logits
                count[image, :, y : y + height, x : x + width] += 1
        return total / count

    def adapt_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Fit the positions and, if asked to, the classifiers of a whole model's weights to this model, in place.

        Raises:
            ValueError: the weights are those of another number of classes, and ``new_classifier`` is not set.
        """
        own = self.state_dict()
        trunk_name, trunk = named_trunk(self)
        name, grid = f"{trunk_name}.pos_embed", list(trunk.position_grid)
        if name in state_dict and state_dict[name].shape[1] != own[name].shape[1]:
            num_prefix = own[name].shape[1] - math.prod(grid)
            old_cells = state_dict[name].shape[1] - num_prefix
            old_grid = math.isqrt(max(old_cells, 0))
            if old_grid**2 == old_cells:  # else they are another model's, which loading reports
                state_dict[name] = resample_abs_pos_embed(
                    state_dict[name], grid, num_prefix_tokens=num_prefix, antialias=trunk.antialias_positions
                )
                sizes = f"{old_grid} x {old_grid} to {grid[0]} x {grid[1]}"
                print_log(f"positions resampled from {sizes} patches", "current")
        for name in own:
            if ".conv_seg." in name and name in state_dict and len(state_dict[name]) != len(own[name]):
                classes = f"{len(state_dict[name])} classes, the model {len(own[name])}"
                if not self.new_classifier:
                    raise ValueError(
                        f"{name} of the checkpoint has {classes}; set num_classes of the heads to the checkpoint's, "
                        "or model.new_classifier=True to train new classifiers"
                    )
                print_log(f"{name} of the checkpoint has {classes}: left as it is in the model", "current")
                state_dict[name] = own[name]

    def _pad(self, images: Tensor) -> Tensor:
        """To whole patches, as many at least as make one cell of the pyramid's coarsest map."""
        patch = find_trunk(self).patch_size
        least = patch * self._least_cells()
        bottom, right = (max(-side % patch, least - side) for side in images.shape[2:])
        return F.pad(images, (0, right, 0, bottom)) if bottom or right else images

    def _least_cells(self) -> int:
        """Cells per side of a map from which the pyramid's coarsest has one."""
        return round(1 / min(getattr(self.neck, "rescales", (1,)))) if self.with_neck else 1

    def _lengths(self, crops: Tensor) -> Sequence[int]:
        """Tokens of every crop. Merging only makes them fewer: crops that fit as they are need no scoring here."""
        padded, trunk = self._pad(crops), find_trunk(self)
        dense = padded.shape[2] * padded.shape[3] // trunk.patch_size**2 + trunk.num_prefix
        if len(crops) * dense <= (self.test_cfg.get("token_budget") or float("inf")):
            return [dense] * len(crops)
        return trunk.layout(padded).images.lengths


@MODELS.register_module()
class ShortFinetuneEncoderDecoder(ShortFinetune, APTEncoderDecoder):
    """``APTEncoderDecoder`` in which only ConvDown and ZeroMLP train; batch norm statistics stay as they are."""


def _adapt_state_dict(model: APTEncoderDecoder, state_dict: dict[str, Tensor], *_) -> None:
    model.adapt_state_dict(state_dict)


def pack(lengths: Sequence[int], budget: int | None) -> list[range]:
    """Split a sequence into the longest runs, in order, whose lengths add up to at most the budget.

    Args:
        lengths: of the items; one that exceeds the budget makes a run of its own.
        budget: None for one run.
    """
    runs, start, total = [], 0, 0
    for item, length in enumerate(lengths):
        if budget is not None and item > start and total + length > budget:
            runs.append(range(start, item))
            start, total = item, 0
        total += length
    return [*runs, range(start, len(lengths))]


def _starts(side: int, crop: int, stride: int) -> list[int]:
    """Where crops begin along one axis; the last one ends with the image."""
    return [min(start, side - crop) for start in range(0, side - crop + stride, stride)]
