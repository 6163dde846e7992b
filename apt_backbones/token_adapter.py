"""New layers for a transformer block: what changes for the tokens of merged patches."""

from collections.abc import Sequence

from torch import Tensor, nn


class LowRank(nn.Module):
    """A linear layer of low rank, zero until it is trained.

    Args:
        inputs, outputs: channels.
        rank: of the product of its two matrices.
    """

    def __init__(self, inputs: int, outputs: int, rank: int):
        super().__init__()
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x_TD: Tensor, is_merged_T1: Tensor) -> Tensor:
        """(T, outputs) of tokens (T, inputs); exactly zero for those that are not merged."""
        return self.up(self.down(x_TD) * is_merged_T1)


class TokenAdapter(nn.Module):
    """Adds to the queries, keys and values, and to the output of the MLP, of merged patches' tokens only (LoRA, arXiv
    2106.09685, and AdaptFormer, arXiv 2205.13535, on some of the tokens). So where nothing merges the block is the
    pretrained one, bit by bit.

    Args:
        projections: the block's, to queries, keys and values.
        rank: of both additions.
    """

    def __init__(self, projections: Sequence[nn.Linear], rank: int):
        super().__init__()
        width = projections[0].in_features
        self.qkv = LowRank(width, sum(layer.out_features for layer in projections), rank)
        self.mlp = LowRank(width, width, rank)
