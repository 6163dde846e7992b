"""Where the features of an adaptive trunk differ from those of the dense trunk with the same weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .trunk import AdaptiveTrunk


class FeatureDistance(NamedTuple):
    """Differences of a batch, cell by cell.

    Attributes:
        distance_MBHW: squared distance between adaptive and dense feature, per feature map of the trunk.
        norm_MBHW: squared length of the dense feature.
        side_BHW: side in pixels of the patch that covers each base cell; 0 where a cell was dropped.
    """

    distance_MBHW: Tensor
    norm_MBHW: Tensor
    side_BHW: Tensor

    def relative(self, cells_BHW: Tensor | None = None) -> float:
        """Root of (squared distance / squared length of the dense features) over some cells, averaged over the maps.

        Args:
            cells_BHW: boolean; None for all cells. Without any cell the distance is NaN.
        """
        cells_BHW = torch.ones_like(self.side_BHW, dtype=torch.bool) if cells_BHW is None else cells_BHW
        distance_M, norm_M = (part[:, cells_BHW].sum(1) for part in (self.distance_MBHW, self.norm_MBHW))
        return float((distance_M / norm_M).sqrt().mean())

    def heat(self) -> Tensor:
        """Relative distance of every cell (B, H, W): over the image's root mean squared length."""
        return (self.distance_MBHW / self.norm_MBHW.mean((2, 3), keepdim=True)).sqrt().mean(0)


@contextmanager
def merging_off(trunk: AdaptiveTrunk) -> Iterator[None]:
    """Make a trunk dense for the time being; its weights stay as they are."""
    thresholds, trunk.thresholds = trunk.thresholds, {}
    try:
        yield
    finally:
        trunk.thresholds = thresholds


@torch.no_grad()
def dense_features(trunk: AdaptiveTrunk, images: Tensor) -> tuple[Tensor, ...]:
    """Feature maps of the trunk without merging; images as for ``AdaptiveTrunk.feature_maps``."""
    with merging_off(trunk):
        return trunk.feature_maps(images)


@torch.no_grad()
def feature_distance(trunk: AdaptiveTrunk, images: Tensor, dense: tuple[Tensor, ...] | None = None) -> FeatureDistance:
    """Compare a trunk's features with its own without merging.

    Args:
        trunk: in evaluation mode.
        images: normalized images (B, 3, height, width).
        dense: what ``dense_features`` gives for them, if that is known already.
    """
    dense = dense_features(trunk, images) if dense is None else dense
    adaptive, layout = trunk.maps_and_layout(images)
    cells = [F.avg_pool2d(maps.float(), trunk.map_scale) for part in (adaptive, dense) for maps in part]
    pairs = list(zip(cells[: len(dense)], cells[len(dense) :]))
    return FeatureDistance(
        torch.stack([(ours - theirs).square().sum(1) for ours, theirs in pairs]),
        torch.stack([theirs.square().sum(1) for _, theirs in pairs]),
        layout.side_BHW,
    )
