"""2D rotary position embedding at arbitrary token positions (EVA-02; APT, section 3.2).

A token of side s covers (s / p) x (s / p) base cells. It is rotated as one that sits at the centre of those cells
(``"centre"``) or at their top-left cell (``"corner"``, as the authors' classification code does).

Legend: T tokens, N heads, H channels per head.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .layout import PatchLayout

ROPE_POSITIONS = ("centre", "corner")


class RotaryTables(NamedTuple):
    """Cosine and sine of every token's angles, float32 (T, 1, H): computed once per batch, shared by all blocks."""

    cos_T1H: Tensor
    sin_T1H: Tensor


def rotary_tables(
    layout: PatchLayout,
    head_dim: int,
    length: float,
    within_window: bool = False,
    rope_position: str = "centre",
    pretrain_length: int = 16,
    theta: float = 10000.0,
) -> RotaryTables:
    """Rotary tables of a packed batch.

    Args:
        layout: the batch.
        head_dim: channels per head, a multiple of 4; the first half rotates with the row, the second with the column.
        length: cells per axis that span ``pretrain_length`` position units: the window side or the training grid.
        within_window: count rows and columns from the token's window instead of from the image.
        rope_position: "centre" or "corner".
        pretrain_length: side of the grid that the rotary embedding was pretrained on.
        theta: the lowest frequency is about 1 / theta.

    Returns:
        Tables in which prefix tokens are not rotated.
    """
    frequency = theta ** (
        -torch.arange(0, head_dim // 4, dtype=torch.float32, device=layout.row_T.device) * 4 / head_dim
    )
    position_T2 = torch.stack([layout.row_T, layout.column_T], dim=1)
    if within_window and layout.window is not None:
        position_T2 = position_T2 % layout.window
    position_T2 = position_T2.float()
    if rope_position == "centre":
        position_T2 = position_T2 + (layout.side_T[:, None] / layout.patch_size - 1) / 2
    angle_T2F = (position_T2 / length * pretrain_length)[:, :, None] * frequency
    angle_T1H = angle_T2F.flatten(1).repeat_interleave(2, dim=1)[:, None]
    if layout.num_prefix:
        angle_T1H = angle_T1H.masked_fill((layout.side_T == 0)[:, None, None], 0)
    return RotaryTables(angle_T1H.cos(), angle_T1H.sin())


def apply_rotary(x_TNH: Tensor, tables: RotaryTables) -> Tensor:
    """Rotate pairs of neighbouring channels; computed in the tables' float32, returned in x's dtype."""
    x = x_TNH.float()
    rotated = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return (x * tables.cos_T1H + rotated * tables.sin_T1H).to(x_TNH.dtype)
