"""timm's ``VisionTransformer`` and ``Eva`` with adaptive patches, changed in place by ``adapt``.

``VisionTransformer`` covers ViT (augreg), DeiT-3, MAE, DINOv2 with and without registers, and the image towers of CLIP
and SigLIP; ``Eva`` covers EVA, EVA-02, DINOv3, the Perception Encoder and ViTs with rotary positions.
"""

from collections.abc import Mapping, Sequence

import torch
from timm.layers import PatchEmbed
from timm.models._features import feature_take_indices
from timm.models.eva import Eva
from timm.models.eva import checkpoint_filter_fn as eva_filter
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as vit_filter
from torch import Tensor, nn

from ..checkpoint import load_converted
from ..layout import PatchLayout
from ..learned import LearnedScorer
from ..resample import resample_positions
from ..rotary import rotation_of, token_positions
from ..trunk import AdaptiveTrunk
from .timm_rotary import check_rope, rotation_angles


class AdaptiveTimm(AdaptiveTrunk):
    """What ``AdaptiveVisionTransformer`` and ``AdaptiveEva`` share. What is modified of timm's class:

    - ``forward_features`` and ``forward_intermediates`` run on packed patches, and return what timm's return: prefix
      tokens, then one token per base cell, those of a merged patch repeated. So pooling and classifier are timm's, and
      an average over the tokens weighs a merged patch by its area.
    - Without thresholds (and windows) both are timm's own methods.
    - ``grad_checkpointing`` recomputes one block at a time.
    """

    def set_input_size(
        self, img_size: Sequence[int] | None = None, patch_size: Sequence[int] | None = None, **options
    ) -> None:
        """timm's, for another ``img_size``.

        Raises:
            ValueError: another patch size.
        """
        if patch_size is not None and tuple(patch_size) != tuple(self.patch_embed.patch_size):
            raise ValueError(
                f"an adapted model keeps its patch size, {self.patch_size}; make it timm's own again with "
                "adapt(model, None), set the size, and adapt it then"
            )
        super().set_input_size(img_size, patch_size, **options)

    @property
    def with_cp(self) -> bool:
        return self.grad_checkpointing

    @with_cp.setter
    def with_cp(self, value: bool) -> None:
        self.grad_checkpointing = value

    @property
    def is_original(self) -> bool:
        """Whether timm's own code runs."""
        packs = self.thresholds or self.window_size is not None or self.padding == "drop" or not self.keep_prefix
        return not packs and self.map_scale == 1

    @property
    def position_grid(self) -> tuple[int, int]:
        return tuple(self.patch_embed.grid_size)

    def prefix_tokens(self) -> Tensor | None:
        if not self.num_prefix:
            return None
        tokens = torch.cat([token for token in (self.cls_token, self.reg_token) if token is not None], dim=1)
        if self.pos_embed is not None and not self.no_embed_class:
            tokens = tokens + self.pos_embed[:, : self.num_prefix_tokens]
        return tokens[0]

    def positions(self, grid: tuple[int, int]) -> Tensor | None:
        if self.pos_embed is None:
            return None
        num_prefix = 0 if self.no_embed_class else self.num_prefix_tokens
        positions_HWD = self.pos_embed[0, num_prefix:].unflatten(0, self.position_grid)
        if grid != self.position_grid:
            positions_HWD = resample_positions(positions_HWD, grid, self.antialias_positions)
        return positions_HWD.permute(2, 0, 1)[None]

    def rotations(self, layout: PatchLayout) -> Sequence[Tensor | None]:
        rope = getattr(self, "rope", None)
        if rope is None:
            return [None] * len(self.blocks)
        angles = rotation_angles(rope, token_positions(layout, self.rope_position), layout.grid)
        if angles.ndim == 3:  # one table for all blocks
            return [rotation_of(angles, layout)] * len(self.blocks)
        return [rotation_of(angle_TNC, layout) for angle_TNC in angles]

    def before_blocks(self, x_TD: Tensor) -> Tensor:
        return self.norm_pre(self.pos_drop(x_TD))

    def final_norm(self, x_TD: Tensor) -> Tensor:
        return self.norm(x_TD)

    def check_image_size(self, images: Tensor) -> None:
        """Raise ValueError for images that timm's patch embedding refuses."""
        embed, size = self.patch_embed, tuple(images.shape[2:])
        if embed.strict_img_size and size != tuple(embed.img_size):
            raise ValueError(
                f"images are {size[0]} x {size[1]} pixels, the model takes {embed.img_size[0]} x {embed.img_size[1]}; "
                "resize them, or create the model with img_size=... or dynamic_img_size=True"
            )
        if not (embed.strict_img_size or embed.dynamic_img_pad) and any(side % self.patch_size for side in size):
            raise ValueError(
                f"images of {size[0]} x {size[1]} pixels are not whole patches of {self.patch_size}; resize them, or "
                "create the model with dynamic_img_pad=True"
            )

    def _pad(self, images: Tensor) -> Tensor:
        embed, (height, width) = self.patch_embed, images.shape[2:]
        if embed.strict_img_size and not embed.dynamic_img_pad and (height, width) == tuple(embed.img_size):
            # timm's convolution leaves out what is no whole patch, as of so400m's 384 pixels.
            return images[:, :, : height - height % self.patch_size, : width - width % self.patch_size]
        return super()._pad(images)

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Normed prefix and cell tokens (B, P + H * W, D) of normalized images (B, 3, height, width)."""
        if self.is_original:
            return super().forward_features(x, attn_mask=attn_mask, is_causal=is_causal)
        if self.num_prefix != self.num_prefix_tokens:
            raise ValueError("keep_prefix=False is for feature maps: use feature_maps or forward_intermediates")
        _refuse_masks(attn_mask, is_causal)
        self.check_image_size(x)
        *_, (_, x_TD, layout) = self.run(x)
        return layout.to_sequence(self.final_norm(x_TD))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        **options,
    ):
        """As timm's. ``options`` are those that only ``VisionTransformer`` has (``output_dict``)."""
        if self.is_original:
            return super().forward_intermediates(
                x,
                indices,
                return_prefix_tokens,
                norm,
                stop_early,
                output_fmt,
                intermediates_only,
                attn_mask=attn_mask,
                is_causal=is_causal,
                **options,
            )
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"unknown output_fmt {output_fmt!r}; choose NCHW or NLC")
        _refuse_masks(attn_mask, is_causal)
        self.check_image_size(x)
        taken, last = feature_take_indices(len(self.blocks), indices)
        maps, prefixes = [], []
        for index, x_TD, layout in self.run(x, until=last if intermediates_only or stop_early else None):
            if index in taken:
                kept_TD = self.final_norm(x_TD) if norm else x_TD
                map_BDHW = self.fill_map(index, layout, layout.to_map(kept_TD))
                maps.append(map_BDHW.contiguous() if output_fmt == "NCHW" else map_BDHW.flatten(2).transpose(1, 2))
                prefixes.append(layout.prefix(kept_TD))
        with_prefix = return_prefix_tokens and self.num_prefix > 0
        final = None if intermediates_only else layout.to_sequence(self.final_norm(x_TD))
        if options.get("output_dict"):
            outputs = {"image_intermediates": maps}
            outputs |= {"image_intermediates_prefix": prefixes} if with_prefix else {}
            return outputs if final is None else {**outputs, "image_features": final}
        maps = list(zip(maps, prefixes)) if with_prefix else maps
        return maps if final is None else (final, maps)


