#!/usr/bin/env python
"""Distil a learned scorer for a model from your own images, without labels.

examples:
  python tools/distill_scorer.py vit_small_patch14_dinov2 --weights dinov2_s14.safetensors --images photos/ \\
      --resize 518 --out scorer.safetensors
  python tools/distill_scorer.py seg_configs/eva02_tiny_apt_photoshapes.py --images data/photoshapes/images/training \\
      --weights seg_configs/checkpoints/eva02_tiny_apt_photoshapes.safetensors --out scorer.safetensors

The scorer predicts how much the dense model's output differs within a patch. That output is what a segmenter's head
says (--target head), or which of some clusters of the trunk's features a cell belongs to (--target features; all other
models). Then calibrate it: tools/calibrate.py --scorer scorer.safetensors. An interrupted run goes on where it stopped.
Runs without a GPU.
"""

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import steps
import torch
from cli import parser_of
from patch_settings import PatchSettings, settings_of, with_longest_side
from torch import Tensor

from apt_backbones.distance import dense_features
from apt_backbones.distill import Epoch, Prototypes, ViewSettings, cut_view, make_views, train_scorer
from apt_backbones.images import find_images, read_rgb
from apt_backbones.scores import check_sizes
from apt_backbones.trunk import AdaptiveTrunk

TARGETS = ("head", "features")
FITTED_ON = 64  # views whose features are clustered
LARGEST_VIEW = 512


class Dense(NamedTuple):
    """The frozen model that a scorer is distilled from.

    Attributes:
        trunk: its trunk.
        settings: its patches, and how large it sees images.
        features: normalized images to feature maps (B, C, H, W).
        head: normalized images to a segmenter's probabilities; None where there is no such head.
    """

    trunk: AdaptiveTrunk
    settings: PatchSettings
    features: Callable[[Tensor], Tensor]
    head: Callable[[Tensor], Tensor] | None


def of_config(config: str, weights: str) -> Dense:
    """The model of a detection or segmentation configuration."""
    from mm_model import MMModel

    from apt_backbones.distance import merging_off

    mm = MMModel(config, weights)

    def head(images: Tensor) -> Tensor:
        metas = [dict(img_shape=images.shape[2:], ori_shape=images.shape[2:], pad_shape=images.shape[2:])] * len(images)
        with merging_off(mm.trunk):
            logits = mm.model.encode_decode(images, metas)
        if logits.shape[1] == 1:
            return torch.cat([logits.sigmoid(), 1 - logits.sigmoid()], 1)
        return logits.softmax(1)

    def features(images: Tensor) -> Tensor:
        return torch.cat(dense_features(mm.trunk, images), 1)

    return Dense(mm.trunk, settings_of(config), features, head if hasattr(mm.model, "decode_head") else None)


