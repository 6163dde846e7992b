"""Resampling of maps to another grid, by a matrix along each axis."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


def resample_positions(positions_HWD: Tensor, size: tuple[int, int], antialias: bool) -> Tensor:
    """Bicubic resampling of absolute positions (H, W, D) to (*size, D), as ``F.interpolate`` does it."""
    height, width, _ = positions_HWD.shape
    rows = _matrix(height, size[0], antialias, positions_HWD.device)
    columns = _matrix(width, size[1], antialias, positions_HWD.device)
    return along_axes(positions_HWD.float()[None], rows, columns)[0]


def along_axes(cells_BHWD: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Multiply with ``rows`` (H', H) along the height and ``columns`` (W', W) along the width: (B, H', W', D).

    On a CPU these products take a fraction of the time of ``F.interpolate`` or pooling, and they leave the channels
    of a cell together, where tokens read them. All are of one dtype, which autocast does not change.
    """
    batch, _, width, dim = cells_BHWD.shape
    with torch.autocast(cells_BHWD.device.type, enabled=False):
        across_BHWD = (rows @ cells_BHWD.flatten(2)).view(batch, len(rows), width, dim)
        return columns @ across_BHWD


# What is kept must be usable in training, even if the first to ask for it was in inference mode.
@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _matrix(old: int, new: int, antialias: bool, device: torch.device) -> Tensor:
    """(new, old): what every new cell takes from every old one along one axis."""
    identity = torch.eye(old, dtype=torch.float32)[None, None]
    matrix = F.interpolate(identity, size=(new, old), mode="bicubic", align_corners=False, antialias=antialias)
    return matrix[0, 0].to(device)