class AdaptiveVisionTransformer(AdaptiveTimm, VisionTransformer):
    """timm's ``VisionTransformer`` after ``adapt``."""

    def before_blocks(self, x_TD: Tensor) -> Tensor:
        return self.norm_pre(x_TD) if self.pos_embed is None else super().before_blocks(x_TD)


class AdaptiveEva(AdaptiveTimm, Eva):
    """timm's ``Eva`` after ``adapt``."""


_ADAPTED = {VisionTransformer: AdaptiveVisionTransformer, Eva: AdaptiveEva}


def adapt(
    model: nn.Module,
    thresholds: Mapping[int, float] | None = None,
    scorer: str | LearnedScorer = "entropy",
    merge: str = "apt",
    keep_prefix: bool = True,
    **options,
) -> nn.Module:
    """Make a timm ViT adaptive, in place.

    ``forward_features``, ``forward_head``, ``forward_intermediates``, pooling and classifier work as before, and
    return tensors of the same shapes. The weights keep their names; ``merge="apt"`` adds ``adaptive_embed.*``.

    Args:
        model: of class ``VisionTransformer`` or ``Eva``, or one that was adapted before: its settings are replaced, its
            new layers kept if they are still needed (and ``options`` name no file of ``new_layers``). If the settings
            are refused it stays as it is.
        thresholds: merged size in pixels -> threshold in the scorer's units, e.g. {32: 5.5, 64: 5.5} for patches of
            16; None gives timm's own model back.
        scorer, merge: see ``AdaptiveTrunk.set_up``.
        keep_prefix: False leaves CLS and register tokens out, as ViTDet does.
        options: others of ``AdaptiveTrunk.set_up``. ``pixel_mean`` and ``pixel_std`` are by default those of the
            model's ``pretrained_cfg``.

    Returns:
        The same instance.

    Raises:
        FileNotFoundError: no file of a learned scorer.
        TypeError: a model that does not fit, and why.
        ValueError: settings that do not fit together; the message says which.
    """
    original = next((kind for kind, adapted in _ADAPTED.items() if type(model) in (kind, adapted)), None)
    if original is None:
        raise TypeError(_why_not(model))
    kind, settings = type(model), {name: model.__dict__[name] for name in _SETTINGS if name in model.__dict__}
    with_cp, old_layers = model.grad_checkpointing, _restore(model, original)
    if not thresholds and not options and keep_prefix:
        return model
    try:
        _check_fits(model)
        model.__class__ = _ADAPTED[original]
        model.patch_size = model.patch_embed.patch_size[0]
        model.keep_prefix = keep_prefix
        model.num_prefix = model.num_prefix_tokens if keep_prefix else 0
        config = getattr(model, "pretrained_cfg", None) or {}
        for name, key in (("pixel_mean", "mean"), ("pixel_std", "std")):
            if key in config:
                options.setdefault(name, tuple(255 * value for value in config[key]))
        model.set_up(thresholds, scorer, merge, **options)
    except Exception:
        _restore(model, original)
        model.__class__ = kind
        model.__dict__.update(settings)
        model._modules.update(old_layers)
        raise
    finally:
        model.grad_checkpointing = with_cp
    weight = model.patch_embed.proj.weight
    for name in _LAYERS:
        layers, old = getattr(model, name).to(weight.device, weight.dtype), old_layers.get(name)
        is_same = old is not None and _shapes(old) == _shapes(layers)
        if is_same and options.get("new_layers") is None and (name != "adaptive_embed" or settings["merge"] == merge):
            layers.load_state_dict(old.state_dict())
    return model


