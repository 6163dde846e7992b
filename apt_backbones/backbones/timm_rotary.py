"""Angles of timm's rotary position embeddings at arbitrary positions.

timm computes tables for whole grids; a merged patch sits between their cells. Every angle is here a function of the
position, equal to timm's at the cells.

Legend: T tokens, N heads, H channels per head, C = H / 2 angles, L blocks.
"""

import math
from collections.abc import Callable

import torch
from timm.layers import RotaryEmbeddingCat, RotaryEmbeddingDinoV3, RotaryEmbeddingMixed
from timm.layers.pos_embed_sincos import RotaryEmbeddingMRope, _apply_coord_augs
from torch import Tensor, nn


def rotation_angles(rope: nn.Module, position_T2: Tensor, grid: tuple[int, int]) -> Tensor:
    """Angles float32 of one rotary embedding: (T, 1, C) for all blocks, or (L, T, N, C) if each has its own.

    Args:
        rope: timm's module.
        position_T2: row and column in base cells (``token_positions``).
        grid: (H, W) in base cells.

    Raises:
        TypeError: a rotary embedding of another class.
    """
    with torch.autocast(position_T2.device.type, enabled=False):
        return _ANGLES[check_rope(rope)](rope, position_T2, grid)


def check_rope(rope: nn.Module) -> type:
    """The module's class; raise TypeError unless its angles are known here."""
    if type(rope) not in _ANGLES:
        raise TypeError(
            f"rotary positions of class {type(rope).__name__} are not supported; supported are "
            f"{', '.join(kind.__name__ for kind in _ANGLES)}"
        )
    if getattr(rope, "in_pixels", False) or getattr(rope, "grid_type", "index") not in ("index", "centered"):
        raise TypeError(f"{type(rope).__name__} with positions in pixels is not supported")
    return type(rope)


def _augmented(rope: nn.Module, position_T2: Tensor) -> Tensor:
    """Training's random shift and scale of positions, where the model has it."""
    if not (rope.training and rope.aug_active):
        return position_T2
    return _apply_coord_augs(position_T2, rope.shift_coords, rope.jitter_coords, rope.rescale_coords)


def _ordered(rope: nn.Module, position_T2: Tensor) -> Tensor:
    """Row first ("ij") or column first ("xy")."""
    return position_T2.flip(1) if rope.grid_indexing == "xy" else position_T2


def _centered(rope: nn.Module, position_T2: Tensor, grid: tuple[int, int]) -> Tensor:
    """Positions in -1 .. 1."""
    sides = {"max": (max(grid),) * 2, "min": (min(grid),) * 2, "separate": grid}[rope.normalize_coords]
    cells_T2 = position_T2 + 0.5 + rope.grid_offset
    return torch.stack([2 * cells_T2[:, axis] / sides[axis] - 1 for axis in range(2)], dim=1)


def _cat(rope: RotaryEmbeddingCat, position_T2: Tensor, grid: tuple[int, int]) -> Tensor:
    if rope.grid_type == "centered":
        position_T2 = _centered(rope, position_T2, grid)
    else:
        position_T2 = position_T2 + rope.grid_offset
    if rope.ref_feat_shape is not None:
        pairs = zip(position_T2.unbind(1), grid, rope.ref_feat_shape)
        position_T2 = torch.stack([position_T / side * reference for position_T, side, reference in pairs], dim=1)
    position_T2 = _augmented(rope, _ordered(rope, position_T2))
    return (position_T2[:, :, None] * rope.bands.float()).flatten(1)[:, None]


def _dinov3(rope: RotaryEmbeddingDinoV3, position_T2: Tensor, grid: tuple[int, int]) -> Tensor:
    position_T2 = _augmented(rope, _ordered(rope, _centered(rope, position_T2, grid)))
    return (2 * math.pi * position_T2[:, :, None] / rope.periods.float()).flatten(1)[:, None]


def _mixed(rope: RotaryEmbeddingMixed, position_T2: Tensor, grid: tuple[int, int]) -> Tensor:
    position_T2 = _augmented(rope, _ordered(rope, position_T2))
    frequencies_2LNC = rope.freqs.float()
    angle_LTNC = position_T2[:, 0, None, None] * frequencies_2LNC[0, :, None]
    return angle_LTNC + position_T2[:, 1, None, None] * frequencies_2LNC[1, :, None]


def _mrope(rope: RotaryEmbeddingMRope, position_T2: Tensor, grid: tuple[int, int]) -> Tensor:
    position_T2 = _augmented(rope, position_T2)
    with_time_T3 = torch.cat([torch.zeros_like(position_T2[:, :1]), position_T2], dim=1)
    return (with_time_T3.index_select(1, rope.axis) * rope.inv_freq.float())[:, None]


_ANGLES: dict[type, Callable[[nn.Module, Tensor, tuple[int, int]], Tensor]] = {
    RotaryEmbeddingCat: _cat,
    RotaryEmbeddingDinoV3: _dinov3,
    RotaryEmbeddingMixed: _mixed,
    RotaryEmbeddingMRope: _mrope,
}
