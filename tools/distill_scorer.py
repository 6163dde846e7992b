#!/usr/bin/env python
"""Distil a learned scorer for a model from your own images, without labels.

examples:
  python tools/distill_scorer.py vit_small_patch14_dinov2 --weights dinov2_s14.safetensors --images photos/ \\
      --resize 518 --out scorer.safetensors
  python tools/distill_scorer.py seg_configs/eva02_tiny_apt_photoshapes.py --images data/photoshapes/images/training \\
      --weights seg_configs/checkpoints/eva02_tiny_apt_photoshapes.safetensors --out scorer.safetensors
  python tools/distill_scorer.py vit_small_patch14_dinov2 --images photos/ --view 224 --target pooled \\
      --out scorer.safetensors
  python tools/distill_scorer.py llava-1.5-7b-hf/ --images coco/train2017 --out scorer.safetensors

The scorer predicts what merging a patch loses: how much the dense model's output differs within it, be that what a
segmenter's head says (--target head), or which of some clusters of the trunk's features a cell belongs to (--target
features; all other models). Of a segmenter with own_resolution it is how far what the head says of a smaller image is
from what it says of the whole one. Of a classifier it is how much what it says (--target head) or reads (--target
pooled) of the whole image changes. A configuration's own training images are taken unless --images names others.
Then calibrate it: tools/calibrate.py --scorer scorer.safetensors. An interrupted run resumes. Runs without a GPU.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from tools.cli import check_at_least, parser_of
from apt_backbones.distance import merging_off
from apt_backbones.distill import WIDTH, Epoch, ViewSettings, cut_view, make_views, train_scorer
from apt_backbones.files import write_atomically
from apt_backbones.images import read_rgb
from apt_backbones.merging_losses import Losses, Prototypes, cell_losses, image_losses, smaller_image_losses
from tools import steps
from tools.drawing import chart
from tools.frozen_model import Frozen, add_model_arguments, add_target_arguments, frozen_model, images_of, model_key

FITTED_ON = 64  # views whose features are clustered


def losses_of(frozen: Frozen, target: str, views: ViewSettings, paths: Sequence[Path], prototypes: int) -> Losses:
    """What merging loses of the head's probabilities, of the features' clusters, or of what a classifier reads."""
    sizes = tuple(frozen.settings.thresholds)
    if target == "pooled" or (target == "head" and frozen.is_classifier):
        say, kind = (frozen.head, "probabilities") if target == "head" else (frozen.pooled, "features")
        return image_losses(frozen.trunk, lambda pixels: say(frozen.normalized(pixels)), sizes, kind)
    if target == "head":
        say = frozen.head
    else:
        with steps.announced("clustering features"), torch.no_grad(), merging_off(frozen.trunk):
            maps = []
            for path in steps.track(paths[:FITTED_ON], "dense model"):
                view = cut_view(frozen.settings.prepare(read_rgb(path)), views, random.Random(path.name))
                maps.append(frozen.features(frozen.normalized(view[None].float())))
            clusters = Prototypes.fit(maps, prototypes, views.seed)

        def say(images: Tensor) -> Tensor:
            return clusters(frozen.features(images))

    def outputs(pixels: Tensor) -> Tensor:
        with merging_off(frozen.trunk):
            return say(frozen.normalized(pixels))

    at_own_resolution = target == "head" and frozen.own_resolution
    return smaller_image_losses(outputs, sizes) if at_own_resolution else cell_losses(outputs, sizes)


def plot(path: Path, curve: list[Epoch]) -> None:
    """Loss and correlation over the epochs."""
    figure, (losses, quality) = chart((10, 4), 2)
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
    write_atomically(path, lambda unfinished: figure.savefig(unfinished, dpi=150))


def main() -> None:
    parser = parser_of(__doc__)
    add_model_arguments(parser, "the scorer goes")
    add_target_arguments(parser)
    add = parser.add_argument
    add("--copies", type=int, default=6, help="random views per image (default: 6)")
    add("--prototypes", type=int, default=64, help="clusters of features (default: 64)")
    add("--epochs", type=int, default=24, help="passes over the views (default: 24)")
    add("--sample", type=int, default=1000, metavar="N", help="use at most so many images (default: 1000)")
    add("--work-dir", type=Path, help="for what is kept of an unfinished run (default: beside --out)")
    args = parser.parse_args()
    check_at_least(args, copies=1, prototypes=2, epochs=1, sample=1, resize=1)
    torch.manual_seed(args.seed)
    frozen = frozen_model(args.model, args.weights, args.sizes, args.resize)
    target = frozen.target(args.target)
    paths, chance = images_of(args), random.Random(args.seed)
    if len(paths) < 2:
        raise ValueError(f"{len(paths)} images are too few to learn from some and to hold out others")
    paths = chance.sample(paths, min(args.sample, len(paths)))
    held_out, paths = paths[: max(1, len(paths) // 10)], paths[max(1, len(paths) // 10) :]
    sizes = tuple(frozen.settings.thresholds)
    views = frozen.views(args.view, read_rgb(paths[0]), max(sizes), copies=args.copies, seed=args.seed)
    model, weights = model_key(args)
    origin = {
        "model": args.model,
        "weights": weights or "its own",
        "target": target,
        **({"prototypes": args.prototypes} if target == "features" else {}),
        "images": len(paths),
        "view": views.size,
    }
    listed = [steps.stamps(part) for part in (paths, held_out)]
    key = steps.digest([model, origin, views, args.resize, sizes, listed, WIDTH])
    folder = (args.work_dir or args.out.parent / f".{args.out.stem}_distilling") / key
    frozen.model.to(args.device)
    losses = losses_of(frozen, target, views, paths, args.prototypes)
    made = {}
    for name, part in (("training", paths), ("held-out", held_out)):
        with steps.announced(f"{name} views: {args.copies} of each of {len(part)} images"):
            made[name] = make_views(
                part,
                losses,
                sizes,
                views,
                folder / name,
                frozen.settings.prepare,
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
        frozen.trunk.projection(),
        frozen.trunk.pixel_mean,
        frozen.trunk.pixel_std,
        epochs=args.epochs,
        seed=args.seed,
        state=folder / f"training_{args.epochs}.pth",
        report=report,
    )
    best = min(curve, key=lambda epoch: epoch.held_out)
    scorer.origin = {**origin, "epoch": best.epoch, "correlation": round(best.correlation, 3)}
    scorer.save(args.out)
    if args.plot:
        plot(args.plot, curve)
    print(
        f"{args.out}: held-out correlation {best.correlation:.3f}; of the avoidable loss {best.avoided:.1%} is avoided "
        f"when half of the patches merge\n{json.dumps(scorer.origin)}"
    )


if __name__ == "__main__":
    steps.run(main)
