"""The trunk that every backbone shares: pad, select, layout, embed, run blocks, and what heads read from the tokens.

A backbone is a class over ``AdaptiveTrunk`` that says what its network's patch projection, prefix tokens, positions,
rotations and final norm are; see ``backbones/`` and docs/adding_a_backbone.md.

Legend: B images, H x W base cells, T tokens of the whole batch, D channels, P prefix tokens, p base patch side.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import BACKENDS
from .block import Call, FusedBlock, check_block, projections_of, run_block
from .embed import AdaptivePatchEmbed
from .fused import Hooked, is_hooked
from .layout import PatchLayout, Segments, check_window
from .learned import LearnedScorer
from .map_detail import MapDetail
from .new_layers import load_new_layers
from .rotary import ROPE_POSITIONS
from .scores import check_images, check_scorer
from .selection import (
    PADDING_MODES,
    check_choice,
    clean_thresholds,
    drop_at_random,
    drop_padding,
    layout_of,
    patch_sides,
    undo_normalization,
)
from .token_adapter import TokenAdapter

MAP_FILLS = ("repeat", "interpolate", "learned")
IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


class AdaptiveTrunk(nn.Module):
    """A ViT on packed patches of several sizes. Subclasses call ``set_up`` once their modules exist.

    Attributes:
        thresholds: merged size in pixels -> threshold; empty for the dense network. May be changed at any time to
            other values for the same sizes, or to none.
        last_layout: of the latest batch, for those who report token counts. (Several threads may call a trunk at once;
            what it returns does not depend on this.)
    """

    # ---- what a backbone supplies -------------------------------------------------------------------------------
    blocks: nn.ModuleList
    num_prefix: int
    patch_size: int
    embed_dim: int
    out_indices: tuple[int, ...] = (-1,)
    position_grid: tuple[int, int]  # the grid that ``pos_embed`` is made for
    antialias_positions = True  # when it is resampled to another grid

    def projection(self) -> nn.Conv2d:
        """E, the patch projection: a convolution whose kernel and stride are p."""
        return self.patch_embed.proj

    def prefix_tokens(self) -> Tensor | None:
        """CLS and register tokens with their positions (P, D), if there are any."""
        return None

    def positions(self, grid: tuple[int, int]) -> Tensor | None:
        """Absolute positions of the base cells (1, D, H', W') with H' >= H and W' >= W of the grid, or None."""
        return None

    def rotations(self, layout: PatchLayout) -> Sequence[Tensor | None]:
        """Per block the rotation of queries and keys (``rotary.rotation_of``), or None."""
        return [None] * len(self.blocks)

    def before_blocks(self, x_TD: Tensor) -> Tensor:
        """What happens to embedded tokens before the first block."""
        return x_TD

    def final_norm(self, x_TD: Tensor) -> Tensor:
        """The norm after the last block."""
        return x_TD

    def check_block(self, block: nn.Module) -> None:
        """Raise TypeError or ValueError unless ``run_block`` applies everything that a block does."""
        check_block(block)

    def run_block(
        self, index: int, x_TD: Tensor, call: Call, segments: Segments, rotation: Tensor | None = None
    ) -> Tensor:
        """The tokens (T, D) after one of ``blocks``, in which the tokens of a segment attend to each other. Override
        it, and ``check_block``, for blocks that are not timm's."""
        adapter = self.token_adapters[index] if index < len(self.token_adapters) and self.thresholds else None
        return run_block(self.blocks[index], x_TD, call, segments, rotation, self._fused[index], adapter)

    # ---- what every backbone has --------------------------------------------------------------------------------
    def set_up(
        self,
        thresholds: Mapping[int, float] | None = None,
        scorer: str | LearnedScorer = "entropy",
        merge: str = "apt",
        padding: str = "coarsest",
        rope_position: str = "center",
        window_size: int | None = None,
        global_blocks: Sequence[int] = (),
        pixel_mean: Sequence[float] = IMAGENET_MEAN,
        pixel_std: Sequence[float] = IMAGENET_STD,
        adapter_rank: int = 0,
        map_fill: str = "repeat",
        map_scale: int = 1,
        out_indices: Sequence[int] | None = None,
        attention_backend: str | None = None,
        new_layers: str | None = None,
    ) -> None:
        """Settle how images become tokens, and add the new layers.

        Args:
            thresholds: merged size in pixels -> threshold in the scorer's units; None for the dense network.
            scorer: "entropy", "laplacian", "upsample_mse", or a learned scorer or its .safetensors file.
            merge: "apt", "resizing", "random" or an ablation (``AdaptivePatchEmbed``). For "random", dropped cells of
                the feature maps repeat the nearest kept token before them.
            padding: "coarsest" (padding is scored like any other area: constant, so it merges into the largest
                patches) or "drop" (patches wholly inside padding get no token, and zeros in the feature maps; where
                ``merge`` is "random" they are dropped cells as others are).
            rope_position: "center" or "corner" of a merged patch.
            window_size: side of an attention window in base cells; None for global attention in every block.
                Prefix tokens belong to no window: in windowed blocks those of an image attend to each other only.
            global_blocks: indices of the blocks that attend globally although there are windows.
            pixel_mean, pixel_std: normalization that the images underwent, in 0..255; undone before scoring.
            adapter_rank: of the low-rank layers that blocks, up to the last of ``out_indices``, get for the tokens of
                merged patches (``TokenAdapter``); 0 for none.
            map_fill: what the cells of a merged patch hold in feature maps: "repeat", its token; or "interpolate",
                values between those around it, with the token as their mean (``PatchLayout.interpolate``); or
                "learned", to which a new layer per entry of ``out_indices`` adds detail (``MapDetail``).
            map_scale: cells of feature maps per side of a base patch. From 2 on maps, once merged patches are filled,
                are interpolated to cells finer than the network's patches; ``map_fill`` must not be "repeat".
            out_indices: blocks after which ``feature_maps`` returns maps; None for what the class has.
            attention_backend: see ``varlen_attention``; None chooses.
            new_layers: file of trained new layers (tools/finetune_features.py writes one) to start with. Those of a
                checkpoint that is loaded afterwards take their place.

        Raises:
            FileNotFoundError: no file of new layers.
            TypeError: blocks that cannot run on packed tokens.
            ValueError: thresholds, window, blocks or modes that do not fit together; the message says which.
        """
        thresholds = clean_thresholds(thresholds, self.patch_size)
        check_scorer(scorer, tuple(thresholds))
        check_choice("padding", padding, PADDING_MODES)
        check_choice("rope_position", rope_position, ROPE_POSITIONS)
        check_choice("map_fill", map_fill, MAP_FILLS)
        if map_scale < 1 or (map_scale > 1 and map_fill == "repeat"):
            raise ValueError(
                f'map_scale={map_scale} needs map_fill="interpolate" or "learned"; and it is at least 1, the default'
            )
        if padding == "drop" and all(float(value).is_integer() for value in pixel_mean):
            raise ValueError(
                f'padding="drop" takes exact zeros for padding, and with pixel_mean {tuple(pixel_mean)} content can be '
                'zero, too; use padding="coarsest"'
            )
        if adapter_rank < 0:
            raise ValueError(f"adapter_rank={adapter_rank} must be at least 0, which is for no adapters")
        if adapter_rank and type(self).run_block is not AdaptiveTrunk.run_block:
            raise ValueError(f"{type(self).__name__} runs its blocks itself, without adapters; use adapter_rank=0")
        if attention_backend is not None:
            check_choice("attention_backend", attention_backend, BACKENDS)
        check_window(window_size or None, max((self.patch_size, *thresholds)), self.patch_size)
        for block in self.blocks:
            self.check_block(block)
        self.thresholds, self.scorer, self.merge, self.padding = thresholds, scorer, merge, padding
        self.rope_position, self.attention_backend = rope_position, attention_backend
        self.map_fill, self.map_scale, self.window_size = map_fill, map_scale, window_size or None
        self.global_blocks = frozenset(check_indices("global_blocks", global_blocks, len(self.blocks)))
        self.pixel_mean, self.pixel_std = tuple(map(float, pixel_mean)), tuple(map(float, pixel_std))
        self.with_cp = False
        out_indices = self.out_indices if out_indices is None else out_indices
        self.out_indices = check_indices("out_indices", out_indices, len(self.blocks))
        # A dense network merges nothing, so it has no new layers: "resizing" has none.
        self.adaptive_embed = AdaptivePatchEmbed(self.embed_dim, merge if thresholds else "resizing")
        adapted = self.blocks[: max(self.out_indices) + 1] if thresholds and adapter_rank else ()
        self.token_adapters = nn.ModuleList(TokenAdapter(projections_of(block), adapter_rank) for block in adapted)
        self.map_detail = nn.ModuleDict()
        if thresholds and map_fill == "learned":
            self.map_detail.update({str(index): MapDetail(self.embed_dim) for index in self.out_indices})
        self.last_layout: PatchLayout | None = None
        self._compile_options: dict | None = None
        self._fused = [FusedBlock() for _ in self.blocks]
        if new_layers is not None:
            load_new_layers(self, new_layers)

    def compile_blocks(self, **options) -> "AdaptiveTrunk":
        """Compile the blocks (in place): all of them share two compiled functions, which take any number of tokens.

        Scoring, layout, embedding and the attention kernel itself stay as they are. The first forward compiles.

        Args:
            options: of ``torch.compile``, e.g. ``mode="max-autotune-no-cudagraphs"``.
        """
        self._compile_options = options
        return self

    def feature_maps(
        self, images: Tensor, indices: Sequence[int] | None = None, norm: bool = False
    ) -> tuple[Tensor, ...]:
        """Feature maps (B, D, ceil(height / p) * map_scale, ceil(width / p) * map_scale) after some blocks.

        Args:
            images: normalized float images (B, 3, height, width); sides that are not a multiple of the patch are
                padded with zeros at the right and bottom. Give a half-precision model float32 images: they are scored
                before they are rounded.
            indices: of the blocks; None for ``out_indices``.
            norm: apply the network's final norm to each.

        Raises:
            TypeError, ValueError: images that are not float RGB batches, or, with thresholds, not finite. (The dense
                network computes NaN from NaN, as any network does.)
        """
        return self.maps_and_layout(images, indices, norm)[0]

    def maps_and_layout(
        self, images: Tensor, indices: Sequence[int] | None = None, norm: bool = False
    ) -> tuple[tuple[Tensor, ...], PatchLayout]:
        """``feature_maps``, and where the tokens are that they were made of."""
        indices = self.out_indices if indices is None else indices
        indices = check_indices("indices", indices, len(self.blocks))
        maps = {}
        for index, x_TD, layout in self.run(images, until=max(indices)):
            if index in indices:
                maps[index] = self.fill_map(index, layout, layout.to_map(self.final_norm(x_TD) if norm else x_TD))
        return tuple(maps[index] for index in indices), layout

    def fill_map(self, index: int, layout: PatchLayout, map_BDHW: Tensor) -> Tensor:
        """A map (B, D, H, W) that ``layout.to_map`` gave of tokens after a block, filled as ``map_fill`` and
        ``map_scale`` say: (B, D, H * map_scale, W * map_scale)."""
        if self.map_fill == "repeat":
            return map_BDHW
        filled_BDHW = layout.interpolate(map_BDHW)
        if self.map_fill == "learned" and str(index) in self.map_detail and self.thresholds:
            detail_BDHW = self.map_detail[str(index)](filled_BDHW)
            filled_BDHW = layout.add_detail(map_BDHW, filled_BDHW + detail_BDHW)
        return layout.finer(filled_BDHW, self.map_scale)

    def run(self, images: Tensor, until: int | None = None) -> Iterator[tuple[int, Tensor, PatchLayout]]:
        """Run the network; after every block yield its index, its tokens (T, D), and where these are.

        Args:
            images: as for ``feature_maps``.
            until: index of the last block to run.
        """
        check_images(images)
        varying = self.thresholds or self.padding == "drop"
        if torch.compiler.is_exporting() or (varying and torch.jit.is_tracing()):
            raise RuntimeError(
                "adaptive trunks cannot be exported, nor traced while they merge or drop padding: how many tokens "
                "there are depends on the image; export the network that the trunk was made from, or use "
                "compile_blocks()"
            )
        images = self._pad(images)
        layout = self.last_layout = self.layout(images)
        x_TD = self.before_blocks(self._embed(images.to(self.projection().weight.dtype), layout))
        rotations = self.rotations(layout)
        call = Call(layout, self.attention_backend, self._compile_options)
        for index in range(len(self.blocks) if until is None else until + 1):
            segments = layout.windows if self.is_windowed(index) else layout.images
            arguments = (index, x_TD, call, segments, rotations[index])
            if self.with_cp and torch.is_grad_enabled() and x_TD.requires_grad:
                x_TD = checkpoint(self._run_block, *arguments, use_reentrant=False)
            else:
                x_TD = self._run_block(*arguments)
            yield index, x_TD, layout

    def _run_block(self, index: int, x_TD: Tensor, *others) -> Tensor:
        """``run_block`` between the block's own hooks, such as those with which FSDP gathers and frees its weights."""
        if not is_hooked(self.blocks[index]):
            return self.run_block(index, x_TD, *others)
        return Hooked(self.blocks[index], lambda x_TD: self.run_block(index, x_TD, *others))(x_TD)

    def is_windowed(self, index: int) -> bool:
        """Whether a block attends within windows."""
        return self.window_size is not None and index not in self.global_blocks

    @torch.no_grad()
    def layout(self, images: Tensor) -> PatchLayout:
        """The batch's layout.

        Args:
            images: normalized images (B, 3, H * p, W * p).
        """
        if not self.thresholds and self.padding != "drop":
            grid = tuple(side // self.patch_size for side in images.shape[2:])
            return PatchLayout.dense(
                len(images), grid, self.patch_size, self.window_size, self.num_prefix, images.device
            )
        sides_BHW = self.select(images)
        return layout_of(sides_BHW, self.thresholds, self.patch_size, self.merge, self.window_size, self.num_prefix)

    @torch.no_grad()
    def select(self, images: Tensor) -> Tensor:
        """Side of the patch over each base cell, int64 (B, H, W), 0 where there is none; scored in float32 on the
        pixels that the images had before normalization. Images as for ``layout``."""
        pixels = undo_normalization(images, self.pixel_mean, self.pixel_std)
        sides_BHW = patch_sides(pixels, self.thresholds, self.patch_size, self.scorer)
        if self.padding == "drop":
            sides_BHW = drop_padding(sides_BHW, images, self.patch_size)
        if self.merge == "random" and self.thresholds:
            sides_BHW = drop_at_random(sides_BHW, self.patch_size)
        return sides_BHW

    def _pad(self, images: Tensor) -> Tensor:
        bottom, right = (-side % self.patch_size for side in images.shape[2:])
        return F.pad(images, (0, right, 0, bottom)) if bottom or right else images

    def _embed(self, images: Tensor, layout: PatchLayout) -> Tensor:
        x_TD = self.adaptive_embed(images, layout, self.projection(), self.positions(layout.grid))
        x_TD = x_TD.to(images.dtype)
        if (prefix_PD := self.prefix_tokens()) is not None:
            starts_B1 = layout.images.cu_seqlens[:-1, None].long()
            at = (starts_B1 + torch.arange(self.num_prefix, device=starts_B1.device)).flatten()
            x_TD = x_TD.index_copy(0, at, prefix_PD.to(x_TD.dtype).repeat(layout.batch_size, 1))
        return x_TD

    def release_fused(self) -> None:
        """Give all weights memory of their own, until a call fuses some again."""
        for block in self.__dict__.get("_fused", ()):  # there is none while a network is being built
            block.qkv.release()
            block.fc1.release()

    def state_dict(self, *args, **kwargs) -> dict[str, Tensor]:
        self.release_fused()
        return super().state_dict(*args, **kwargs)

    def __reduce_ex__(self, protocol: int) -> tuple:
        self.release_fused()  # a copy or pickle would hold the shared memory, but not know that it is shared
        return super().__reduce_ex__(protocol)

    def _apply(self, *args, **kwargs) -> "AdaptiveTrunk":
        self.release_fused()
        if hasattr(self, "_fused"):
            self._fused = [FusedBlock() for _ in self.blocks]  # they may have become others
        return super()._apply(*args, **kwargs)


def find_trunk(model: nn.Module) -> AdaptiveTrunk:
    """The adaptive trunk in a model.

    Raises:
        ValueError: there is none.
    """
    return named_trunk(model)[1]


def named_trunk(model: nn.Module) -> tuple[str, AdaptiveTrunk]:
    """As ``find_trunk``, with its name in the model."""
    for name, module in model.named_modules():
        if isinstance(module, AdaptiveTrunk):
            return name, module
    raise ValueError(
        f"{type(model).__name__} holds no adaptive trunk; its backbone must be of type APTEva02 or APTTimm, or a timm "
        "model that went through apt_backbones.adapt"
    )


def check_indices(name: str, indices: Sequence[int], depth: int) -> tuple[int, ...]:
    """Block indices, counted from the end if negative; raise ValueError if there are no such blocks."""
    if any(not -depth <= index < depth for index in indices):
        raise ValueError(f"{name} {tuple(indices)} name blocks outside 0..{depth - 1}")
    return tuple(index % depth for index in indices)
