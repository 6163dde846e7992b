"""A frozen model whose outputs other layers are trained on without labels: an mm configuration's, or a timm ViT."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from apt_backbones.scores import check_sizes
from apt_backbones.trunk import AdaptiveTrunk
from tools.patch_settings import PatchSettings, settings_of, with_longest_side

TARGETS = ("head", "features")


class Frozen(NamedTuple):
    """The model.

    Attributes:
        model: the whole.
        trunk: its trunk, with the present thresholds of which the following run.
        settings: its patches, and how large it sees images.
        features: normalized images to feature maps (B, C, H, W).
        head: normalized images to a segmenter's probabilities (B, classes, ...); None where there is no such head.
    """

    model: nn.Module
    trunk: AdaptiveTrunk
    settings: PatchSettings
    features: Callable[[Tensor], Tensor]
    head: Callable[[Tensor], Tensor] | None

    def target(self, asked: str | None) -> str:
        """What is learned from: "head" for segmenters if nothing is asked for, else "features".

        Raises:
            ValueError: the head of a model that has none.
        """
        if asked == "head" and self.head is None:
            raise ValueError("the model has no segmentation head; use --target features")
        return asked or ("features" if self.head is None else "head")

    def normalized(self, pixels: Tensor) -> Tensor:
        """Images (B, 3, height, width) in 0..255 as the trunk takes them, on its device."""
        device = self.trunk.projection().weight.device
        mean, std = (
            torch.tensor(x, device=device).view(3, 1, 1) for x in (self.trunk.pixel_mean, self.trunk.pixel_std)
        )
        return (pixels.to(device) - mean) / std


def frozen_model(
    name: str, weights: str | None, sizes: Sequence[int] | None, merge: str, longest: int | None = None
) -> Frozen:
    """The model of a configuration file, or timm's of a name.

    Args:
        name: of the file, or of the model.
        weights: of the model; None downloads timm's.
        sizes: merged patch sizes, for timm's models.
        merge: see ``AdaptiveTrunk.set_up``, for timm's models.
        longest: longer side in pixels that it sees images with, instead of its own.

    Raises:
        FileNotFoundError, ValueError: there is no such model, or what is given does not go with it.
    """
    if Path(name).suffix == ".py":
        if not weights:
            raise ValueError("a configuration needs --weights")
        if sizes:
            raise ValueError("a configuration has its own sizes; leave out --sizes")
        frozen = _of_config(name, weights)
    else:
        frozen = _of_timm(name, weights, sizes, merge)
    if longest:
        settings = PatchSettings(**{**vars(frozen.settings), "prepare": with_longest_side(longest)})
        frozen = frozen._replace(settings=settings)
    return frozen


def _of_config(config: str, weights: str) -> Frozen:
    from tools.mm_model import MMModel

    mm = MMModel(config, weights)

    def head(images: Tensor) -> Tensor:
        shape = tuple(images.shape[2:])
        metas = [dict(img_shape=shape, ori_shape=shape, pad_shape=shape)] * len(images)
        logits = mm.model.encode_decode(images, metas)
        if logits.shape[1] == 1:
            return torch.cat([logits.sigmoid(), 1 - logits.sigmoid()], 1)
        return logits.softmax(1)

    def features(images: Tensor) -> Tensor:
        return torch.cat(mm.trunk.feature_maps(images), 1)

    has_head = hasattr(mm.model, "decode_head")
    return Frozen(mm.model, mm.trunk, settings_of(config), features, head if has_head else None)


def _of_timm(name: str, weights: str | None, sizes: Sequence[int] | None, merge: str) -> Frozen:
    """Its features are the maps after half, three quarters and all of the blocks."""
    import timm

    from apt_backbones import adapt, read_checkpoint
    from apt_backbones.backbones.timm_vit import load_timm

    if name not in timm.list_models():
        raise ValueError(f"{name} is neither a configuration file nor a model of timm's")
    vit = timm.create_model(name, pretrained=weights is None, num_classes=0, dynamic_img_size=True)
    patch_size = vit.patch_embed.patch_size[0]
    sizes = check_sizes(sorted(sizes or [2 * patch_size]))
    longest = max(vit.patch_embed.img_size)
    trunk = adapt(vit, dict.fromkeys(sizes, 0.0), merge=merge).eval()
    if weights is not None:
        load_timm(trunk, read_checkpoint(weights))
    depth = len(trunk.blocks)
    indices = (depth // 2 - 1, 3 * depth // 4 - 1, depth - 1)

    def features(images: Tensor) -> Tensor:
        return torch.cat(trunk.feature_maps(images, indices, norm=True), 1)

    settings = PatchSettings(patch_size, dict(trunk.thresholds), "entropy", with_longest_side(longest))
    return Frozen(trunk, trunk, settings, features, None)
