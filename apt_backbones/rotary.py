"""2D rotary position embedding at arbitrary token positions (EVA-02; APT, section 3.2).

A token of side s covers (s / p) x (s / p) base cells. It is rotated as one that sits at the centre of those cells
(``"centre"``) or at their top-left cell (``"corner"``, as the authors' classification code does).

Neighbouring channels are the real and imaginary part of one complex number, which a position turns by an angle.

Legend: T tokens, N heads, H channels per head.
"""

import torch
from torch import Tensor

from .layout import PatchLayout

ROPE_POSITIONS = ("centre", "corner")


def rotary_table(
    layout: PatchLayout,
    head_dim: int,
    length: float,
    within_window: bool = False,
    rope_position: str = "centre",
    pretrain_length: int = 16,
    theta: float = 10000.0,
) -> Tensor:
    """Every token's rotation, computed once per batch and shared by all blocks.

    Args:
        layout: the batch.
        head_dim: channels per head, a multiple of 4; the first half rotates with the row, the second with the column.
        length: cells per axis that span ``pretrain_length`` position units: the window side or the training grid.
        within_window: count rows and columns from the token's window instead of from the image.
        rope_position: "centre" or "corner".
        pretrain_length: side of the grid that the rotary embedding was pretrained on.
        theta: the lowest frequency is about 1 / theta.

    Returns:
        complex64 (T, 1, H / 2); 1 (no rotation) for prefix tokens.
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
    angle_T1C = angle_T2F.flatten(1)[:, None]
    if layout.num_prefix:
        angle_T1C = angle_T1C.masked_fill((layout.side_T == 0)[:, None, None], 0)
    return torch.polar(torch.ones_like(angle_T1C), angle_T1C)


def apply_rotary(x_TNH: Tensor, rotation: Tensor) -> Tensor:
    """Rotate pairs of neighbouring channels; computed in float32, returned in x's dtype.

    Args:
        x_TNH: (..., T, N, H).
        rotation: a ``rotary_table`` (T, 1, H / 2), or its real and imaginary parts (T, 1, H / 2, 2). A complex
            product is on a CPU about thirty times faster than products with interleaved sines and cosines; compilers
            know no complex numbers, and fuse the real arithmetic.
    """
    pairs = x_TNH.float().unflatten(-1, (-1, 2))
    if rotation.is_complex():
        pairs = torch.view_as_real(torch.view_as_complex(pairs) * rotation)
    else:
        (real, imaginary), (cos, sin) = pairs.unbind(-1), rotation.unbind(-1)
        pairs = torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1)
    # Attention kernels want contiguous inputs, and this conversion can provide them.
    return pairs.flatten(-2).to(x_TNH.dtype, memory_format=torch.contiguous_format)