def _shapes(layers: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in layers.state_dict().items()}


def timm_weights(trunk: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a timm ViT under the names and in the shapes of a model.

    Args:
        trunk: a ``VisionTransformer`` or ``Eva``, adapted or not.
        state_dict: timm's weights of the network; or those of its authors in a form that timm converts (DINOv2, DINOv3,
            MAE, OpenCLIP, ...). Patch embeddings and positions of another size are resampled, and heads, final norms
            and mask tokens that the model has not are left out.
    """
    convert = eva_filter if isinstance(trunk, Eva) else vit_filter
    own = trunk.state_dict()
    return {k: v for k, v in convert(dict(state_dict), trunk).items() if k in own or not k.startswith(_HEADS)}


def load_timm(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load such weights into a timm ViT, adapted or not, strictly but for what ``timm_weights`` leaves out.

    Raises:
        ValueError: names are missing or unknown, or shapes differ; the message lists them.
    """
    load_converted(model, timm_weights(model, state_dict))


_HEADS = ("head.", "head_dist.", "fc_norm.", "attn_pool.", "norm.", "mask_token")

# What ``adapt`` and ``AdaptiveTrunk.set_up`` leave in an instance: settings and new layers.
_SETTINGS = (
    *("patch_size", "keep_prefix", "num_prefix", "thresholds", "scorer", "merge", "padding", "rope_position"),
    *("map_fill", "map_scale", "attention_backend", "window_size", "global_blocks", "pixel_mean", "pixel_std"),
    *("last_layout", "out_indices", "_compile_options", "_fused"),
)
_LAYERS = ("adaptive_embed", "token_adapters", "map_detail")


def _restore(model: nn.Module, original: type) -> dict[str, nn.Module]:
    """Make a model timm's own again; returns the new layers that it had."""
    if isinstance(model, AdaptiveTimm):
        model.release_fused()
    for name in _SETTINGS:
        model.__dict__.pop(name, None)
    model.__class__ = original
    return {name: model._modules.pop(name) for name in _LAYERS if name in model._modules}


def _why_not(model: nn.Module) -> str:
    """Why a model that is neither of timm's two ViT classes cannot be adapted."""
    name = type(model).__name__
    if any("rel_pos" in part or "relative_position" in part for part, _ in model.named_modules()) or any(
        "rel_pos" in part or "relative_position" in part for part, _ in model.named_parameters()
    ):
        reason = "it has relative position biases, which are defined on a regular grid only"
    elif hasattr(model, "stages") or hasattr(model, "layers"):
        reason = "it is a hierarchical network, whose stages need a regular grid"
    else:
        reason = "its class is not one of timm's plain ViTs"
    kinds = " and ".join(kind.__name__ for kind in _ADAPTED)
    return f"{name} cannot be adapted: {reason}; adaptive patches fit timm's {kinds} (exactly these classes)"


def _check_fits(model: nn.Module) -> None:
    """Raise TypeError for what a model does between its images and its first block, and packed patches would not."""
    embed = model.patch_embed
    if type(embed) is not PatchEmbed:
        raise TypeError(f"patch embeddings of class {type(embed).__name__} are not supported, only timm's PatchEmbed")
    if not isinstance(embed.norm, nn.Identity):
        raise TypeError(f"the patch embedding's norm ({type(embed.norm).__name__}) is not supported")
    if embed.patch_size[0] != embed.patch_size[1] or embed.proj.in_channels != 3:
        raise TypeError(f"patches must be square and of RGB images, not {embed.patch_size} of {embed.proj.in_channels}")
    if not (model.patch_drop is None or isinstance(model.patch_drop, nn.Identity)):
        raise TypeError("patch dropout is not supported; create the model with patch_drop_rate=0")
    if getattr(model, "rope", None) is not None:
        check_rope(model.rope)


def _refuse_masks(attn_mask: Tensor | None, is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        raise ValueError("packed attention takes no attn_mask and is not causal; use adapt(model, thresholds=None)")
