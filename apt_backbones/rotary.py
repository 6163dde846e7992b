"""2D rotary position embedding at arbitrary token positions (EVA-02; APT, section 3.2).

A token of side s covers (s / p) x (s / p) base cells. It is rotated as one that sits at the center of those cells
(``"center"``) or at their top-left cell (``"corner"``, as the authors' classification code does).

Two channels are the real and imaginary part of one complex number, which a position turns by an angle: neighboring
channels (interleaved), or channel i and i + H / 2 (``half``).

Legend: T tokens, N heads, H channels per head, C = H / 2 angles.
"""

import torch
from torch import Tensor

from .layout import PatchLayout

ROPE_POSITIONS = ("center", "corner")


def token_positions(layout: PatchLayout, rope_position: str = "center", within_window: bool = False) -> Tensor:
    """Row and column of every token in base cells, float32 (T, 2); the first cell's center is 0.

    Args:
        layout: the batch.
        rope_position: "center" or "corner" of a merged patch.
        within_window: count from the token's window instead of from the image.
    """
    position_T2 = torch.stack([layout.row_T, layout.column_T], dim=1)
    if within_window and layout.window is not None:
        position_T2 = position_T2 % layout.window
    position_T2 = position_T2.float()
    if rope_position == "center":
        position_T2 = position_T2 + (layout.side_T[:, None] / layout.patch_size - 1) / 2
    return position_T2


def rotation_of(angle_TNC: Tensor, layout: PatchLayout) -> Tensor:
    """Rotations complex64 (T, N or 1, C) by float32 angles of that shape; prefix tokens are not rotated."""
    if layout.num_prefix:
        angle_TNC = angle_TNC.masked_fill(layout.is_prefix_T[:, None, None], 0)
    return torch.polar(torch.ones_like(angle_TNC), angle_TNC)


def rotary_table(
    layout: PatchLayout,
    head_dim: int,
    length: float,
    within_window: bool = False,
    rope_position: str = "center",
    pretrain_length: int = 16,
    theta: float = 10000.0,
) -> Tensor:
    """EVA-02's rotation of every token, computed once per batch and shared by all blocks.

    Args:
        layout: the batch.
        head_dim: channels per head, a multiple of 4; the first half rotates with the row, the second with the column.
        length: cells per axis that span ``pretrain_length`` position units: the window side or the training grid.
        within_window, rope_position: see ``token_positions``.
        pretrain_length: side of the grid that the rotary embedding was pretrained on.
        theta: the lowest frequency is about 1 / theta.

    Returns:
        complex64 (T, 1, H / 2); 1 (no rotation) for prefix tokens.
    """
    frequency = theta ** (
        -torch.arange(0, head_dim // 4, dtype=torch.float32, device=layout.row_T.device) * 4 / head_dim
    )
    position_T2 = token_positions(layout, rope_position, within_window)
    angle_T2F = (position_T2 / length * pretrain_length)[:, :, None] * frequency
    return rotation_of(angle_T2F.flatten(1)[:, None], layout)


def apply_rotary(x_TNH: Tensor, rotation: Tensor, half: bool = False) -> Tensor:
    """Rotate pairs of channels; computed in float32, returned in x's dtype.

    Args:
        x_TNH: (..., T, N, H).
        rotation: complex (T, N or 1, H / 2), or its real and imaginary parts (T, N or 1, H / 2, 2). For neighboring
            channels a complex product is on a CPU about thirty times faster than products with interleaved sines and
            cosines; compilers know no complex numbers, and fuse the real arithmetic.
        half: pairs are channels i and i + H / 2 (DINOv3) instead of neighbors.
    """
    x = x_TNH.float()
    if rotation.is_complex() and not half:
        x = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * rotation).flatten(-2)
    else:
        cos, sin = (torch.view_as_real(rotation) if rotation.is_complex() else rotation).unbind(-1)
        real, imaginary = x.unflatten(-1, (2, -1) if half else (-1, 2)).unbind(-2 if half else -1)
        turned = (real * cos - imaginary * sin, real * sin + imaginary * cos)
        x = torch.cat(turned, dim=-1) if half else torch.stack(turned, dim=-1).flatten(-2)
    # Attention kernels want contiguous inputs, and this conversion can provide them.
    return x.to(x_TNH.dtype, memory_format=torch.contiguous_format)