def of_timm(name: str, weights: str | None, sizes: list[int] | None) -> Dense:
    """A timm ViT, whose maps after half, three quarters and all of the blocks are taken."""
    import timm

    from apt_backbones import adapt, read_checkpoint
    from apt_backbones.backbones.timm_vit import load_timm

    if name not in timm.list_models():
        raise ValueError(f"{name} is neither a configuration file nor a model of timm's")
    vit = timm.create_model(name, pretrained=weights is None, num_classes=0, dynamic_img_size=True)
    patch_size = vit.patch_embed.patch_size[0]
    sizes = check_sizes(sorted(sizes or [2 * patch_size]))
    trunk = adapt(vit, dict.fromkeys(sizes, 0.0), merge="resizing")
    if weights is not None:
        load_timm(trunk, read_checkpoint(weights))
    depth = len(trunk.blocks)
    indices = (depth // 2 - 1, 3 * depth // 4 - 1, depth - 1)

    def features(images: Tensor) -> Tensor:
        trunk.thresholds = {}
        return torch.cat(trunk.feature_maps(images, indices, norm=True), 1)

    longest = max(vit.patch_embed.img_size)
    settings = PatchSettings(patch_size, dict(trunk.thresholds), "entropy", with_longest_side(longest))
    return Dense(trunk.eval().requires_grad_(False), settings, features, None)


def view_size(args: argparse.Namespace, dense: Dense, image) -> tuple[int, int]:
    """Height and width of a view: what is asked for, or what the model sees of an image, in whole largest patches."""
    largest = max(dense.settings.thresholds)
    sides = args.view or [min(side, LARGEST_VIEW) for side in dense.settings.prepare(image).size[::-1]]
    return tuple(max(2, side // largest) * largest for side in (sides * 2)[:2])


def plot(path: Path, curve: list[Epoch]) -> None:
    """Loss and correlation over the epochs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (losses, quality) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    epochs = [line.epoch for line in curve]
    losses.plot(epochs, [line.train for line in curve], label="training views")
    losses.plot(epochs, [line.held_out for line in curve], label="held-out images")
    losses.set(xlabel="epoch", ylabel="negative log likelihood")
    quality.plot(epochs, [line.correlation for line in curve], label="correlation of log losses")
    quality.plot(epochs, [line.avoided for line in curve], label="avoidable loss avoided, half merged")
    quality.set(xlabel="epoch", ylim=(0, 1))
    for axes in (losses, quality):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("model", help="configuration of an adaptive detector or segmenter, or the name of a timm ViT")
    add("--images", nargs="+", required=True, metavar="IMAGE|DIR", help="images like yours; no labels are needed")
    add("--weights", metavar="FILE", help="of the model (default for timm: its own, downloaded)")
    add("--out", type=Path, required=True, metavar="FILE", help="where the scorer goes, a .safetensors file")
    add("--target", choices=TARGETS, help="default: head for segmenters, features for all others")
    add("--sizes", type=int, nargs="+", help="merged patch sizes (default: the config's, or twice the base patch)")
    add("--resize", type=int, metavar="PIXELS", help="longer image side that the model sees")
    add("--view", type=int, nargs="+", metavar="PIXELS", help="side, or height and width, of training views")
    add("--copies", type=int, default=2, help="random views per image (default: 2)")
    add("--prototypes", type=int, default=64, help="clusters of features (default: 64)")
    add("--epochs", type=int, default=40, help="passes over the views (default: 40)")
    add("--sample", type=int, default=1000, metavar="N", help="use at most so many images (default: 1000)")
    add("--seed", type=int, default=0, help="of everything that is random (default: 0)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: a GPU if there is one")
    add("--work-dir", type=Path, help="for what is kept of an unfinished run (default: beside --out)")
    add("--plot", type=Path, metavar="PNG", help="also plot the curve")
    args = parser.parse_args()
    if args.out.suffix != ".safetensors":
        raise ValueError(f"--out must name a .safetensors file, got {args.out}")
    if args.view and len(args.view) > 2:
        raise ValueError("--view takes one side, or height and width")
    is_config = Path(args.model).suffix == ".py"
    if is_config and not args.weights:
        raise ValueError("a configuration needs --weights")
    if is_config and args.sizes:
        raise ValueError("a configuration has its own sizes; leave out --sizes")
    dense = of_config(args.model, args.weights) if is_config else of_timm(args.model, args.weights, args.sizes)
    if args.target == "head" and dense.head is None:
        raise ValueError(f"{args.model} has no segmentation head; use --target features")
    target = args.target or ("head" if dense.head else "features")
    prepare = with_longest_side(args.resize) if args.resize else dense.settings.prepare
    dense = dense._replace(settings=dense.settings.__class__(**{**vars(dense.settings), "prepare": prepare}))

    paths, chance = find_images(args.images), random.Random(args.seed)
    if len(paths) < 10:
        raise ValueError(f"{len(paths)} images are too few to learn from and to hold some out; give at least 10")
    paths = chance.sample(paths, min(args.sample, len(paths)))
    held_out, paths = paths[: max(1, len(paths) // 10)], paths[max(1, len(paths) // 10) :]
    sizes = tuple(dense.settings.thresholds)
    views = ViewSettings(view_size(args, dense, read_rgb(paths[0])), copies=args.copies, seed=args.seed)
    origin = {
        "model": args.model,
        "weights": steps.fingerprint(args.weights) if args.weights else "timm's",
        "target": target,
        **({} if target == "head" else {"prototypes": args.prototypes}),
        "images": len(paths),
        "view": views.size,
    }
    listed = [[str(path) for path in part] for part in (paths, held_out)]
    key = steps.digest([origin, views, args.resize, sizes, listed])
    folder = (args.work_dir or args.out.parent / f".{args.out.stem}_distilling") / key
    trunk = dense.trunk.to(args.device)
    mean, std = (torch.tensor(x, device=args.device).view(3, 1, 1) for x in (trunk.pixel_mean, trunk.pixel_std))

    def normalized(pixels: Tensor) -> Tensor:
        return (pixels.to(args.device) - mean) / std

    if target == "head":

        def outputs(pixels: Tensor) -> Tensor:
            return dense.head(normalized(pixels))

    else:
        with steps.announced("clustering features"), torch.no_grad():
            some = [cut_view(prepare(read_rgb(path)), views, random.Random(path.name)) for path in paths[:FITTED_ON]]
            maps = [dense.features(normalized(view[None].float())) for view in some]
            prototypes = Prototypes.fit(maps, args.prototypes, args.seed)

        def outputs(pixels: Tensor) -> Tensor:
            return prototypes(dense.features(normalized(pixels)))

    made = {}
    for name, part in (("training", paths), ("held-out", held_out)):
        with steps.announced(f"{name} views: {args.copies} of each of {len(part)} images"):
            made[name] = make_views(
                part,
                outputs,
                sizes,
                views,
                folder / name,
                prepare,
                report=lambda jobs: steps.track(jobs, "dense model"),
            )

    def report(epoch: Epoch) -> None:
        steps.console.print(
            f"epoch {epoch.epoch}/{args.epochs}: loss {epoch.train:.3f}, held out {epoch.held_out:.3f}, correlation "
            f"{epoch.correlation:.3f}, avoided {epoch.avoided:.1%}",
            highlight=False,
        )

    scorer, curve = train_scorer(
        [made["training"]],
        [made["held-out"]],
        trunk.projection(),
        trunk.pixel_mean,
        trunk.pixel_std,
        epochs=args.epochs,
        seed=args.seed,
        state=folder / f"training_{args.epochs}.pth",
        report=report,
    )
    best = min(curve, key=lambda epoch: epoch.held_out)
    scorer.origin = {**origin, "epoch": best.epoch, "correlation": round(best.correlation, 3)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    scorer.save(args.out)
    if args.plot:
        plot(args.plot, curve)
    print(
        f"{args.out}: held-out correlation {best.correlation:.3f}; of the avoidable loss {best.avoided:.1%} is avoided "
        f"when half of the patches merge\n{json.dumps(scorer.origin)}"
    )


if __name__ == "__main__":
    steps.run(main)
