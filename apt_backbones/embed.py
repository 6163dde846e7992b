"""Patches of several sizes to tokens of one width (APT, arXiv 2510.18091, section 3.1).

    embed(P) = E(resize(P, p x p)) + pos(P) + ZeroMLP(ConvDown^i({E(sub-patch) : base sub-patches of P}))

for a patch P of side p * 2^i. E is the host ViT's own patch projection. ConvDown (2x2, stride 2) and ZeroMLP (a
linear layer that starts at zero) are the only new layers, shared by all sizes; until they are trained the result is
that of plain resizing.

Legend: B images, H x W base cells, T tokens, D channels, n patches of one size, p base patch side, f = side / p.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layout import PatchLayout
from .resample import resample_positions
from .selection import MERGE_MODES, check_choice


class AdaptivePatchEmbed(nn.Module):
    """Embed a packed batch of patches.

    Args:
        embed_dim: D.
        merge: "apt" (the formula above); "resizing" (without ConvDown and ZeroMLP: the paper's baseline); "random"
            (base patches only, for layouts made with ``drop_at_random``: the paper's other baseline). For the paper's
            ablation (its table 7): "apt_random_init" (ZeroMLP starts as any linear layer) and "apt_residual" (no
            ZeroMLP: the output of ConvDown is added as it is).
    """

    def __init__(self, embed_dim: int, merge: str = "apt"):
        super().__init__()
        self.merge = check_choice("merge mode", merge, MERGE_MODES)
        self.has_detail = merge.startswith("apt")
        if self.has_detail:
            self.conv_down = nn.Conv2d(embed_dim, embed_dim, kernel_size=2, stride=2)
            self.zero_mlp = nn.Identity() if merge == "apt_residual" else nn.Linear(embed_dim, embed_dim)
        if merge == "apt":
            nn.init.zeros_(self.zero_mlp.weight)
            nn.init.zeros_(self.zero_mlp.bias)

    def forward(self, images: Tensor, layout: PatchLayout, proj: nn.Conv2d, positions: Tensor | None) -> Tensor:
        """Tokens (T, D), of which prefix tokens are for the caller to fill in.

        Args:
            images: normalized images (B, 3, H * p, W * p).
            layout: the batch's layout.
            proj: E, a convolution whose kernel and stride are p.
            positions: absolute positions (1, D, H', W') of the base cells, H' >= H and W' >= W, or None.
                Those of a larger patch are resampled from them to its size's grid (bicubic, antialiased).
        """
        cells_BDHW = proj(images)
        tokens_TD = layout.from_map(cells_BDHW)
        if positions is not None:
            positions_HWD = positions[0].permute(1, 2, 0)
            tokens_TD = tokens_TD + positions_HWD[layout.row_T, layout.column_T]
        for size, index in layout.sizes.items():
            if size == layout.patch_size:
                continue
            factor = size // layout.patch_size
            image, row, column = layout.image_T[index], layout.row_T[index], layout.column_T[index]
            at = (row // factor, column // factor)
            merged = self._resized(images, image, *at, proj, size, layout.patch_size)
            if self.has_detail:
                merged = merged + self._detail(cells_BDHW, image, row, column, factor)
            coarse = () if positions is None else tuple(side // factor for side in positions_HWD.shape[:2])
            if coarse and all(coarse):  # or else there are no patches of this size
                covered = positions_HWD[: coarse[0] * factor, : coarse[1] * factor]
                merged = merged + resample_positions(covered, coarse, antialias=True)[at]
            tokens_TD = tokens_TD.index_copy(0, index, merged.to(tokens_TD.dtype))
        return tokens_TD

    # Nothing below depends on the number n of patches: with n = 0 empty tensors flow through, so that the new layers
    # stay in the graph, as distributed training needs.

    def _resized(
        self, images: Tensor, image: Tensor, row: Tensor, column: Tensor, proj: nn.Module, size: int, patch_size: int
    ) -> Tensor:
        """E(resize(P)) (n, D) of all patches of one size; rows and columns count patches of that size."""
        height, width = (side // size for side in images.shape[2:])
        blocks = images[:, :, : height * size, : width * size].unflatten(2, (height, size)).unflatten(4, (width, size))
        pixels = blocks[image, :, row, :, column]
        pixels = F.interpolate(pixels, size=(patch_size, patch_size), mode="bilinear", align_corners=False)
        if type(proj) is not nn.Conv2d:  # an adapter's weight is not all that it computes with
            return proj(pixels).flatten(1)
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
