"""A 3x3 convolution of bilinearly resized maps, without resizing them.

A 3x3 convolution is a sum of nine 1x1 products, shifted, and 1x1 products commute with resizing. So the products are
taken at the resolution of the small maps, where they cost a quarter, a sixteenth, ... as much, and it is the sum over
the nine shifts that reads them at resized positions. Equal to the plain computation up to rounding.

Legend: B images, I and O input and output channels, H W the full size, h w the size of a small map, T taps of one axis.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

HAS_TRITON = find_spec("triton") is not None


@torch.no_grad()
def conv3x3_of_resized(
    maps: Sequence[Tensor], weight: Tensor, bias: Tensor | None = None, align_corners: bool = False
) -> Tensor:
    """``conv2d(cat([maps[0], resize(maps[1]), ...], 1), weight, bias, padding=1)``, without gradients.

    Products are taken in the dtype of autocast or else of the first map; their sum is accumulated in float32 or better.

    Args:
        maps: (B, I_k, H, W) and then any number of (B, I_k, h_k, w_k) that are to be resized bilinearly to H x W.
        weight, bias: (O, sum of I_k, 3, 3) and (O,) or None.
        align_corners: as in ``torch.nn.functional.interpolate``.

    Returns:
        (B, O, H, W).
    """
    device = maps[0].device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else maps[0].dtype
    maps = [x.to(dtype) for x in maps]
    weights = weight.to(dtype).split([x.shape[1] for x in maps], dim=1)
    bias = bias if bias is None else bias.to(dtype)
    if has_kernel(maps[0]):
        from .resized_conv_triton import add_resized_products

        memory_format = torch.channels_last
    else:
        add_resized_products, memory_format = _add_resized_products, torch.contiguous_format
    with torch.autocast(device, enabled=False) if autocast else nullcontext():
        full, kernel = (x.contiguous(memory_format=memory_format) for x in (maps[0], weights[0]))
        out_BOHW = F.conv2d(full, kernel, bias, padding=1).contiguous(memory_format=memory_format)
        return add_resized_products(out_BOHW, maps[1:], weights[1:], align_corners)


def has_kernel(x: Tensor) -> bool:
    """Whether the Triton kernel sums products like this tensor."""
    return x.is_cuda and x.dtype != torch.float64 and HAS_TRITON


def _add_resized_products(
    out_BOHW: Tensor, maps: Sequence[Tensor], weights: Sequence[Tensor], align_corners: bool
) -> Tensor:
    """Both axes are resized and shifted by small matrix products: first the rows of all nine products, then columns."""
    batch, out_channels, height, width = out_BOHW.shape
    dtype = torch.promote_types(out_BOHW.dtype, torch.float32)
    total = out_BOHW.to(dtype).view(batch * out_channels, height, width)
    for x_BIhw, weight_OITT in zip(maps, weights):
        h, w = x_BIhw.shape[2:]
        columns_TwW = shifted_interpolation(w, width, align_corners, total).mT
        rows_HTh = shifted_interpolation(h, height, align_corners, total).transpose(0, 1)
        weight_XI = weight_OITT.permute(3, 0, 2, 1).flatten(0, 2)  # X: column tap, output channel, row tap
        products_BTXw = (weight_XI @ x_BIhw.flatten(2)).to(dtype).view(batch, 3, out_channels * 3 * h, w)
        shifted_BXW = torch.bmm(products_BTXw[:, 0], columns_TwW[0].expand(batch, -1, -1))
        for tap in (1, 2):
            shifted_BXW.baddbmm_(products_BTXw[:, tap], columns_TwW[tap].expand(batch, -1, -1))
        shifted = shifted_BXW.view(batch * out_channels, 3 * h, width)
        total.baddbmm_(rows_HTh.flatten(1).expand(batch * out_channels, -1, -1), shifted)
    return total.view(out_BOHW.shape).to(out_BOHW.dtype)


def shifted_interpolation(size: int, full_size: int, align_corners: bool, like: Tensor) -> Tensor:
    """(3, full_size, size); tap t of output i reads ``matrix[t, i] @ line``, zero beyond the resized line."""
    line = torch.eye(size, dtype=like.dtype, device=like.device)[None]
    matrix = F.interpolate(line, size=full_size, mode="linear", align_corners=align_corners)[0].T
    return F.pad(matrix, (0, 0, 1, 1)).unfold(0, full_size, 1).transpose(1, 2)
