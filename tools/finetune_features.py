#!/usr/bin/env python
"""Train a model's new layers on your own images, without labels.

examples:
  python tools/finetune_features.py det_configs/eva02_tiny_apt_photoshapes.py \\
      --images data/photoshapes/images/training \\
      --weights det_configs/checkpoints/eva02_tiny_apt_photoshapes.safetensors --out new_layers.safetensors
  python tools/finetune_features.py vit_small_patch14_dinov2 --weights dinov2_s14.safetensors --images photos/ \\
      --resize 518 --scorer scorer.safetensors --keep 0.6 --out new_layers.safetensors

With merging the model learns to say what it says without: a segmenter's probabilities, the trunk's features, or what
a classifier reads of them (--target pooled). A configuration says which new layers it has; for a timm model --train
does: ConvDown and ZeroMLP ("embedding"), low-rank adapters of merged tokens in every block ("adapters"), the detail of
feature maps within patches ("maps", map_fill="learned"), or several. The file holds the new layers only. An interrupted
run resumes. Runs without a GPU.
"""

from pathlib import Path

import torch
from torch import Tensor

from tools.cli import check_at_least, check_shares, parser_of, positive
from apt_backbones.calibrate import calibrate_thresholds, score_maps_of
from apt_backbones.files import write_atomically
from apt_backbones.images import evenly, read_rgb, to_tensor
from apt_backbones.new_layers import save_new_layers
from tools import steps
from tools.drawing import chart
from tools.frozen_model import add_model_arguments, add_target_arguments, frozen_model, images_of, model_key

CALIBRATED_ON = 200
LAYERS = ("embedding", "adapters", "maps")


def plot(path: Path, curve: list[float], what: str) -> None:
    """The distance to the dense model over the iterations, and its running mean."""
    figure, axes = chart((7, 4))
    window = max(1, len(curve) // 20)
    means = torch.tensor(curve).unfold(0, window, 1).mean(1)
    axes.plot(range(1, len(curve) + 1), curve, alpha=0.3)
    axes.plot(range(window, len(curve) + 1), means, label=f"mean of {window} iterations")
    axes.set(xlabel="iteration", ylabel=f"distance of the {what} to the dense model's", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    write_atomically(path, lambda unfinished: figure.savefig(unfinished, dpi=150))


def ends_of(curve: list[float]) -> tuple[float, float]:
    """The means of its first and its last tenth."""
    tenth = max(1, len(curve) // 10)
    return sum(curve[:tenth]) / tenth, sum(curve[-tenth:]) / tenth


def main() -> None:
    parser = parser_of(__doc__)
    add_model_arguments(parser, "the new layers go")
    add_target_arguments(parser)
    add = parser.add_argument
    add("--keep", type=float, help="calibrate to this share of tokens (default: the configuration's thresholds)")
    add("--scorer", help="name or file (default: the configuration's, or entropy)")
    add("--train", nargs="+", choices=LAYERS, help="new layers of a timm model (default: embedding)")
    add("--rank", type=int, default=16, help="of the adapters (default: 16)")
    add("--iterations", type=int, default=1000, help="training steps (default: 1000)")
    add("--batch", type=int, default=4, help="views of a step (default: 4)")
    add("--rate", type=positive, help="highest learning rate (default: 0.0001 with adapters, else 0.001)")
    add("--work-dir", type=Path, help="for logs and checkpoints (default: beside --out)")
    args = parser.parse_args()
    check_at_least(args, iterations=1, batch=1, resize=1, rank=1)
    if args.keep is not None:
        check_shares([args.keep])
    from apt_backbones.mm.feature_matching import finetune_features

    torch.manual_seed(args.seed)
    if args.train and args.model.endswith(".py"):
        raise ValueError("a configuration names its new layers itself (merge, adapter_rank, map_fill): no --train")
    train = args.train or ["embedding"]
    if args.target == "pooled" and train == ["maps"]:
        raise ValueError("pooled features do not depend on how maps are filled; train adapters or the embedding")
    layers = dict(merge="apt") if "embedding" in train else {}
    if "adapters" in train:
        layers |= dict(adapter_rank=args.rank)
    if "maps" in train:
        layers |= dict(map_fill="learned")
    frozen = frozen_model(args.model, args.weights, args.sizes, args.resize, **layers)
    target, trunk, prepare = frozen.target(args.target), frozen.trunk, frozen.settings.prepare
    if target == "pooled" and args.batch == 1:
        raise ValueError("the variance of pooled features is that between images; give --batch 2 or more")
    paths = images_of(args)
    trunk.scorer = args.scorer or trunk.scorer
    if args.keep:
        maps = [
            score_maps_of(to_tensor(prepare(read_rgb(paths[index]))), tuple(trunk.thresholds), trunk.scorer)
            for index in steps.track(evenly(len(paths), CALIBRATED_ON), "scoring")
        ]
        trunk.thresholds = calibrate_thresholds(maps, trunk.patch_size, args.keep)
        print(f"thresholds={trunk.thresholds}")
    elif not any(trunk.thresholds.values()):
        raise ValueError("the model has no thresholds; give a share of tokens with --keep")
    frozen.model.to(args.device)
    rate = args.rate or (1e-4 if trunk.token_adapters else 1e-3)
    say = {"head": frozen.head, "features": frozen.features, "pooled": frozen.pooled}[target]

    def outputs(pixels: Tensor) -> Tensor:
        return say(frozen.normalized(pixels))

    views = frozen.views(args.view, read_rgb(paths[0]), trunk.patch_size, seed=args.seed)
    key = [
        model_key(args),
        steps.scorer_key(trunk.scorer),
        trunk.thresholds,
        train,
        args.rank,
        args.resize,
        target,
        views,
        args.iterations,
        args.batch,
        rate,
    ]
    work_dir = args.work_dir or args.out.parent / f".{args.out.stem}_training"
    loss = "probabilities" if target == "head" else "features"
    curve = finetune_features(
        frozen.model,
        outputs,
        paths,
        views,
        work_dir / steps.digest([key, steps.stamps(paths)]),
        loss,
        iterations=args.iterations,
        batch=args.batch,
        rate=rate,
        prepare=prepare,
    )
    save_new_layers(frozen.model, args.out)
    if args.plot:
        plot(args.plot, curve["distance"], loss)
    first, last = ends_of(curve["distance"])
    kept = sum(curve["kept"]) / len(curve["kept"])
    print(f"{args.out}: distance to the dense model {first:.4f} -> {last:.4f}, {kept:.1%} of the tokens kept")


if __name__ == "__main__":
    steps.run(main)
