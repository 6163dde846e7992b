"""The sum over shifts and resized positions of ``resized_conv`` on a GPU, in one pass over the output.

A program owns four output rows, some columns and channels. It reads every row of products that these need once,
resizes it along the columns and adds it to each of the four rows; all maps are added in registers, in float32.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS, CHANNELS, ROWS = 8, 128, 4  # of a program: one 16-byte load per thread and row of products


def add_resized_products(
    out_BOHW: Tensor, maps: Sequence[Tensor], weights: Sequence[Tensor], align_corners: bool
) -> Tensor:
    """Add to ``out_BOHW`` (channels last), in place, the 3x3 convolutions of ``maps`` resized to its size."""
    products = []
    for x_BIhw, weight_OITT in zip(maps, weights):
        weight_IX = weight_OITT.permute(2, 3, 0, 1).flatten(0, 2).mT  # X: row tap, column tap, output channel
        products.append((x_BIhw.flatten(2).mT @ weight_IX).unflatten(1, x_BIhw.shape[2:]))
    _add_shifted(out_BOHW, products, align_corners)
    return out_BOHW


@torch.library.custom_op("apt_backbones::add_shifted", mutates_args=("out_BOHW",))  # opaque to torch.compile
def _add_shifted(out_BOHW: Tensor, products_BhwX: Sequence[Tensor], align_corners: bool) -> None:
    batch, channels, height, width = out_BOHW.shape
    block = min(CHANNELS, triton.next_power_of_2(channels))
    grid = (triton.cdiv(width, COLUMNS), triton.cdiv(height, ROWS) * batch, triton.cdiv(channels, block))
    sizes = tuple(tuple(x.shape[1:3]) for x in products_BhwX)
    products = tuple(x.contiguous() for x in products_BhwX)
    _add_kernel[grid](
        out_BOHW, products, sizes, height, width, channels, ALIGN=align_corners, COLUMNS=COLUMNS, CHANNELS=block
    )


@triton.jit
def _neighbours(position, size, full_size, ALIGN: tl.constexpr):
    """Both neighbours of positions in a line resized from ``size``, and their weights: zero beyond its ends."""
    if ALIGN:
        source = tl.maximum(position, 0) * ((size - 1) / tl.maximum(full_size - 1, 1))
    else:
        source = tl.maximum((position + 0.5) * (size / full_size) - 0.5, 0.0)
    first = tl.minimum(source.to(tl.int32), size - 1)
    share = source - first
    inside = (position >= 0) & (position < full_size)
    return first, tl.minimum(first + 1, size - 1), tl.where(inside, 1 - share, 0.0), tl.where(inside, share, 0.0)


@triton.jit
def _weight(row, position, size, full_size, ALIGN: tl.constexpr):
    """Weight of a row of the small map at a position of the resized one."""
    first, second, weight_first, weight_second = _neighbours(position, size, full_size, ALIGN)
    return tl.where(row == first, weight_first, 0.0) + tl.where(row == second, weight_second, 0.0)


@triton.jit
def _add_kernel(
    out_ptr,
    products,
    sizes,
    height,
    width,
    channels,
    ALIGN: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    row_groups = tl.cdiv(height, 4)
    image = (tl.program_id(1) // row_groups).to(tl.int64)
    y = (tl.program_id(1) % row_groups) * 4
    x = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    c = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = (c < channels)[None, :]

    sum_0 = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    sum_1 = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    sum_2 = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    sum_3 = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    for level in tl.static_range(len(products)):
        h, w = sizes[level][0], sizes[level][1]
        first_row, _, _, _ = _neighbours(tl.maximum(y - 1, 0), h, height, ALIGN)
        _, last_row, _, _ = _neighbours(tl.minimum(y + 4, height - 1), h, height, ALIGN)
        for row in range(first_row, last_row + 1):
            for tap_y in tl.static_range(3):
                line = tl.zeros((COLUMNS, CHANNELS), tl.float32)
                for tap_x in tl.static_range(3):
                    first, second, weight_first, weight_second = _neighbours(x + tap_x - 1, w, width, ALIGN)
                    tap = products[level] + (image * h + row) * w * 9 * channels + (tap_y * 3 + tap_x) * channels
                    tap_first = tap + first[:, None] * 9 * channels + c[None, :]
                    tap_second = tap + second[:, None] * 9 * channels + c[None, :]
                    line += weight_first[:, None] * tl.load(tap_first, is_channel, 0.0).to(tl.float32)
                    line += weight_second[:, None] * tl.load(tap_second, is_channel, 0.0).to(tl.float32)
                sum_0 += _weight(row, y + tap_y - 1, h, height, ALIGN) * line
                sum_1 += _weight(row, y + tap_y, h, height, ALIGN) * line
                sum_2 += _weight(row, y + tap_y + 1, h, height, ALIGN) * line
                sum_3 += _weight(row, y + tap_y + 2, h, height, ALIGN) * line

    is_inside = (x < width)[:, None] & is_channel
    pointer = out_ptr + ((image * height + y) * width + x[:, None]) * channels + c[None, :]
    step = width * channels
    _add(pointer, sum_0, is_inside & (y < height))
    _add(pointer + step, sum_1, is_inside & (y + 1 < height))
    _add(pointer + 2 * step, sum_2, is_inside & (y + 2 < height))
    _add(pointer + 3 * step, sum_3, is_inside & (y + 3 < height))


@triton.jit
def _add(pointer, value, mask):
    value += tl.load(pointer, mask, 0.0).to(tl.float32)
    tl.store(pointer, value.to(pointer.dtype.element_ty), mask)
