"""Where every token of a batch of variable-length sequences comes from, and how they are packed (APT, section 3).

Legend: B images, H x W base cells per image, T tokens of the whole batch, D channels, P prefix (CLS) tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from .scores import DROPPED


@dataclass(frozen=True)
class Segments:
    """Contiguous runs of packed tokens that attend to each other, and to nothing else.

    Attributes:
        cu_seqlens: int32 device tensor (S + 1,): segment s holds tokens cu_seqlens[s] .. cu_seqlens[s + 1] - 1.
        lengths: the S lengths as Python ints; a window whose cells were all dropped has length 0.
    """

    cu_seqlens: Tensor
    lengths: tuple[int, ...]

    @cached_property
    def max_length(self) -> int:
        return max(self.lengths)

    @property
    def equal(self) -> bool:
        """Whether all segments have the same length, so that attention is one batched product."""
        return len(set(self.lengths)) == 1


@dataclass(frozen=True)
class PatchLayout:
    """Immutable description of a packed batch; the one thing embedding, attention, heads and reports share.

    Tokens are ordered by (image, window, row, column) of their top-left base cell, so that every window and every
    image is one contiguous run; with one window per image that is raster order. Each image's run is headed by its
    prefix tokens. Build one with ``PatchLayout.build`` or, without any merging, ``PatchLayout.dense``.

    Attributes:
        patch_size: side of a base cell in pixels.
        grid: (H, W) in base cells.
        window: side of an attention window in base cells, or None for one window per image.
        num_prefix: prefix tokens per image.
        image_T: int64 image index of every token.
        row_T, column_T: int64 top-left base cell of every token; -1 for prefix tokens.
        side_T: int64 side in pixels of every token's patch; 0 for prefix tokens.
        token_BHW: int64 packed index of the token that covers each base cell; -1 where there is none.
        num_empty: how many cells of the batch have no token.
        images: segments of whole images (global attention).
        windows: segments of windows; the same object as ``images`` if ``window`` is None.
        sizes: side in pixels -> packed indices (int64) of the tokens of that side, base size first.
    """

    patch_size: int
    grid: tuple[int, int]
    window: int | None
    num_prefix: int
    image_T: Tensor
    row_T: Tensor
    column_T: Tensor
    side_T: Tensor
    token_BHW: Tensor
    num_empty: int
    images: Segments
    windows: Segments
    sizes: dict[int, Tensor]

    @classmethod
    def build(
        cls,
        sides_BHW: Tensor,
        patch_size: int,
        sizes: Sequence[int] = (),
        window: int | None = None,
        num_prefix: int = 0,
        fill_dropped: bool = False,
    ) -> "PatchLayout":
        """Layout of a selection; waits for the device once, to learn the lengths.

        Args:
            sides_BHW: int64, side in pixels of the patch that covers each base cell (``select_patches``); 0 for
                cells that get no token.
            patch_size: side of a base cell in pixels.
            sizes: the merged sizes that may occur, each twice the one before.
            window: side of an attention window in base cells; None for one window per image. A grid that is no
                multiple of the window has smaller last windows.
            num_prefix: prefix tokens per image; only without windows.
            fill_dropped: let a dropped cell repeat the nearest token before it (in packed order, in its image)
                instead of being empty.

        Raises:
            ValueError: the window is no multiple of the largest patch, an image has NaN or infinite pixels, a side
                occurs that is not listed, or prefix tokens are combined with windows.
        """
        all_sizes = (patch_size, *sizes)
        check_window(window, max(all_sizes), patch_size, num_prefix)
        batch, height, width = sides_BHW.shape
        device = sides_BHW.device
        order_N, ends_W = _window_order(height, width, window, device)

        row_H1 = torch.arange(height, device=device)[:, None]
        column_W = torch.arange(width, device=device)
        factor_BHW = torch.div(sides_BHW, patch_size, rounding_mode="floor").clamp_(min=1)
        top_BHW = row_H1 - row_H1 % factor_BHW
        left_BHW = column_W - column_W % factor_BHW
        is_head_BHW = (top_BHW == row_H1) & (left_BHW == column_W) & (sides_BHW > 0)
        # Number of patch tokens up to and including each cell, counted in packed order.
        count_BN = is_head_BHW.flatten(1)[:, order_N].flatten().cumsum(0).view(batch, -1)
        ends_BW = count_BN[:, ends_W]

        is_head_SBHW = (sides_BHW == _as_tensor(all_sizes, device)[:, None, None, None]) & is_head_BHW
        size_counts_S = is_head_SBHW.flatten(1).sum(1)
        not_finite_B = (sides_BHW < 0).flatten(1).any(1)
        report = torch.cat([ends_BW.flatten(), size_counts_S, not_finite_B]).tolist()  # the one wait for the device
        ends, report = report[: ends_BW.numel()], report[ends_BW.numel() :]
        size_counts, not_finite = report[: len(all_sizes)], report[len(all_sizes) :]
        if any(not_finite):
            bad = [image for image, is_bad in enumerate(not_finite) if is_bad]
            raise ValueError(f"images {bad} of the batch have NaN or infinite pixels")
        if sum(size_counts) != ends[-1]:
            raise ValueError(f"the selection holds patch sides other than {all_sizes}")

        image_ends = ends[len(ends_W) - 1 :: len(ends_W)]
        image_lengths = tuple(end - start + num_prefix for start, end in zip([0, *image_ends], image_ends))
        image_B = torch.arange(batch, device=device)
        images = Segments(_starts_and_end(ends_BW[:, -1] + (image_B + 1) * num_prefix), image_lengths)
        windows = images
        if window is not None:
            lengths = tuple(end - start for start, end in zip([0, *ends], ends))
            windows = Segments(_starts_and_end(ends_BW.flatten()), lengths)

        # Packed index of the token headed by each cell, behind the prefixes of this and all earlier images.
        count_BHW = torch.empty_like(count_BN).index_copy_(1, order_N, count_BN).view(batch, height, width)
        index_BHW = count_BHW - 1 + (image_B[:, None, None] + 1) * num_prefix
        token_BHW = index_BHW[image_B[:, None, None], top_BHW, left_BHW]
        num_empty = sides_BHW.numel() - sum(
            count * (size // patch_size) ** 2 for size, count in zip(all_sizes, size_counts)
        )
        if fill_dropped:  # the count at a dropped cell is already that of the token before it
            first_B = images.cu_seqlens[:-1].long() + num_prefix
            token_BHW, num_empty = token_BHW.maximum(first_B[:, None, None]), 0
        elif num_empty:
            token_BHW.masked_fill_(sides_BHW == DROPPED, -1)

        # Cells that head no token write to an extra slot: unlike a boolean index, this needs no wait.
        num_tokens, num_patches = sum(image_lengths), sum(size_counts)
        cell_T = torch.full((num_tokens + 1,), -1, device=device)
        slot_BHW = torch.where(is_head_BHW, index_BHW, num_tokens)
        cell_T = cell_T.scatter_(0, slot_BHW.flatten(), torch.arange(slot_BHW.numel(), device=device))[:-1]
        place_T = cell_T % (height * width)
        row_T, column_T = place_T // width, place_T % width
        side_T = sides_BHW.flatten()[cell_T]
        if num_prefix:
            is_prefix_T = cell_T < 0
            row_T, column_T = row_T.masked_fill(is_prefix_T, -1), column_T.masked_fill(is_prefix_T, -1)
            side_T = side_T.masked_fill(is_prefix_T, 0)
        # All sizes' tokens, one size behind the other.
        is_head_N = is_head_SBHW.flatten()
        rank_N = torch.where(is_head_N, is_head_N.cumsum(0) - 1, num_patches)
        tokens = torch.empty(num_patches + 1, dtype=torch.int64, device=device)
        tokens = tokens.scatter_(0, rank_N, index_BHW.expand(is_head_SBHW.shape).flatten())[:-1]

        return cls(
            patch_size=patch_size,
            grid=(height, width),
            window=window,
            num_prefix=num_prefix,
            image_T=torch.repeat_interleave(image_B, images.cu_seqlens.diff(), output_size=num_tokens),
            row_T=row_T,
            column_T=column_T,
            side_T=side_T,
            token_BHW=token_BHW,
            num_empty=num_empty,
            images=images,
            windows=windows,
            sizes=dict(zip(all_sizes, tokens.split(size_counts))),
        )

    @classmethod
    def dense(
        cls,
        batch_size: int,
        grid: tuple[int, int],
        patch_size: int,
        window: int | None = None,
        num_prefix: int = 0,
        device: torch.device | str = "cpu",
    ) -> "PatchLayout":
        """Layout in which every base cell is a token of its own. Depends on shapes only, so it is built once."""
        return _dense_layout(batch_size, grid, patch_size, window, num_prefix, torch.device(device))

    @property
    def batch_size(self) -> int:
        return len(self.images.lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole batch, prefix tokens included."""
        return len(self.image_T)

    @property
    def num_patches(self) -> tuple[int, ...]:
        """Patch tokens per image, without prefix tokens."""
        return tuple(length - self.num_prefix for length in self.images.lengths)

    def to_map(self, tokens_TD: Tensor) -> Tensor:
        """Repeat every token over the cells that it covers (APT, section 3.3): (T, D) -> (B, D, H, W).

        Cells without a token are zero, prefix tokens are left out. Differentiable. The map is channels-last in memory,
        which is how one gather writes it.
        """
        index = self.token_BHW.flatten()
        cells = tokens_TD.index_select(0, index.clamp(min=0) if self.num_empty else index)
        if self.num_empty:
            cells = cells.masked_fill((index < 0)[:, None], 0)
        return cells.view(*self.token_BHW.shape, -1).permute(0, 3, 1, 2)

    def from_map(self, map_BDHW: Tensor) -> Tensor:
        """Read every token at its top-left cell: (B, D, H, W) -> (T, D); zeros for prefix tokens.

        The inverse of ``to_map`` for maps that are constant over each patch.
        """
        tokens_TD = map_BDHW[self.image_T, :, self.row_T, self.column_T]
        return tokens_TD if not self.num_prefix else tokens_TD.masked_fill((self.side_T == 0)[:, None], 0)

    def split(self, tokens_TD: Tensor) -> list[Tensor]:
        """Per image its patch tokens (n_i, D), in packed order and without prefix tokens."""
        return [tokens[self.num_prefix :] for tokens in tokens_TD.split(self.images.lengths)]


