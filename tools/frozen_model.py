"""A frozen model whose outputs other layers are trained on without labels: of an mm configuration, a LLaVA's vision
tower, or a timm ViT."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from apt_backbones.distill import ViewSettings
from apt_backbones.images import find_images
from apt_backbones.scores import check_sizes
from apt_backbones.selection import normalize
from apt_backbones.trunk import AdaptiveTrunk
from tools.machine import add_device_argument
from tools.patch_settings import PatchSettings, settings_of, with_longest_side
from tools.steps import digest, fingerprint, stamps

if TYPE_CHECKING:
    from mmengine.config import Config

TARGETS = ("head", "features", "pooled")
LARGEST_VIEW = 512


ANY_MODEL = "configuration of an adaptive model, folder of a LLaVA, or name of a timm ViT"


def add_model_arguments(parser: argparse.ArgumentParser, what: str, model: str = ANY_MODEL) -> None:
    """The flags of a tool that trains ``what`` on one of a frozen model's outputs."""
    add = parser.add_argument
    add("model", help=model)
    add(
        "--images",
        nargs="+",
        metavar="IMAGE|DIR",
        help="images like yours; no labels are needed (default: the configuration's training images)",
    )
    add("--weights", metavar="FILE", help="of the model (default: its trunk's own, which timm's models download)")
    add("--out", type=_safetensors, required=True, metavar="FILE", help=f"where {what}, a .safetensors file")
    add("--view", type=int, nargs="+", metavar="PIXELS", help="side, or height and width, of training views")
    add("--seed", type=int, default=0, help="of everything that is random (default: 0)")
    add_device_argument(parser)
    add("--plot", type=Path, metavar="PNG", help="also plot the curve")


