"""UPerHead whose inference computes the same logits with half of the arithmetic."""

from typing import Literal

import torch
from mmseg.models import UPerHead
from mmseg.models.utils import resize
from mmseg.registry import MODELS
from torch import Tensor

from .resized_conv import conv3x3_of_resized


@MODELS.register_module()
class FastUPerHead(UPerHead):
    """mmseg's ``UPerHead``, parameter for parameter. What is modified:

    - Without gradients in eval mode the fusing 3x3 convolution reads the coarser maps at their own resolution instead
      of resizing and concatenating them first. The logits are those of ``UPerHead`` up to rounding.

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

    def _forward_feature(self, inputs: list[Tensor]) -> Tensor:
        """The map (B, channels, H, W) that is classified, of maps from fine to coarse."""
        if self.inference == "reference" or self.training or torch.is_grad_enabled():
            return super()._forward_feature(inputs)
        inputs = self._transform_inputs(inputs)
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, inputs)]
        laterals.append(self.psp_forward(inputs))
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