def check_window(window: int | None, largest: int, patch_size: int, num_prefix: int = 0) -> None:
    """Raise unless every patch lies in exactly one window; sides of window in cells, of patches in pixels."""
    if window is None:
        return
    if window < 1 or window * patch_size % largest:
        raise ValueError(
            f"the window side of {window} cells ({window * patch_size} pixels) is no multiple of the largest patch, "
            f"{largest} pixels; choose another window or leave out thresholds of the larger sizes"
        )
    if num_prefix:
        raise ValueError("prefix tokens belong to no window; use window=None with them")


def _starts_and_end(ends: Tensor) -> Tensor:
    return torch.cat([ends.new_zeros(1), ends]).to(torch.int32)


# What is kept must be usable in training, even if the first to ask for it was in inference mode.
@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _as_tensor(values: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _window_order(height: int, width: int, window: int | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cells of one image in (window, row, column) order (H * W,), and each window's last place in it (windows,)."""
    window = window or max(height, width)
    row = torch.arange(height)[:, None].expand(height, width)
    column = torch.arange(width).expand(height, width)
    window_HW = row // window * -(-width // window) + column // window
    order = window_HW.flatten().argsort(stable=True)
    ends = window_HW.flatten().bincount().cumsum(0) - 1
    return order.to(device), ends.to(device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _dense_layout(batch_size, grid, patch_size, window, num_prefix, device) -> PatchLayout:
    sides_BHW = torch.full((batch_size, *grid), patch_size, device=device)
    return PatchLayout.build(sides_BHW, patch_size, window=window, num_prefix=num_prefix)
