"""timm ViTs in every mode of the benchmarks. The dense baseline is timm's own code."""

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from apt_backbones import adapt

if TYPE_CHECKING:  # it needs mmengine, which not every benchmark does
    from apt_backbones.mm.backbone import APTTimm


class ReferenceTimm(nn.Module):
    """timm's own code for the maps of a dense ``APTTimm``, whose weights it shares."""

    def __init__(self, backbone: "APTTimm"):
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        trunk = self.backbone.trunk
        indices = list(trunk.out_indices)
        return tuple(trunk.forward_intermediates(images, indices, norm=self.backbone.norm, intermediates_only=True))

    def compile_blocks(self, **options) -> "ReferenceTimm":
        for block in self.backbone.trunk.blocks:
            block.compile(**options)
        return self


class TimmTrunks:
    """An ``APTTimm`` in every mode, with one set of random weights.

    Args:
        arguments: of ``APTTimm``; their thresholds, scorer and merging do not count.
    """

    def __init__(self, arguments: dict, device: torch.device):
        from apt_backbones.mm.backbone import APTTimm

        self.scorer, self.keep_prefix = arguments.get("scorer", "entropy"), arguments.get("keep_prefix", True)
        own = ("model", "img_size", "out_indices", "norm", "keep_prefix", "thresholds", "scorer", "merge")
        self.options = {name: value for name, value in arguments.items() if name not in own}
        torch.manual_seed(0)
        with device:
            self.packed = APTTimm(**{**arguments, "thresholds": None, "scorer": "entropy", "merge": "resizing"}).eval()

    def reference(self) -> ReferenceTimm | None:
        """None where timm has no such network: with windows, with finer maps, or without prefix tokens."""
        return ReferenceTimm(self.packed).eval() if self.packed.trunk.is_original else None

    def adaptive(self, merge: str, **options) -> "APTTimm":
        shared = {id(tensor): tensor for tensor in (*self.packed.parameters(), *self.packed.buffers())}
        model = copy.deepcopy(self.packed, shared)
        indices = self.packed.trunk.out_indices
        options = {**self.options, **options, "out_indices": indices}
        adapt(model.trunk, scorer=self.scorer, merge=merge, keep_prefix=self.keep_prefix, **options)
        return model.eval()
