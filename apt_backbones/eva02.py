"""EVA-02 on packed patches of several sizes (EVA-02, arXiv 2303.11331; ViTDet, arXiv 2203.16527; APT, 2510.18091).

Parameters are those of timm's ``Eva`` with the same names. What differs from timm: tokens of the whole batch are
packed, attention is windowed or global by segments, and the patch embedding is adaptive.

Legend: B images, H x W base cells, T tokens of the whole batch, D channels.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, trunc_normal_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import BACKENDS
from .block import PackedEvaBlock
from .embed import AdaptivePatchEmbed, drop_at_random
from .layout import PatchLayout, check_window
from .resample import resample_positions
from .rotary import ROPE_POSITIONS, rotary_table
from .scores import SCORERS, check_images, check_thresholds, drop_padding, score_patches, select_patches

PADDING_MODES = ("coarsest", "drop")
PRETRAIN_ROPE_LENGTH = 16  # side of the grid that all EVA-02 models were pretrained on


class APTEva02(nn.Module):
    """EVA-02 trunk with adaptive patches.

    Absolute positions are resampled from the pretraining grid to the training square (bicubic, without antialiasing,
    as EVA-02's detection code does), and from there to the grids of larger patches (bicubic, antialiased). Positions
    of a smaller image, absolute and rotary, are those of the square's top-left part, so that a rectangle equals the
    padded square less its padding; for a larger image the square grows to its longer side and positions interpolate.

    Args:
        img_size: side in pixels of the square that the task was trained on.
        patch_size: side of the base patch.
        embed_dim, depth, num_heads, mlp_ratio, drop_path_rate: as in timm.
        window_size: side of an attention window in base cells; None for global attention in every block.
        global_blocks: indices of the blocks that attend globally although there are windows.
        pretrain_img_size: image side in pixels that the absolute positions were made for.
        use_cls_token: put a CLS token in front of every image (EVA-02's segmentation models); only without windows.
        out_indices: blocks after which a feature map is returned.
        thresholds: merged size in pixels -> threshold in the scorer's units; None for the dense model.
        scorer: "entropy", "laplacian" or "upsample_mse".
        merge: "apt", "resizing" or "random" (``AdaptivePatchEmbed``). For "random", dropped cells of the feature
            maps repeat the nearest kept token before them.
        padding: "coarsest" (padding is scored like any other area: constant, so it merges into the largest patches)
            or "drop" (patches wholly inside padding get no token, and zeros in the feature maps).
        rope_position: "centre" or "corner" of a merged patch.
        pixel_mean, pixel_std: normalisation that the images underwent, in 0..255; undone before scoring.
        attention_backend: see ``varlen_attention``; None chooses.
        with_cp: recompute block activations in the backward pass instead of storing them.

    Raises:
        ValueError: thresholds, window, blocks or modes that do not fit together; the message says which.
    """

    def __init__(
        self,
        img_size: int = 1536,
        patch_size: int = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4 * 2 / 3,
        drop_path_rate: float = 0.0,
        window_size: int | None = None,
        global_blocks: Sequence[int] = (),
        pretrain_img_size: int = 224,
        use_cls_token: bool = False,
        out_indices: Sequence[int] = (-1,),
        thresholds: Mapping[int, float] | None = None,
        scorer: str = "entropy",
        merge: str = "apt",
        padding: str = "coarsest",
        rope_position: str = "centre",
        pixel_mean: Sequence[float] = (123.675, 116.28, 103.53),
        pixel_std: Sequence[float] = (58.395, 57.12, 57.375),
        attention_backend: str | None = None,
        with_cp: bool = False,
    ):
        super().__init__()
        # mm configs are written as JSON too, where keys become strings.
        thresholds = check_thresholds({int(size): t for size, t in (thresholds or {}).items()}, patch_size)
        self.patch_size, self.embed_dim, self.num_heads = patch_size, embed_dim, num_heads
        self.window_size = window_size or None
        self.global_blocks = frozenset(_check_indices("global_blocks", global_blocks, depth))
        self.out_indices = _check_indices("out_indices", out_indices, depth)
        self.train_grid = img_size // patch_size
        self.thresholds, self.scorer, self.merge = thresholds, scorer, merge
        self.padding, self.rope_position = padding, rope_position
        self.attention_backend, self.with_cp = attention_backend, with_cp
        self.num_prefix = int(use_cls_token)
        _check_choice("scorer", scorer, SCORERS)
        _check_choice("padding", padding, PADDING_MODES)
        _check_choice("rope_position", rope_position, ROPE_POSITIONS)
        if attention_backend is not None:
            _check_choice("attention_backend", attention_backend, BACKENDS)
        if embed_dim % num_heads or embed_dim // num_heads % 4:
            raise ValueError(f"embed_dim {embed_dim} / num_heads {num_heads} must be a multiple of 4")
        # Refuses a window that the largest patch does not divide, or CLS tokens with windows, before the first image.
        check_window(self.window_size, max((patch_size, *thresholds)), patch_size, self.num_prefix)

        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, embed_dim, kernel_size=patch_size, stride=patch_size)
        # A dense model merges nothing, so it has no new layers: "resizing" has none.
        self.adaptive_embed = AdaptivePatchEmbed(embed_dim, merge if thresholds else "resizing")
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if use_cls_token else None
        self.pretrain_grid = pretrain_img_size // patch_size
        self.pos_embed = nn.Parameter(torch.zeros(1, self.pretrain_grid**2 + self.num_prefix, embed_dim))
        self.blocks = nn.ModuleList(
            PackedEvaBlock(
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
        # As bits, because model.half() and model.bfloat16() would round floating buffers, and so move the pixels.
        normalisation = torch.tensor([tuple(pixel_mean), tuple(pixel_std)], dtype=torch.float32).view(2, 3, 1, 1)
        self.register_buffer("normalisation_bits", normalisation.view(torch.int32), persistent=False)
        self.last_layout: PatchLayout | None = None  # of the latest batch, for those who report token counts
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

    def compile_blocks(self, **options) -> "APTEva02":
        """Compile the blocks (in place): all of them share two compiled functions, which take any number of tokens.

        Scoring, layout, embedding and the attention kernel itself stay as they are. The first forward compiles.

        Args:
            options: of ``torch.compile``, e.g. ``mode="max-autotune-no-cudagraphs"``.
        """
        for block in self.blocks:
            block.compile_options = options
        return self

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Feature maps (B, D, ceil(height / p), ceil(width / p)), one per entry of ``out_indices``.

        Args:
            images: normalised float images (B, 3, height, width) of any size; sides that are no multiple of the
                patch are padded with zeros at the right and bottom. Give a half-precision model float32 images:
                they are scored before they are rounded.

        Raises:
            TypeError, ValueError: images that are not float RGB batches, or, with thresholds, not finite. (The dense
                model computes NaN from NaN, as any network does.)
        """
        check_images(images)
        images = self._pad(images)
        layout = self.last_layout = self.layout(images)
        x_TD = self._embed(images.to(self.patch_embed.proj.weight.dtype), layout)
        image_rope, window_rope = self._rope(layout)
        maps = {}
        for index, block in enumerate(self.blocks):
            is_global = self.window_size is None or index in self.global_blocks
            segments, rope = (layout.images, image_rope) if is_global else (layout.windows, window_rope)
            arguments = (x_TD, layout, segments, rope, self.attention_backend)
            if self.with_cp and torch.is_grad_enabled() and x_TD.requires_grad:
                x_TD = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x_TD = block(*arguments)
            if index in self.out_indices:
                maps[index] = layout.to_map(x_TD)
        return tuple(maps[index] for index in self.out_indices)

    @torch.no_grad()
    def layout(self, images: Tensor) -> PatchLayout:
        """The batch's layout; patches are scored in float32 on the pixels that the images had before normalisation.

        Args:
            images: normalised images (B, 3, H * p, W * p).
        """
        grid = (images.shape[2] // self.patch_size, images.shape[3] // self.patch_size)
        sizes = tuple(self.thresholds)
        if sizes:
            sides_BHW = self._select(images)
        elif self.padding == "drop":
            sides_BHW = torch.full((len(images), *grid), self.patch_size, device=images.device)
        else:
            return PatchLayout.dense(
                len(images), grid, self.patch_size, self.window_size, self.num_prefix, images.device
            )
        if self.padding == "drop":
            sides_BHW = drop_padding(sides_BHW, images, self.patch_size)
        is_random = bool(sizes) and self.merge == "random"
        if is_random:
            sides_BHW, sizes = drop_at_random(sides_BHW, self.patch_size), ()
        return PatchLayout.build(
            sides_BHW, self.patch_size, sizes, self.window_size, self.num_prefix, fill_dropped=is_random
        )

    def _select(self, images: Tensor) -> Tensor:
        """Side in pixels of the patch that covers each base cell (B, H, W), by the images' scores."""
        with torch.autocast(images.device.type, enabled=False):
            # Data pipelines resize in uint8: rounding gives those very pixels back, so that a selection depends on
            # neither the float error of the normalisation nor the device.
            mean, std = self.normalisation_bits.view(torch.float32)
            pixels = (images.float() * std + mean).round_()
            scores = score_patches(pixels, tuple(self.thresholds), self.scorer)
            return select_patches(scores, self.thresholds, self.patch_size, images.shape[2:])

    def _pad(self, images: Tensor) -> Tensor:
        bottom, right = (-side % self.patch_size for side in images.shape[2:])
        return F.pad(images, (0, right, 0, bottom)) if bottom or right else images

    def _embed(self, images: Tensor, layout: PatchLayout) -> Tensor:
        positions = self._positions(max(self.train_grid, *layout.grid))
        x_TD = self.adaptive_embed(images, layout, self.patch_embed.proj, positions).to(self.pos_embed.dtype)
        if self.cls_token is not None:
            cls_token = (self.cls_token + self.pos_embed[:, :1])[0]
            x_TD = torch.where((layout.side_T == 0)[:, None], cls_token, x_TD)
        return x_TD

    def _positions(self, side: int) -> Tensor:
        """Absolute positions of a square of base cells (1, D, side, side), float32."""
        positions_HWD = self.pos_embed[0, self.num_prefix :].float().unflatten(0, (self.pretrain_grid, -1))
        if side != self.pretrain_grid:
            positions_HWD = resample_positions(positions_HWD, (side, side), antialias=False)
        return positions_HWD.permute(2, 0, 1)[None]

    def _rope(self, layout: PatchLayout) -> tuple[Tensor, Tensor | None]:
        """Rotations for global and for windowed blocks."""
        head_dim = self.embed_dim // self.num_heads
        options = dict(rope_position=self.rope_position, pretrain_length=PRETRAIN_ROPE_LENGTH)
        image_rope = rotary_table(layout, head_dim, max(self.train_grid, *layout.grid), **options)
        if self.window_size is None:
            return image_rope, None
        return image_rope, rotary_table(layout, head_dim, self.window_size, within_window=True, **options)


def _check_indices(name: str, indices: Sequence[int], depth: int) -> tuple[int, ...]:
    """Block indices, counted from the end if negative."""
    if any(not -depth <= index < depth for index in indices):
        raise ValueError(f"{name} {tuple(indices)} name blocks outside 0..{depth - 1}")
    return tuple(index % depth for index in indices)


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(choices)}")