def add_target_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of a tool whose model may be any, and what is learned of it chosen."""
    add = parser.add_argument
    add("--target", choices=TARGETS, help="default: head for segmenters and classifiers, features for all others")
    add("--sizes", type=int, nargs="+", help="merged patch sizes (default: the config's, or twice the base patch)")
    add("--resize", type=int, metavar="PIXELS", help="longer image side that the model sees")


def _safetensors(text: str) -> Path:
    if Path(text).suffix != ".safetensors":
        raise argparse.ArgumentTypeError(f"must name a .safetensors file, got {text}")
    return Path(text)


def images_of(args: argparse.Namespace) -> list[Path]:
    """Those that the flags name, or else the training images of the configuration.

    Raises:
        FileNotFoundError, ValueError: there are none.
    """
    if args.images:
        return find_images(args.images)
    if Path(args.model).suffix != ".py":
        raise ValueError(f"{args.model} is no configuration, which would have training images; name some with --images")
    from tools.mm_config import training_images

    return training_images(args.model)


def model_key(args: argparse.Namespace) -> list[str | None]:
    """What stands for the model that the flags name: the content of its configuration and of its weights; of a LLaVA's
    folder, which holds many gigabytes, names, sizes and dates of these files."""
    model, weights = args.model, args.weights
    if Path(model).suffix == ".py":
        from tools.mm_config import backbone_weights, read_config

        cfg = read_config(model)
        model, weights = digest(cfg.to_dict()), weights or backbone_weights(cfg)
    elif Path(model).is_dir():
        files = [file for pattern in ("*config.json", "*model*") for file in sorted(Path(model).glob(pattern))]
        model = stamps(files)
    return [model, weights and fingerprint(weights)]


class Frozen(NamedTuple):
    """The model.

    Attributes:
        model: the whole.
        trunk: its trunk, with the present thresholds of which the following run.
        settings: its patches, and how large it sees images.
        features: normalized images to feature maps (B, C, H, W).
        head: normalized images to the probabilities of a segmenter (B, classes, ...) or a classifier (B, classes); None
            where there is neither.
        pooled: normalized images to what a classifier reads (B, C); None where nothing is pooled.
        is_classifier: whether the head is a classifier's.
        own_resolution: whether a segmenter reads merged patches at their own resolution.
    """

    model: nn.Module
    trunk: AdaptiveTrunk
    settings: PatchSettings
    features: Callable[[Tensor], Tensor]
    head: Callable[[Tensor], Tensor] | None
    pooled: Callable[[Tensor], Tensor] | None = None
    is_classifier: bool = False
    own_resolution: bool = False

    def seeing(self, longest: int) -> "Frozen":
        """The same model, which sees images with another longest side in pixels."""
        return self._replace(settings=replace(self.settings, prepare=with_longest_side(longest)))

    def target(self, asked: str | None) -> str:
        """What is learned from: what is asked for, else "head" where there is one and "features" for all others.

        Raises:
            ValueError: the head of a model that has none, or pooled features where nothing is pooled.
        """
        if asked == "head" and self.head is None:
            raise ValueError(
                "the model has no head that segments or classifies, or no --weights of it are given; use --target "
                "features"
            )
        if asked == "pooled" and self.pooled is None:
            raise ValueError("pooled features are those of classifiers and timm's models; use --target features")
        return asked or ("features" if self.head is None else "head")

    def views(self, asked: Sequence[int] | None, image: Image.Image, unit: int, **options) -> ViewSettings:
        """Of the height and width that are asked for, or of all of an image, in whole units of so many pixels.
        Classifiers see no padding, so their views are filled.

        Raises:
            ValueError: more than two sides are asked for, or what is asked for or the image holds no unit.
        """
        if asked and len(asked) > 2:
            raise ValueError("--view takes one side, or height and width")
        seen = self.settings.prepare(image).size[::-1]
        if not asked and min(seen) < unit:
            raise ValueError(
                f"the model sees the first image as {seen[0]} x {seen[1]} pixels, which hold no patch of {unit}; give "
                "larger --images"
            )
        if asked and min(asked) < unit:
            raise ValueError(
                f"--view {' '.join(map(str, asked))} holds no patch of {unit} pixels; give at least {2 * unit}"
            )
        sides = asked or [min(side, LARGEST_VIEW) for side in seen]
        height, width = (max(2, side // unit) * unit for side in (*sides, *sides)[:2])
        scales = {"scales": (1.0, 1.4)} if self.is_classifier else {}
        return ViewSettings((height, width), **scales, **options)

    def normalized(self, pixels: Tensor) -> Tensor:
        """Images (B, 3, height, width) in 0..255 as the trunk takes them, on its device."""
        pixels = pixels.to(self.trunk.projection().weight.device)
        return normalize(pixels, self.trunk.pixel_mean, self.trunk.pixel_std)


def frozen_model(
    name: str,
    weights: str | None,
    sizes: Sequence[int] | None,
    longest: int | None = None,
    **options,
) -> Frozen:
    """The model of a configuration file, the vision tower of a LLaVA's folder, or timm's model of a name.

    Args:
        name: of the file, folder or model.
        weights: of the model; None downloads timm's, and takes those that a configuration's backbone names, without a
            head. A folder holds its own.
        sizes: merged patch sizes, for all but configurations.
        longest: longer side in pixels that it sees images with, instead of its own.
        options: of ``adapt``, for all but configurations; by default there are no new layers.

    Raises:
        FileNotFoundError, ValueError: there is no such model, or what is given does not go with it.
    """
    options = {"merge": "resizing", **options}
    if Path(name).is_dir():
        if weights:
            raise ValueError("the folder of a LLaVA holds its weights; leave out --weights")
        frozen = _of_llava(name, sizes, options)
    elif Path(name).suffix == ".py":
        if sizes:
            raise ValueError("a configuration has its own sizes; leave out --sizes")
        frozen = _of_config(name, weights)
    else:
        frozen = _of_timm(name, weights, sizes, options)
    return frozen.seeing(longest) if longest else frozen


def _of_config(config: str, weights: str | None) -> Frozen:
    from tools.mm_config import is_classifier, read_config
    from tools.mm_model import MMModel

    if is_classifier(cfg := read_config(config)):
        return _of_classifier(config, cfg, weights)
    mm = MMModel(config, weights)

    def probabilities(images: Tensor) -> Tensor:
        shape = tuple(images.shape[2:])
        metas = [dict(img_shape=shape, ori_shape=shape, pad_shape=shape)] * len(images)
        logits = mm.model.encode_decode(images, metas)
        if logits.shape[1] == 1:
            return torch.cat([logits.sigmoid(), 1 - logits.sigmoid()], 1)
        return logits.softmax(1)

    def features(images: Tensor) -> Tensor:
        return torch.cat(mm.model.backbone(images), 1)

    head = probabilities if weights and hasattr(mm.model, "decode_head") else None
    own_resolution = getattr(mm.model, "own_resolution", False)
    return Frozen(mm.model, mm.trunk, settings_of(config), features, head, own_resolution=own_resolution)


def _of_classifier(config: str, cfg: "Config", weights: str | None) -> Frozen:
    from tools.mm_model import adaptive_model

    cfg.model.model_options = {**cfg.model.get("model_options", {}), "dynamic_img_size": True}  # for views of any size
    model, trunk = adaptive_model(cfg, weights)

    def head(images: Tensor) -> Tensor:
        return trunk(images).float().softmax(1)

    def pooled(images: Tensor) -> Tensor:
        return trunk.forward_head(trunk.forward_features(images), pre_logits=True)

    return Frozen(model, trunk, settings_of(config), _normed_maps_of(trunk), head, pooled, True)


def _normed_maps_of(trunk: AdaptiveTrunk) -> Callable[[Tensor], Tensor]:
    return lambda images: torch.cat(trunk.feature_maps(images, norm=True), 1)


def _of_timm(name: str, weights: str | None, sizes: Sequence[int] | None, options: dict) -> Frozen:
    """Its features are the maps after half, three quarters and all of the blocks."""
    import timm

    from apt_backbones import read_checkpoint
    from apt_backbones.backbones.timm_vit import load_timm

    if not timm.is_model(name):
        raise ValueError(f"{name} is neither a configuration file, nor a folder, nor a model of timm's")
    try:
        vit = timm.create_model(name, pretrained=weights is None, num_classes=0, dynamic_img_size=True)
        depth, longest = len(vit.blocks), max(vit.patch_embed.img_size)
    except (AttributeError, TypeError) as error:  # the first: of hierarchical networks, the second: of others
        raise ValueError(f"{name} is no plain ViT: {error}") from error
    out_indices = (depth // 2 - 1, 3 * depth // 4 - 1, depth - 1)
    if weights is not None:
        load_timm(vit, read_checkpoint(weights))
    frozen = _of_vit(vit, sizes, with_longest_side(longest), {"out_indices": out_indices, **options})
    return frozen._replace(pooled=frozen.trunk)


def _of_llava(folder: str, sizes: Sequence[int] | None, options: dict) -> Frozen:
    """Its vision tower; the features are those that the language model gets, before they are projected."""
    from llava_apt.timm_tower import timm_tower

    return _of_vit(timm_tower(Path(folder)), sizes, settings_of(folder).prepare, options)


def _of_vit(vit: nn.Module, sizes: Sequence[int] | None, prepare: Callable, options: dict) -> Frozen:
    from apt_backbones import adapt

    patch_size = vit.patch_embed.patch_size[0]
    sizes = check_sizes(sorted(sizes or [2 * patch_size]))
    trunk = adapt(vit, dict.fromkeys(sizes, 0.0), **options).eval()
    settings = PatchSettings(patch_size, dict(trunk.thresholds), "entropy", prepare)
    return Frozen(trunk, trunk, settings, _normed_maps_of(trunk), None)
