"""UPerHead whose inference computes the same logits with half of the arithmetic."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmseg.models import Feature2Pyramid, UPerHead
from mmseg.models.utils import resize
from mmseg.registry import MODELS
from torch import Tensor, nn

from .resized_conv import conv3x3_of_resized


class Unfinished(NamedTuple):
    """A level of a pyramid but for its last layer.

    Attributes:
        x: input of that layer.
        last: the layer.
    """

    x: Tensor
    last: nn.ConvTranspose2d


def unfinished_pyramid(neck: Feature2Pyramid, maps: Sequence[Tensor]) -> list[Tensor | Unfinished]:
    """``neck(maps)``, but larger maps without the transposed convolution that makes them so large: what the head does
    next, a 1 x 1 convolution to fewer channels, can be done in one with it."""
    if neck.upsample_4x is None:
        levels = (neck.upsample_2x, neck.identity, neck.downsample_2x, neck.downsample_4x)
    else:
        levels = (neck.upsample_4x, neck.upsample_2x, neck.identity, neck.downsample_2x)
    return [
        Unfinished(level[:-1](x), level[-1]) if isinstance(level, nn.Sequential) else level(x)
        for level, x in zip(levels, maps)
    ]


@MODELS.register_module()
class FastUPerHead(UPerHead):
    """mmseg's ``UPerHead``, parameter for parameter. What is modified:

    - Without gradients in eval mode the fusing 3x3 convolution reads the coarser maps at their own resolution instead
      of resizing and concatenating them first, and maps may be ``Unfinished``. The logits are those of ``UPerHead`` up
      to rounding.

    Args:
        inference: "fast" as above, "reference" for mmseg's own computation everywhere, as it is in training.
        Others are mmseg's.

    Raises:
        ValueError: another ``inference``, or "fast" with a ``conv_cfg`` that is not an ordinary convolution.
    """

    def __init__(self, *args, inference: Literal["fast", "reference"] = "fast", **kwargs):
        super().__init__(*args, **kwargs)
        if inference not in ("fast", "reference"):
            raise ValueError(f"decode_head.inference is {inference!r}; choose 'fast' or 'reference'")
        if inference == "fast" and type(self.fpn_bottleneck.conv) is not torch.nn.Conv2d:
            raise ValueError(
                "decode_head.conv_cfg is not an ordinary convolution; set decode_head.inference='reference'"
            )
        self.inference = inference

    @property
    def is_fast(self) -> bool:
        """Whether it now computes as ``inference="fast"`` says."""
        return self.inference == "fast" and not self.training and not torch.is_grad_enabled()

    def _forward_feature(self, inputs: list[Tensor | Unfinished]) -> Tensor:
        """The map (B, channels, H, W) that is classified, of maps from fine to coarse."""
        if not self.is_fast:
            return super()._forward_feature(inputs)
        *finer, coarsest = self._transform_inputs(inputs)
        if isinstance(coarsest, Unfinished):
            coarsest = coarsest.last(coarsest.x)
        laterals = [_lateral(conv, x) for conv, x in zip(self.lateral_convs, finer)]
        laterals.append(self.psp_forward([coarsest]))
        for level in range(len(laterals) - 1, 0, -1):
            size = laterals[level - 1].shape[2:]
            coarser = resize(laterals[level], size, mode="bilinear", align_corners=self.align_corners)
            laterals[level - 1] = laterals[level - 1] + coarser
        maps = [conv(x) for conv, x in zip(self.fpn_convs, laterals)] + laterals[-1:]

        fuse = self.fpn_bottleneck
        x = conv3x3_of_resized(maps, fuse.conv.weight, fuse.conv.bias, self.align_corners)
        if fuse.with_norm:
            x = fuse.norm(x)
        return fuse.activate(x) if fuse.with_activation else x


def _lateral(lateral: ConvModule, x: Tensor | Unfinished) -> Tensor:
    if isinstance(x, Tensor):
        return lateral(x)
    weight_oi = lateral.conv.weight[:, :, 0, 0]
    weight = torch.einsum("imhw,om->iohw", x.last.weight, weight_oi)
    y = F.conv_transpose2d(x.x, weight, weight_oi @ x.last.bias, x.last.stride)
    if lateral.conv.bias is not None:
        y = y + lateral.conv.bias[:, None, None]
    y = lateral.norm(y) if lateral.with_norm else y
    return lateral.activate(y) if lateral.with_activation else y
