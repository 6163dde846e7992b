#!/usr/bin/env python
"""Accuracy against tokens in classification: a frozen DINOv2-S with a linear head, on a folder of images by class.

examples:
  python -m benchmarks.equal_tokens_classes clothing-dataset-small --out docs/results/equal_tokens_clothing.json
  python -m benchmarks.equal_tokens_classes photos/ --weights dinov2_s14.safetensors --scorer scorer.safetensors

The folder holds train, validation and test. Heads read the CLS token, and the mean over the tokens of the image: with
merged tokens by their area, as ``adapt`` has it, or with every token once. They are trained on dense images of 224
pixels, in samples drawn with replacement (the seeds). Thresholds are calibrated on the validation split.
"""

import json
import sys
from pathlib import Path

import timm
import torch
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from tools.cli import parser_of, run
from apt_backbones import adapt
from apt_backbones.calibrate import calibrate_thresholds, score_maps_of
from apt_backbones.files import write_atomically
from apt_backbones.selection import normalize

from .study import MERGED, MODEL, console, pretrained

SIDE = 224
SMALLER = (140, 168, 196, 210, 224)
KEEPS = (0.75, 0.6)
ADAPTIVE = (("resizing", "entropy"), ("resizing", "upsample_mse"), ("random", "entropy"))
POOLS = ("cls", "mean by area", "mean by token")
SEEDS = 3


def images_of(folder: Path, split: str, side: int) -> DataLoader:
    """Batches of pixels 0..255 (B, 3, side, side) and classes."""
    steps = [transforms.Resize(side, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(side)]
    data = ImageFolder(folder / split, transforms.Compose([*steps, transforms.PILToTensor()]))
    return DataLoader(data, batch_size=16, num_workers=1)


@torch.inference_mode()
def features(vit: nn.Module, loader: DataLoader, title: str) -> tuple[dict[str, Tensor], Tensor, float]:
    """Per pooling the features of all images, their classes, and the mean number of patch tokens."""
    pooled, labels, tokens = {name: [] for name in POOLS}, [], []
    for pixels, classes in track(loader, title, console=console):
        *_, (_, x_TD) = vit.run(normalize(pixels, vit.pixel_mean, vit.pixel_std))
        layout, x_TD = vit.last_layout, vit.final_norm(x_TD)
        pooled["cls"].append(layout.prefix(x_TD)[:, 0])
        pooled["mean by area"].append(layout.to_map(x_TD).mean((2, 3)))
        pooled["mean by token"].append(torch.stack([x.mean(0) for x in layout.split(x_TD)]))
        labels.append(classes)
        tokens += layout.num_patches
    return {name: torch.cat(parts) for name, parts in pooled.items()}, torch.cat(labels), sum(tokens) / len(tokens)


def train_head(x: Tensor, labels: Tensor, seed: int) -> nn.Linear:
    """Logistic regression on a sample drawn with replacement."""
    sample = torch.randint(len(x), (len(x),), generator=torch.Generator().manual_seed(seed))
    x, labels = x[sample], labels[sample]
    head = nn.Linear(x.shape[1], int(labels.max()) + 1)
    nn.init.zeros_(head.weight)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(head(x), labels) + 1e-4 * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return head.requires_grad_(False)


def calibrated(folder: Path, scorer: str, keep: float) -> dict[int, float]:
    """Thresholds with which the validation images keep a share of their tokens."""
    images = [image[None].float() for pixels, _ in images_of(folder, "validation", SIDE) for image in pixels]
    return calibrate_thresholds([score_maps_of(image, (MERGED,), scorer) for image in images], MERGED // 2, keep)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("folder", type=Path, help="with train, validation and test, a folder per class in each")
    parser.add_argument("--weights", type=Path, help="of the network; timm's are downloaded otherwise")
    parser.add_argument("--scorer", help="file of a learned scorer, measured as well")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    args = parser.parse_args()
    vit = pretrained(args.weights)
    # Without an option, timm's own model would come back.
    adapt(vit, None, padding="coarsest")
    x, labels, _ = features(vit, images_of(args.folder, "train", SIDE), "training images")
    heads = {pool: [train_head(x[pool], labels, seed) for seed in range(SEEDS)] for pool in POOLS}

    results = []

    def measure(method: str, scorer: str | None, side: int) -> None:
        for split in ("validation", "test"):
            x, labels, tokens = features(vit, images_of(args.folder, split, side), f"{method} {scorer} {side} {split}")
            for pool in POOLS:
                for seed, head in enumerate(heads[pool]):
                    accuracy = 100 * float((head(x[pool]).argmax(1) == labels).float().mean())
                    line = {
                        "method": method,
                        "scorer": scorer and Path(scorer).stem,
                        "image": side,
                        "tokens": round(tokens, 1),
                    }
                    results.append({**line, "pool": pool, "accuracy": round(accuracy, 2), "split": split, "seed": seed})

    for side in SMALLER:
        measure("dense", None, side)
    for merge, scorer in (*ADAPTIVE, *([("resizing", args.scorer)] if args.scorer else [])):
        for keep in KEEPS:
            adapt(vit, calibrated(args.folder, scorer, keep), scorer, merge)
            measure(merge, scorer, SIDE)
    command = " ".join(["python -m benchmarks.equal_tokens_classes", *sys.argv[1:]])
    about = {
        "model": MODEL,
        "command": command,
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
        "results": results,
    }
    if args.out:
        write_atomically(args.out, json.dumps(about, indent=1) + "\n")
    for line in results:
        if line["split"] == "test" and line["seed"] == 0:
            console.print(line)


if __name__ == "__main__":
    run(main)
