"""Token Merging (ToMe, arXiv 2210.09461) of timm's ViTs: the baseline that merges similar tokens between blocks.

Legend: B images, N tokens, D channels, h heads, d channels of a head, r merges per block.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor


def feature_maps(
    vit: VisionTransformer, images: Tensor, merges: int, indices: Sequence[int]
) -> tuple[list[Tensor], float]:
    """Normed maps (B, D, H, W) after some blocks, those of merged tokens repeated, and the mean tokens of a layer.

    Proportional attention; every block merges ``merges`` tokens after its attention. The mean counts each block's
    tokens before and after merging alike, without the CLS token.
    """
    grid = [side // vit.patch_embed.patch_size[0] for side in images.shape[2:]]
    maps, counts = [], []
    for index, (x_BND, token_of_cell, count) in enumerate(after_blocks(vit, images, merges)):
        counts.append(count)
        if index in indices:
            cells = token_of_cell[..., None].expand(-1, -1, x_BND.shape[2])
            maps.append(vit.norm(x_BND).gather(1, cells).transpose(1, 2).unflatten(2, grid))
    return maps, sum(counts) / len(counts)


def after_blocks(vit: VisionTransformer, images: Tensor, merges: int) -> Iterator[tuple[Tensor, Tensor, float]]:
    """After each block its tokens (B, N, D), prefix tokens first, the token of every base cell (B, cells), and the mean
    of its patch tokens before and after merging."""
    x_BND = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
    num_prefix = vit.num_prefix_tokens
    size_BN = x_BND.new_ones(x_BND.shape[:2])
    token_of_cell = torch.arange(x_BND.shape[1], device=x_BND.device).expand(len(images), -1)[:, num_prefix:]
    for block in vit.blocks:
        attention = block.attn
        q, k, v = attention.qkv(block.norm1(x_BND)).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weight_B11N = size_BN.log()[:, None, None]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=weight_B11N)
        x_BND = x_BND + block.ls1(attention.proj(mixed.transpose(1, 2).flatten(2)))
        before = x_BND.shape[1] - num_prefix
        into_BN = match(k.mean(1), merges, num_prefix)
        x_BND, size_BN = merged(x_BND, size_BN, into_BN)
        token_of_cell = into_BN.gather(1, token_of_cell)
        x_BND = x_BND + block.ls2(block.mlp(block.norm2(x_BND)))
        yield x_BND, token_of_cell, (before + x_BND.shape[1] - num_prefix) / 2


def match(metric_BND: Tensor, merges: int, num_prefix: int) -> Tensor:
    """Bipartite soft matching: where each token goes, int64 (B, N) of 0..N - r - 1; prefix tokens stay the first."""
    batch, count = metric_BND.shape[:2]
    metric = F.normalize(metric_BND, dim=-1)
    metric = metric[:, num_prefix:]
    # Alternate tokens are sources (a) and targets (b).
    a, b = metric[:, ::2], metric[:, 1::2]
    merges = min(merges, a.shape[1])
    best, target = (a @ b.transpose(1, 2)).max(-1)
    source = best.argsort(dim=1, descending=True)[:, :merges]
    is_kept = torch.ones(batch, count, dtype=torch.bool, device=metric.device)
    is_kept.scatter_(1, num_prefix + 2 * source, False)
    place = is_kept.cumsum(1) - 1
    goes_to = torch.arange(count, device=metric.device).repeat(batch, 1)
    goes_to.scatter_(1, num_prefix + 2 * source, num_prefix + 2 * target.gather(1, source) + 1)
    return place.gather(1, goes_to)


def merged(x_BND: Tensor, size_BN: Tensor, into_BN: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens that go to the same place, averaged by their sizes, and the sums of these."""
    batch, _, channels = x_BND.shape
    count = int(into_BN.max()) + 1
    size = size_BN.new_zeros(batch, count).scatter_add_(1, into_BN, size_BN)
    total = x_BND.new_zeros(batch, count, channels)
    total.scatter_add_(1, into_BN[..., None].expand_as(x_BND), x_BND * size_BN[..., None])
    return total / size[..., None], size
