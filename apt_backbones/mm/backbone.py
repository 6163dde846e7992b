"""Adaptive trunks as backbones that mmdet and mmseg configs can name."""

from collections.abc import Iterator, Sequence

import timm
import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..backbones import eva02
from ..backbones.timm_vit import adapt, load_timm
from ..checkpoint import load_pretrained, read_checkpoint
from ..freeze import freeze
from ..layout import PatchLayout


class SafeBackbone:
    """What all backbones here add to mmengine's ``BaseModule``.

    ``init_cfg=dict(type="Pretrained", checkpoint=FILE)`` starts training from a file that is read safely and loaded
    strictly; ``prefix`` takes a part of its weights. Other types, alone or in a list, are mmengine's own initializers.

    ``frozen=True``: its weights do not train (a linear probe, or heads that learn to read merged patches). Those of the
    new layers do.

    ``test_dtype="float16"`` or ``"bfloat16"`` computes the trunk in that precision on a GPU when no gradients are
    needed, and returns float32 maps. (Under autocast of a whole test, mmdet places anchors in half precision, which
    is too coarse for large images.)
    """

    test_dtype: torch.dtype | None = None

    def computed(self, images: Tensor) -> tuple[tuple[Tensor, ...], PatchLayout]:
        raise NotImplementedError

    def load_pretrained(self, state_dict: dict[str, Tensor]) -> None:
        raise NotImplementedError

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.with_layout(images)[0]

    def with_layout(self, images: Tensor) -> tuple[tuple[Tensor, ...], PatchLayout]:
        """What ``forward`` returns, and where the tokens are that it was made of."""
        if self.test_dtype is None or not images.is_cuda or torch.is_grad_enabled():
            return self.computed(images)
        with torch.autocast("cuda", self.test_dtype):
            maps, layout = self.computed(images)
        return tuple(x.float() for x in maps), layout

    def init_weights(self) -> None:
        if self.is_init:
            return
        given = self.init_cfg
        configs = given if isinstance(given, list) else [given] if given else []
        files = [config for config in configs if config["type"] in ("Pretrained", "mmengine.Pretrained")]
        # Networks initialize themselves when they are built; mmengine would have timm's do so again.
        if len(files) < len(configs):
            self.init_cfg = [config for config in configs if config not in files]
            super().init_weights()
            self.init_cfg = given
        for config in files:
            state_dict, prefix = read_checkpoint(config["checkpoint"]), config.get("prefix")
            if prefix:
                prefix = prefix.removesuffix(".") + "."
                state_dict = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
            self.load_pretrained(state_dict)
        self.is_init = True


@MODELS.register_module()
class APTEva02(SafeBackbone, eva02.APTEva02, BaseModule):
    """``apt_backbones.APTEva02``; all its arguments, and those of ``SafeBackbone``.

    ``init_cfg``'s file may hold what ``load_pretrained`` takes.
    """

    def __init__(
        self,
        *args,
        init_cfg: dict | None = None,
        frozen: bool = False,
        test_dtype: str | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.init_cfg = init_cfg
        if frozen:
            freeze(self)
        self.test_dtype = None if test_dtype is None else getattr(torch, test_dtype)

    def computed(self, images: Tensor) -> tuple[tuple[Tensor, ...], PatchLayout]:
        return self.maps_and_layout(images)

    def load_pretrained(self, state_dict: dict[str, Tensor]) -> None:
        load_pretrained(self, state_dict)


@MODELS.register_module()
class APTTimm(SafeBackbone, BaseModule):
    """Any timm ViT that ``apt_backbones.adapt`` takes, as a backbone: DINOv3, DINOv2, MAE, SigLIP, augreg, ...

    Args:
        model: timm's name, e.g. "vit_base_patch16_dinov3"; ``timm.list_models("*dinov3*")`` lists them.
        checkpoint: file with weights: timm's, the authors' where timm converts them, or a whole model of ours, of which
            the backbone is taken.
        img_size: side in pixels that learned positions are made for; None for the model's own. Images of other sizes
            work; positions are interpolated as the network's authors do it.
        out_indices: blocks after which a feature map is returned.
        norm: apply the final norm to the maps, as DINO's linear probes do.
        keep_prefix: False leaves out CLS and register tokens, as ViTDet does.
        drop_path_rate: of timm's blocks.
        with_cp: recompute block activations in the backward pass instead of storing them.
        thresholds, scorer, merge: see ``AdaptiveTrunk.set_up``; ``options`` are its others.
        init_cfg, frozen, test_dtype: see ``SafeBackbone``.

    Raises:
        TypeError, ValueError: as ``adapt``.
    """

    def __init__(
        self,
        model: str,
        checkpoint: str | None = None,
        frozen: bool = False,
        img_size: int | None = None,
        out_indices: Sequence[int] = (-1,),
        norm: bool = False,
        keep_prefix: bool = True,
        drop_path_rate: float = 0.0,
        with_cp: bool = False,
        thresholds: dict[int, float] | None = None,
        scorer: str = "entropy",
        merge: str = "apt",
        init_cfg: dict | None = None,
        test_dtype: str | None = None,
        **options,
    ):
        if checkpoint is not None:
            init_cfg = dict(type="Pretrained", checkpoint=checkpoint)
        super().__init__(init_cfg)
        size = {} if img_size is None else {"img_size": img_size}
        trunk = timm.create_model(model, num_classes=0, dynamic_img_size=True, drop_path_rate=drop_path_rate, **size)
        # Without an option it would stay timm's own model where nothing merges.
        options.setdefault("padding", "coarsest")
        self.trunk = adapt(trunk, thresholds, scorer, merge, keep_prefix, out_indices=out_indices, **options)
        self.trunk.with_cp = with_cp
        # Processes that train together would wait for gradients of what no map depends on.
        for unused in _unused(self.trunk, norm):
            unused.requires_grad_(False)
        if frozen:
            freeze(self.trunk)
        self.norm = norm
        self.test_dtype = None if test_dtype is None else getattr(torch, test_dtype)

    def computed(self, images: Tensor) -> tuple[tuple[Tensor, ...], PatchLayout]:
        return self.trunk.maps_and_layout(images, norm=self.norm)

    def load_pretrained(self, state_dict: dict[str, Tensor]) -> None:
        prefix = "backbone.trunk."
        of_backbone = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        load_timm(self.trunk, of_backbone or state_dict)


def _unused(trunk: nn.Module, norm: bool) -> Iterator[nn.Module | nn.Parameter]:
    """Parts of a timm ViT that feature maps do not depend on."""
    yield from trunk.blocks[max(trunk.out_indices) + 1 :]
    heads = ("fc_norm", "attn_pool") if norm else ("norm", "fc_norm", "attn_pool")
    prefix = () if trunk.num_prefix else ("cls_token", "reg_token")
    yield from (part for name in (*heads, *prefix) if (part := getattr(trunk, name, None)) is not None)
