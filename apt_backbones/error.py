"""Where the features of an adaptive trunk differ from those of the dense trunk with the same weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from .eva02 import APTEva02


class FeatureError(NamedTuple):
    """Differences of a batch, cell by cell.

    Attributes:
        error_MBHW: squared distance between adaptive and dense feature, per feature map of the trunk.
        norm_MBHW: squared length of the dense feature.
        side_BHW: side in pixels of the patch that covers each base cell; 0 where a cell was dropped.
    """

    error_MBHW: Tensor
    norm_MBHW: Tensor
    side_BHW: Tensor

    def relative(self, cells_BHW: Tensor | None = None) -> float:
        """Root of (squared error / squared length of the dense features) over some cells, averaged over the maps.

        Args:
            cells_BHW: boolean; None for all cells. Without any cell the error is NaN.
        """
        cells_BHW = torch.ones_like(self.side_BHW, dtype=torch.bool) if cells_BHW is None else cells_BHW
        error_M, norm_M = (part[:, cells_BHW].sum(1) for part in (self.error_MBHW, self.norm_MBHW))
        return float((error_M / norm_M).sqrt().mean())

    def heat(self) -> Tensor:
        """Relative error of every cell (B, H, W): its distance over the image's root mean squared length."""
        return (self.error_MBHW / self.norm_MBHW.mean((2, 3), keepdim=True)).sqrt().mean(0)


@contextmanager
def merging_off(trunk: APTEva02) -> Iterator[None]:
    """Make a trunk dense for the time being; its weights stay as they are."""
    thresholds, trunk.thresholds = trunk.thresholds, {}
    try:
        yield
    finally:
        trunk.thresholds = thresholds


@torch.no_grad()
def dense_features(trunk: APTEva02, images: Tensor) -> tuple[Tensor, ...]:
    """Feature maps of the trunk without merging; images as for ``APTEva02.forward``."""
    with merging_off(trunk):
        return trunk(images)


@torch.no_grad()
def feature_error(trunk: APTEva02, images: Tensor, dense: tuple[Tensor, ...] | None = None) -> FeatureError:
    """Compare a trunk's features with its own without merging.

    Args:
        trunk: in evaluation mode.
        images: normalised images (B, 3, height, width).
        dense: what ``dense_features`` gives for them, if that is known already.
    """
    dense = dense_features(trunk, images) if dense is None else dense
    adaptive = trunk(images)
    layout = trunk.last_layout
    pairs = [(ours.float(), theirs.float()) for ours, theirs in zip(adaptive, dense)]
    return FeatureError(
        torch.stack([(ours - theirs).square().sum(1) for ours, theirs in pairs]),
        torch.stack([theirs.square().sum(1) for _, theirs in pairs]),
        layout.side_T[layout.token_BHW].where(layout.token_BHW >= 0, 0),
    )
