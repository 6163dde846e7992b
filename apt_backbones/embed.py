"""Patches of several sizes to tokens of one width (APT, arXiv 2510.18091, section 3.1).

    embed(P) = E(resize(P, p x p)) + pos(P) + ZeroMLP(ConvDown^i({E(sub-patch) : base sub-patches of P}))

for a patch P of side p * 2^i. E is the host ViT's own patch projection. ConvDown (2x2, stride 2) and ZeroMLP (a
linear layer that starts at zero) are the only new layers, shared by all sizes; until they are trained the result is
that of plain resizing.

Legend: B images, H x W base cells, T tokens, D channels, n patches of one size, p base patch side, f = side / p.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layout import PatchLayout
from .resample import resample_positions
from .scores import DROPPED

MERGE_MODES = ("apt", "resizing", "random")


class AdaptivePatchEmbed(nn.Module):
    """Embed a packed batch of patches.

    Args:
        embed_dim: D.
        merge: "apt" (the formula above); "resizing" (without ConvDown and ZeroMLP: the paper's baseline); "random"
            (base patches only, for layouts made with ``drop_at_random``: the paper's other baseline).
    """

    def __init__(self, embed_dim: int, merge: str = "apt"):
        super().__init__()
        if merge not in MERGE_MODES:
            raise ValueError(f"unknown merge mode {merge!r}; choose one of {', '.join(MERGE_MODES)}")
        self.merge = merge
        if merge == "apt":
            self.conv_down = nn.Conv2d(embed_dim, embed_dim, kernel_size=2, stride=2)
            self.zero_mlp = nn.Linear(embed_dim, embed_dim)
            nn.init.zeros_(self.zero_mlp.weight)
            nn.init.zeros_(self.zero_mlp.bias)

    def forward(self, images: Tensor, layout: PatchLayout, proj: nn.Conv2d, positions: Tensor | None) -> Tensor:
        """Tokens (T, D); zeros for prefix tokens.

        Args:
            images: normalised images (B, 3, H * p, W * p).
            layout: the batch's layout.
            proj: E, a convolution whose kernel and stride are p.
            positions: absolute positions (1, D, H', W') of the base cells, H' >= H and W' >= W, or None.
                Those of a larger patch are resampled from them to its size's grid (bicubic, antialiased).
        """
        cells_BDHW = proj(images)
        tokens_TD = layout.from_map(cells_BDHW)
        if positions is not None:
            positions_HWD = positions[0].permute(1, 2, 0)
            positions_TD = positions_HWD[layout.row_T, layout.column_T]
            if layout.num_prefix:
                positions_TD = positions_TD.masked_fill((layout.side_T == 0)[:, None], 0)
            tokens_TD = tokens_TD + positions_TD
        for size, index in layout.sizes.items():
            if size == layout.patch_size:
                continue
            factor = size // layout.patch_size
            image, row, column = layout.image_T[index], layout.row_T[index], layout.column_T[index]
            at = (row // factor, column // factor)
            merged = self._resized(images, image, *at, proj, size)
            if self.merge == "apt":
                merged = merged + self._detail(cells_BDHW, image, row, column, factor)
            if positions is not None:
                coarse = tuple(side // factor for side in positions_HWD.shape[:2])
                covered = positions_HWD[: coarse[0] * factor, : coarse[1] * factor]
                merged = merged + resample_positions(covered, coarse, antialias=True)[at]
            tokens_TD = tokens_TD.index_copy(0, index, merged.to(tokens_TD.dtype))
        return tokens_TD

    # Nothing below depends on the number n of patches: with n = 0 empty tensors flow through, so that the new layers
    # stay in the graph, as distributed training needs.

    def _resized(
        self, images: Tensor, image: Tensor, row: Tensor, column: Tensor, proj: nn.Conv2d, size: int
    ) -> Tensor:
        """E(resize(P)) (n, D) of all patches of one size; rows and columns count patches of that size."""
        height, width = (side // size for side in images.shape[2:])
        blocks = images[:, :, : height * size, : width * size].unflatten(2, (height, size)).unflatten(4, (width, size))
        pixels = blocks[image, :, row, :, column]
        pixels = F.interpolate(pixels, size=proj.kernel_size, mode="bilinear", align_corners=False)
        return F.linear(pixels.flatten(1), proj.weight.flatten(1), proj.bias)

    def _detail(self, cells_BDHW: Tensor, image: Tensor, row: Tensor, column: Tensor, factor: int) -> Tensor:
        """ZeroMLP(ConvDown^i({E(sub-patch)})) (n, D) of patches of f x f cells; rows and columns count cells."""
        step = torch.arange(factor, device=row.device)
        rows, columns = row[:, None, None] + step[:, None], column[:, None, None] + step
        detail = cells_BDHW.permute(0, 2, 3, 1)[image[:, None, None], rows, columns]
        while detail.shape[1] > 1:
            detail = self._conv_down(detail)
        return self.zero_mlp(detail[:, 0, 0])

    def _conv_down(self, detail_nffD: Tensor) -> Tensor:
        """ConvDown (n, f, f, D) -> (n, f / 2, f / 2, D), as a matrix product: on a CPU several times faster."""
        fours = detail_nffD.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).transpose(2, 3).flatten(3)
        return F.linear(fours, self.conv_down.weight.permute(0, 2, 3, 1).flatten(1), self.conv_down.bias)


def drop_at_random(sides_BHW: Tensor, patch_size: int) -> Tensor:
    """The paper's random baseline: per image as many base patches as the selection has patches, the rest dropped.

    Which cells go first is a fixed random order per grid shape, so that a result does not depend on the batch, the
    device or the state of a generator. Build the layout with ``fill_dropped=True``.

    Args:
        sides_BHW: a selection, as ``select_patches`` gives.
        patch_size: side of the base patch in pixels.

    Returns:
        sides_BHW with ``patch_size`` where a cell is kept and ``DROPPED`` elsewhere; what was dropped stays so.
    """
    height, width = sides_BHW.shape[1:]
    num_patches_B = (patch_size / sides_BHW).square().where(sides_BHW > 0, 0).sum((1, 2)).round()  # n cells: n / n
    order_HW = _drop_order(height, width, sides_BHW.device)
    order_BN = order_HW.where(sides_BHW != DROPPED, height * width).flatten(1)
    rank_BHW = order_BN.argsort(1).argsort(1).view_as(sides_BHW)
    is_kept_BHW = (rank_BHW < num_patches_B[:, None, None]) | (sides_BHW < 0)
    return sides_BHW.clamp(max=patch_size).where(is_kept_BHW, DROPPED)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _drop_order(height: int, width: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(height * width, generator=generator).view(height, width).to(device)
