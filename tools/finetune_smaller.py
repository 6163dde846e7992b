#!/usr/bin/env python
"""Tune a model to read smaller images, without labels: what merging competes with.

examples:
  python tools/finetune_smaller.py seg_configs/eva02_tiny_apt_photoshapes.py \\
      --weights seg_configs/checkpoints/eva02_tiny_dense_photoshapes.safetensors --out smaller.safetensors
  python tools/equal_tokens.py seg_configs/eva02_tiny_apt_photoshapes.py \\
      seg_configs/checkpoints/eva02_tiny_dense_photoshapes.safetensors --smaller smaller.safetensors

Low-rank additions to every linear layer of the trunk's blocks (LoRA) learn to let the model say of smaller images what
it says of whole ones: a segmenter's or classifier's probabilities. They end in the weights, so that they cost nothing,
and the file holds all weights of the model. An interrupted run resumes. Runs without a GPU.
"""

import math

import torch
from torch import Tensor

from tools.cli import check_at_least, check_shares, parser_of, positive
from apt_backbones.distill import save_tensors
from apt_backbones.images import read_rgb
from tools import steps
from tools.equal_tokens import BELOW, KEEP
from tools.finetune_features import ends_of, plot
from tools.frozen_model import add_model_arguments, frozen_model, images_of, model_key

ZOOM = (0.9, 1.25)  # of images in the views of training


def main() -> None:
    parser = parser_of(__doc__)
    add_model_arguments(parser, "the tuned weights go", "configuration of a segmenter or classifier")
    add = parser.add_argument
    shares = [*KEEP, round(BELOW * min(KEEP), 2)]
    add("--keep", type=float, nargs="+", default=shares, help="tokens of smaller images, shares (0.9 to 0.43)")
    add("--rank", type=int, default=16, help="of the additions (default: 16)")
    add("--iterations", type=int, default=450, help="training steps (default: 450)")
    add("--batch", type=int, default=4, help="views of a step (default: 4)")
    add("--rate", type=positive, default=1e-4, help="highest learning rate (default: 0.0001)")
    args = parser.parse_args()
    check_at_least(args, iterations=2, batch=1, rank=1)
    check_shares(args.keep)
    from apt_backbones.mm.smaller_images import finetune_for_smaller_images

    torch.manual_seed(args.seed)
    frozen = frozen_model(args.model, args.weights, None)
    if frozen.head is None:
        raise ValueError(
            "only what a segmenter or classifier says stays the same in a smaller image (by its --weights); others "
            "learn from labels: train the configuration on smaller images"
        )
    paths, patch_size = images_of(args), frozen.trunk.patch_size
    views = frozen.views(args.view, read_rgb(paths[0]), patch_size, seed=args.seed)
    if not frozen.is_classifier:  # whose views are filled, without padding
        views = views._replace(scales=ZOOM)
    sizes = [
        tuple(max(1, round(side * math.sqrt(keep) / patch_size)) * patch_size for side in views.size)
        for keep in args.keep
    ]
    frozen.model.to(args.device)

    def outputs(pixels: Tensor) -> Tensor:
        return frozen.head(frozen.normalized(pixels))

    key = [model_key(args), sizes, views, args.rank, args.iterations, args.batch, args.rate]
    curve = finetune_for_smaller_images(
        frozen.model,
        outputs,
        sizes,
        paths,
        views,
        args.out.parent / f".{args.out.stem}_training" / steps.digest([key, steps.stamps(paths)]),
        "probabilities",
        args.rank,
        args.iterations,
        batch=args.batch,
        rate=args.rate,
        prepare=frozen.settings.prepare,
    )["distance"]
    save_tensors(args.out, frozen.model.state_dict())
    if args.plot:
        plot(args.plot, curve, "probabilities")
    first, last = ends_of(curve)
    print(f"{args.out}: distance to what the model says of whole images {first:.4f} -> {last:.4f}")


if __name__ == "__main__":
    steps.run(main)
