"""EVA-02 (arXiv 2303.11331) with adaptive patches, as its detection and segmentation code builds it."""

from collections.abc import Mapping, Sequence

import torch
from timm.layers import LayerNorm, trunc_normal_
from timm.models.eva import EvaBlock
from torch import Tensor, nn

from ..layout import PatchLayout
from ..resample import resample_positions
from ..rotary import rotary_table
from ..trunk import AdaptiveTrunk

PRETRAIN_ROPE_LENGTH = 16  # side of the grid that all EVA-02 models were pretrained on


class APTEva02(AdaptiveTrunk):
    """EVA-02 trunk with adaptive patches.

    Absolute positions are resampled from the pretraining grid to the training square (bicubic, without antialiasing,
    as EVA-02's detection code does), and from there to the grids of larger patches (bicubic, antialiased). Positions
    of a smaller image, absolute and rotary, are those of the square's top-left part, so that a rectangle equals the
    padded square less its padding; for a larger image the square grows to its longer side and positions interpolate.

    Args:
        img_size: side in pixels of the square that the task was trained on.
        patch_size: side of the base patch.
        embed_dim, depth, num_heads, mlp_ratio, drop_path_rate: as in timm.
        pretrain_img_size: image side in pixels that the absolute positions were made for.
        use_cls_token: put a CLS token in front of every image (EVA-02's segmentation models).
        out_indices: blocks after which a feature map is returned.
        with_cp: recompute block activations in the backward pass instead of storing them.
        thresholds, scorer, merge: as in ``AdaptiveTrunk.set_up``; ``options`` are its others, such as ``window_size``.

    Raises:
        ValueError: thresholds, window, blocks or modes that do not fit together; the message says which.
    """

    antialias_positions = False

    def __init__(
        self,
        img_size: int = 1536,
        patch_size: int = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4 * 2 / 3,
        drop_path_rate: float = 0.0,
        pretrain_img_size: int = 224,
        use_cls_token: bool = False,
        out_indices: Sequence[int] = (-1,),
        thresholds: Mapping[int, float] | None = None,
        scorer: str = "entropy",
        merge: str = "apt",
        with_cp: bool = False,
        **options,
    ):
        super().__init__()
        if embed_dim % num_heads or embed_dim // num_heads % 4:
            raise ValueError(f"embed_dim {embed_dim} / num_heads {num_heads} must be a multiple of 4")
        self.patch_size, self.embed_dim, self.num_heads = patch_size, embed_dim, num_heads
        self.train_grid = img_size // patch_size
        self.position_grid = (pretrain_img_size // patch_size,) * 2
        self.num_prefix = int(use_cls_token)

        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, embed_dim, kernel_size=patch_size, stride=patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if use_cls_token else None
        self.pos_embed = nn.Parameter(torch.zeros(1, self.position_grid[0] ** 2 + self.num_prefix, embed_dim))
        self.blocks = nn.ModuleList(
            EvaBlock(
                embed_dim,
                num_heads,
                qkv_fused=False,
                mlp_ratio=mlp_ratio,
                swiglu_mlp=True,
                scale_mlp=True,
                drop_path=drop_path_rate * block / max(depth - 1, 1),
                norm_layer=LayerNorm,
            )
            for block in range(depth)
        )
        self.set_up(thresholds, scorer, merge, out_indices=out_indices, **options)
        self.with_cp = with_cp
        self._init_weights()

    def _init_weights(self) -> None:
        trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for index, block in enumerate(self.blocks, start=1):  # as timm's fix_init_weight
            for linear in (block.attn.proj, block.mlp.fc2):
                linear.weight.data.div_((2 * index) ** 0.5)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """``AdaptiveTrunk.feature_maps``, one per entry of ``out_indices``; images of any size."""
        return self.feature_maps(images)

    def prefix_tokens(self) -> Tensor | None:
        return None if self.cls_token is None else (self.cls_token + self.pos_embed[:, :1])[0]

    def positions(self, grid: tuple[int, int]) -> Tensor:
        side = max(self.train_grid, *grid)
        positions_HWD = self.pos_embed[0, self.num_prefix :].float().unflatten(0, self.position_grid)
        if side != self.position_grid[0]:
            positions_HWD = resample_positions(positions_HWD, (side, side), self.antialias_positions)
        return positions_HWD.permute(2, 0, 1)[None]

    def rotations(self, layout: PatchLayout) -> list[Tensor]:
        head_dim = self.embed_dim // self.num_heads
        options = dict(rope_position=self.rope_position, pretrain_length=PRETRAIN_ROPE_LENGTH)
        of_image = of_window = rotary_table(layout, head_dim, max(self.train_grid, *layout.grid), **options)
        if self.window_size is not None:
            of_window = rotary_table(layout, head_dim, self.window_size, within_window=True, **options)
        return [of_window if self.is_windowed(index) else of_image for index in range(len(self.blocks))]
