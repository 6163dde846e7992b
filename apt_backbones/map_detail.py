"""A new layer for feature maps: how the cells of a merged patch differ."""

import torch
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
        self.down = nn.Linear(embed_dim, width)
        self.near = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.mix = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.out = nn.Linear(width, embed_dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, map_BDHW: Tensor) -> Tensor:
        """(B, D, H, W) of a map (B, D, H, W) of features of any scale; fastest if it is channels-last in memory."""
        map_BHWD = map_BDHW.permute(0, 2, 3, 1)
        x_BHWC = self.down(F.layer_norm(map_BHWD, map_BHWD.shape[-1:]))
        x_BHWC = F.gelu(x_BHWC + self.near(x_BHWC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        for mix in self.mix:
            x_BHWC = F.gelu(mix(x_BHWC))
        # The standard deviation, on a CPU much faster than ``std`` and with a gradient where it is zero.
        centered_BHWD = map_BHWD - map_BHWD.mean(-1, keepdim=True)
        spread_BHW1 = torch.linalg.vector_norm(centered_BHWD, dim=-1, keepdim=True) / map_BHWD.shape[-1] ** 0.5
        return (self.out(x_BHWC) * spread_BHW1).permute(0, 3, 1, 2)
