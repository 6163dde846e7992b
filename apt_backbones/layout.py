"""Where every token of a batch of variable-length sequences comes from, and how they are packed (APT, section 3).

Legend: B images, H x W base cells per image, T tokens of the whole batch, D channels, P prefix (CLS, register) tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .resample import along_axes
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

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> "Segments":
        """Segments of the given lengths."""
        ends = torch.tensor([0, *lengths], device=device).cumsum(0)
        return cls(ends.to(torch.int32), tuple(lengths))

    @classmethod
    def of_ends(cls, ends_BW: Tensor, ends: Sequence[Sequence[int]]) -> "Segments":
        """Segments that end before the given tokens, known on the device and on the host."""
        ends = [end for row in ends for end in row]
        cu_seqlens = F.pad(ends_BW.flatten(), (1, 0)).to(torch.int32)
        return cls(cu_seqlens, tuple(end - start for start, end in zip([0, *ends], ends)))

    @cached_property
    def max_length(self) -> int:
        return max(self.lengths)


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
        side_BHW: int64 side in pixels of the patch over each base cell; 0 where the cell was dropped.
        token_BHW: int64 packed index of the token that covers each base cell; -1 where there is none.
        num_empty: how many cells of the batch have no token.
        images: segments of whole images (global attention).
        windows: segments of windows; the same object as ``images`` if ``window`` is None. Prefix tokens belong to no
            window: those of an image attend to each other only.
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
    side_BHW: Tensor
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
        """Layout of a selection; one host-device synchronization, to learn the lengths.

        Args:
            sides_BHW: int64, side in pixels of the patch that covers each base cell (``select_patches``); 0 for
                cells that get no token.
            patch_size: side of a base cell in pixels.
            sizes: the merged sizes that may occur, each twice the one before.
            window: side of an attention window in base cells; None for one window per image. A grid that is not a
                multiple of the window has smaller last windows.
            num_prefix: prefix tokens per image.
            fill_dropped: let a dropped cell repeat the nearest token before it (in packed order, in its image)
                instead of being empty.

        Raises:
            ValueError: the window is not a multiple of the largest patch, an image has NaN or infinite pixels, or a
                side occurs that is not listed.
        """
        all_sizes = (patch_size, *sizes)
        check_window(window, max(all_sizes), patch_size)
        batch, height, width = sides_BHW.shape
        device = sides_BHW.device
        image_B = torch.arange(batch, device=device)
        order_N, ends_W = _window_order(height, width, window, device)
        top_BHW, left_BHW, is_head_BHW = _patch_heads(sides_BHW, patch_size)
        # Number of patch tokens up to and including each cell, counted in packed order.
        count_BN = is_head_BHW.flatten(1)[:, order_N].flatten().cumsum(0).view(batch, -1)
        ends_BW = count_BN[:, ends_W]
        is_head_SBHW = (sides_BHW == _as_tensor(all_sizes, device)[:, None, None, None]) & is_head_BHW
        ends, size_counts = _read_counts(ends_BW, is_head_SBHW, sides_BHW, all_sizes)

        image_ends_B = ends_BW[:, -1:] + (image_B[:, None] + 1) * num_prefix
        images = Segments.of_ends(image_ends_B, [[row[-1] + (i + 1) * num_prefix] for i, row in enumerate(ends)])
        windows = images if window is None else _window_segments(ends_BW, ends, num_prefix)

        # Packed index of the token headed by each cell, behind the prefixes of this and all earlier images.
        count_BHW = torch.empty_like(count_BN).index_copy_(1, order_N, count_BN).view(batch, height, width)
        index_BHW = count_BHW - 1 + (image_B[:, None, None] + 1) * num_prefix
        token_BHW = index_BHW[image_B[:, None, None], top_BHW, left_BHW]
        num_covered = sum(count * (size // patch_size) ** 2 for size, count in zip(all_sizes, size_counts))
        num_empty = sides_BHW.numel() - num_covered
        if fill_dropped:  # the count at a dropped cell is already that of the token before it
            first_B = images.cu_seqlens[:-1].long() + num_prefix
            token_BHW, num_empty = token_BHW.maximum(first_B[:, None, None]), 0
        elif num_empty:
            token_BHW.masked_fill_(sides_BHW == DROPPED, -1)

        num_tokens = sum(images.lengths)
        row_T, column_T, side_T = _token_places(sides_BHW, is_head_BHW, index_BHW, num_tokens, num_prefix)
        return cls(
            patch_size=patch_size,
            grid=(height, width),
            window=window,
            num_prefix=num_prefix,
            image_T=torch.repeat_interleave(image_B, images.cu_seqlens.diff(), output_size=num_tokens),
            row_T=row_T,
            column_T=column_T,
            side_T=side_T,
            side_BHW=sides_BHW,
            token_BHW=token_BHW,
            num_empty=num_empty,
            images=images,
            windows=windows,
            sizes=dict(zip(all_sizes, _tokens_by_size(is_head_SBHW, index_BHW, size_counts))),
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
    def is_prefix_T(self) -> Tensor:
        """Which tokens are prefix tokens, bool (T,)."""
        return self.side_T == 0

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

    def refine(self, map_BDHW: Tensor, scale: int) -> Tensor:
        """Repeat every cell of a map over ``scale`` x ``scale`` finer cells."""
        if scale == 1:
            return map_BDHW
        cells_BHWD = map_BDHW.permute(0, 2, 3, 1)  # channels-last in memory, as maps of to_map are
        repeated = cells_BHWD[:, :, None, :, None].expand(-1, -1, scale, -1, scale, -1)
        return repeated.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)

    def interpolate(self, map_BDHW: Tensor) -> Tensor:
        """Interpolate a map of ``to_map`` within merged patches: their cells approach those around them, while the mean
        of every patch stays the token's."""
        if not self._factors:
            return map_BDHW
        return self.add_detail(map_BDHW, self._means_around(map_BDHW, 1, max(1, max(self._factors) // 2)))

    def add_detail(self, map_BDHW: Tensor, detail_BDHW: Tensor) -> Tensor:
        """Add to the cells of every merged patch what a second map holds there, less its mean over the patch."""
        mean_BDHW = detail_BDHW
        for factor in self._factors:
            means = self.refine(F.avg_pool2d(detail_BDHW, factor), factor)
            rest = [whole - part for whole, part in zip(map_BDHW.shape[2:], means.shape[2:])]
            mean_BDHW = torch.where(self._factor_B1HW == factor, F.pad(means, (0, rest[1], 0, rest[0])), mean_BDHW)
        return torch.where(self._factor_B1HW > 1, detail_BDHW + (map_BDHW - mean_BDHW), map_BDHW)

    def finer(self, map_BDHW: Tensor, scale: int) -> Tensor:
        """A map on the base cells interpolated on cells ``scale`` times finer, whose mean stays the base cell's. Where
        there is no token it stays as it is."""
        if scale == 1:
            return map_BDHW
        near_BDHW = self._means_around(map_BDHW, scale, 1)
        fine = near_BDHW.unflatten(3, (-1, scale)).unflatten(2, (-1, scale))
        moved_BDHW = map_BDHW - F.avg_pool2d(near_BDHW, scale)
        finer_BDHW = (fine + moved_BDHW[:, :, :, None, :, None]).flatten(4).flatten(2, 3)
        if not self.num_empty:
            return finer_BDHW
        has_token_B1HW = self.refine((self.token_BHW >= 0)[:, None], scale)
        return torch.where(has_token_B1HW, finer_BDHW, self.refine(map_BDHW, scale))

    def _means_around(self, map_BDHW: Tensor, scale: int, times: int) -> Tensor:
        """Means of every cell and its neighbours that have a token, on cells ``scale`` times finer, taken ``times``
        times (B, D, H * scale, W * scale)."""
        rows, columns = (_near(cells, scale, times, map_BDHW.device, map_BDHW.dtype) for cells in self.grid)
        near_BHWD = along_axes(map_BDHW.permute(0, 2, 3, 1), rows, columns)
        if self.num_empty:
            has_token_BHW1 = (self.token_BHW >= 0)[..., None].to(map_BDHW.dtype)
            near_BHWD = near_BHWD / along_axes(has_token_BHW1, rows, columns).clamp(min=1e-3)
        return near_BHWD.permute(0, 3, 1, 2)

    @cached_property
    @torch.inference_mode(False)  # a dense layout is kept, and may be used in training later
    def is_merged_T1(self) -> Tensor:
        """Which tokens are those of merged patches."""
        return (self.side_T > self.patch_size)[:, None]

    @cached_property
    def _factor_B1HW(self) -> Tensor:
        """Side in cells of the patch over each cell; 0 where there is none."""
        return (self.side_BHW // self.patch_size)[:, None]

    @property
    def _factors(self) -> list[int]:
        """Sides in cells of the merged patches that fit in the grid, whichever occur: results do not depend on the
        batch."""
        factors = [size // self.patch_size for size in self.sizes]
        return [factor for factor in factors if 1 < factor <= min(self.grid)]

    def from_map(self, map_BDHW: Tensor) -> Tensor:
        """Read every token at its top-left cell: (B, D, H, W) -> (T, D); zeros for prefix tokens.

        The inverse of ``to_map`` for maps that are constant over each patch.
        """
        tokens_TD = map_BDHW[self.image_T, :, self.row_T, self.column_T]
        return tokens_TD if not self.num_prefix else tokens_TD.masked_fill(self.is_prefix_T[:, None], 0)

    def split(self, tokens_TD: Tensor) -> list[Tensor]:
        """Per image its patch tokens (n_i, D), in packed order and without prefix tokens."""
        return [tokens[self.num_prefix :] for tokens in tokens_TD.split(self.images.lengths)]

    def prefix(self, tokens_TD: Tensor) -> Tensor:
        """The images' prefix tokens (B, P, D)."""
        starts_B1 = self.images.cu_seqlens[:-1, None].long()
        return tokens_TD[starts_B1 + torch.arange(self.num_prefix, device=starts_B1.device)]

    def to_sequence(self, tokens_TD: Tensor) -> Tensor:
        """Prefix tokens, then every base cell's token in raster order: (T, D) -> (B, P + H * W, D), as a dense ViT
        has them. Differentiable."""
        cells_BND = self.to_map(tokens_TD).permute(0, 2, 3, 1).flatten(1, 2)
        return torch.cat([self.prefix(tokens_TD), cells_BND], dim=1) if self.num_prefix else cells_BND


def check_window(window: int | None, largest: int, patch_size: int) -> None:
    """Raise unless every patch lies in exactly one window; sides of window in cells, of patches in pixels."""
    if window is not None and (window < 1 or window * patch_size % largest):
        raise ValueError(
            f"the window side of {window} cells ({window * patch_size} pixels) is not a multiple of the largest patch, "
            f"{largest} pixels; choose another window or leave out thresholds of the larger sizes"
        )


def _patch_heads(sides_BHW: Tensor, patch_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row and column of the top-left cell of the patch over each cell, and which cells are that cell themselves."""
    height, width = sides_BHW.shape[1:]
    row_H1 = torch.arange(height, device=sides_BHW.device)[:, None]
    column_W = torch.arange(width, device=sides_BHW.device)
    factor_BHW = torch.div(sides_BHW, patch_size, rounding_mode="floor").clamp_(min=1)
    top_BHW = row_H1 - row_H1 % factor_BHW
    left_BHW = column_W - column_W % factor_BHW
    return top_BHW, left_BHW, (top_BHW == row_H1) & (left_BHW == column_W) & (sides_BHW > 0)


def _read_counts(
    ends_BW: Tensor, is_head_SBHW: Tensor, sides_BHW: Tensor, all_sizes: tuple[int, ...]
) -> tuple[list[list[int]], list[int]]:
    """On the host: patch tokens up to the end of each window, per image; and tokens of each size.

    Raises:
        ValueError: as ``PatchLayout.build``.
    """
    not_finite_B = (sides_BHW < 0).flatten(1).any(1)
    report = torch.cat([ends_BW.flatten(), is_head_SBHW.flatten(1).sum(1), not_finite_B])
    report = report.tolist()  # the one host-device synchronization
    batch, windows = ends_BW.shape
    ends = [report[start : start + windows] for start in range(0, batch * windows, windows)]
    size_counts, not_finite = report[batch * windows : -batch], report[-batch:]
    if any(not_finite):
        bad = [image for image, is_bad in enumerate(not_finite) if is_bad]
        raise ValueError(f"images {bad} of the batch have NaN or infinite pixels")
    if sum(size_counts) != ends[-1][-1]:
        raise ValueError(f"the selection holds patch sides other than {all_sizes}")
    return ends, size_counts


def _window_segments(ends_BW: Tensor, ends: list[list[int]], num_prefix: int) -> Segments:
    """Windows; an image's prefix tokens, which belong to none, are a segment of their own in front of them."""
    if num_prefix:
        prefix_B1 = (torch.arange(len(ends), device=ends_BW.device)[:, None] + 1) * num_prefix
        start_B1 = F.pad(ends_BW[:-1, -1:], (0, 0, 1, 0))
        ends_BW = torch.cat([start_B1, ends_BW], dim=1) + prefix_B1
        starts = [0, *(row[-1] for row in ends)]
        ends = [
            [end + (image + 1) * num_prefix for end in (start, *row)]
            for image, (start, row) in enumerate(zip(starts, ends))
        ]
    return Segments.of_ends(ends_BW, ends)


def _token_places(
    sides_BHW: Tensor, is_head_BHW: Tensor, index_BHW: Tensor, num_tokens: int, num_prefix: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Top-left row and column and the side of every token."""
    height, width = sides_BHW.shape[1:]
    # Cells that head no token write to an extra slot: unlike a boolean index, this needs no synchronization.
    cell_T = torch.full((num_tokens + 1,), -1, device=sides_BHW.device)
    slot_BHW = torch.where(is_head_BHW, index_BHW, num_tokens)
    cell_T = cell_T.scatter_(0, slot_BHW.flatten(), torch.arange(slot_BHW.numel(), device=cell_T.device))[:-1]
    place_T = cell_T % (height * width)
    row_T, column_T, side_T = place_T // width, place_T % width, sides_BHW.flatten()[cell_T]
    if num_prefix:
        is_prefix_T = cell_T < 0
        row_T, column_T = row_T.masked_fill(is_prefix_T, -1), column_T.masked_fill(is_prefix_T, -1)
        side_T = side_T.masked_fill(is_prefix_T, 0)
    return row_T, column_T, side_T


def _tokens_by_size(is_head_SBHW: Tensor, index_BHW: Tensor, size_counts: list[int]) -> tuple[Tensor, ...]:
    """Packed indices of the tokens of each size."""
    is_head_N, num_patches = is_head_SBHW.flatten(), sum(size_counts)
    rank_N = torch.where(is_head_N, is_head_N.cumsum(0) - 1, num_patches)
    tokens = torch.empty(num_patches + 1, dtype=torch.int64, device=index_BHW.device)
    tokens.scatter_(0, rank_N, index_BHW.expand(is_head_SBHW.shape).flatten())
    return tokens[:-1].split(size_counts)


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


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _near(cells: int, scale: int, times: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The mean of every cell and its neighbours, taken several times, on cells ``scale`` times finer, along one axis:
    (cells * scale, cells)."""
    cell = torch.arange(cells * scale)
    mean = ((cell[:, None] - cell).abs() <= 1).double()
    repeated = torch.eye(cells, dtype=torch.float64).repeat_interleave(scale, 0)
    for _ in range(times):
        repeated = mean / mean.sum(1, keepdim=True) @ repeated
    return repeated.to(device, dtype)
