"""A new layer for feature maps: how the cells of a merged patch differ."""

import torch.nn.functional as F
from torch import Tensor, nn


class MapDetail(nn.Module):
    """What is added in each cell of a merged patch, predicted from the interpolated map. Zero until it is trained.

    Args:
        embed_dim: channels D of the map.
        width: channels that the map is reduced to.
    """

    def __init__(self, embed_dim: int, width: int = 64):
        super().__init__()
        self.down = nn.Conv2d(embed_dim, width, 1)
        self.near = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.mix = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(2))
        self.out = nn.Conv2d(width, embed_dim, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, map_BDHW: Tensor) -> Tensor:
        """(B, D, H, W) of a map (B, D, H, W) of features of any scale."""
        x = self.down(F.layer_norm(map_BDHW.movedim(1, -1), map_BDHW.shape[1:2]).movedim(-1, 1))
        x = F.gelu(x + self.near(x))
        for mix in self.mix:
            x = F.gelu(mix(x))
        return self.out(x) * map_BDHW.std(1, keepdim=True)
