"""Resampling of absolute positions to another grid."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


def resample_positions(positions_HWD: Tensor, size: tuple[int, int], antialias: bool) -> Tensor:
    """Bicubic resampling of (H, W, D) to (*size, D), as ``F.interpolate`` does it.

    Written as two matrix products, one per axis: on a CPU they take a fraction of its time, and they leave the
    channels of a cell together, where tokens read them.
    """
    height, width, dim = positions_HWD.shape
    device = positions_HWD.device
    with torch.autocast(device.type, enabled=False):
        rows = _matrix(height, size[0], antialias, device) @ positions_HWD.float().flatten(1)
        columns = _matrix(width, size[1], antialias, device)
        return torch.bmm(columns.expand(size[0], -1, -1), rows.view(size[0], width, dim))


# What is kept must be usable in training, even if the first to ask for it was in inference mode.
@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _matrix(old: int, new: int, antialias: bool, device: torch.device) -> Tensor:
    """(new, old): what every new cell takes from every old one along one axis."""
    identity = torch.eye(old)[None, None]
    matrix = F.interpolate(identity, size=(new, old), mode="bicubic", align_corners=False, antialias=antialias)
    return matrix[0, 0].to(device)
