#!/usr/bin/env python
"""What to expect: the share of tokens that the paper's thresholds keep on your own images.

examples:
  python -m benchmarks.tokens_kept coco/val2017 --out docs/results/tokens_kept_coco.json

Each task sees images at its own size. "content" leaves padding out; "padded" has it, as the task's models pad.
"""

import json
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor

from tools.cli import parser_of, run
from apt_backbones.calibrate import kept_shares, score_maps_of
from apt_backbones.files import write_atomically
from apt_backbones.images import find_images, read_rgb, to_tensor

GREY = (124.0, 116.0, 104.0)  # what padding with the mean colour looks like to a scorer


class Task(NamedTuple):
    """One of the paper's settings (APT, arXiv 2510.18091, section 4).

    Attributes:
        name: for the table.
        patch_size: side of the base patch.
        thresholds: size -> bits.
        prepare: an image to pixels (1, 3, height, width) in 0..255.
    """

    name: str
    patch_size: int
    thresholds: dict[int, float]
    prepare: Callable[[Image.Image], Tensor]


def longest(side: int, pad: bool = False) -> Callable[[Image.Image], Tensor]:
    """Resize to a longer side; pad to a square with the mean colour."""

    def prepare(image: Image.Image) -> Tensor:
        scale = side / max(image.size)
        size = [max(1, round(length * scale)) for length in image.size]
        pixels = to_tensor(image.resize(size, Image.Resampling.BILINEAR))
        if pad:
            square = torch.tensor(GREY).view(1, 3, 1, 1).repeat(1, 1, side, side)
            square[:, :, : pixels.shape[2], : pixels.shape[3]] = pixels
            return square
        return pixels

    return prepare


def shortest(side: int, crop: bool = False) -> Callable[[Image.Image], Tensor]:
    """Resize to a shorter side; crop the square in the middle."""

    def prepare(image: Image.Image) -> Tensor:
        scale = side / min(image.size)
        width, height = (max(side, round(length * scale)) for length in image.size)
        pixels = to_tensor(image.resize((width, height), Image.Resampling.BICUBIC))
        if crop:
            top, left = (height - side) // 2, (width - side) // 2
            return pixels[:, :, top : top + side, left : left + side]
        return F.pad(pixels, (0, -width % 16, 0, -height % 16), mode="replicate")

    return prepare


DETECTION, SEGMENTATION, LLAVA = {32: 2.0, 64: 2.0, 128: 0.3}, {32: 5.75}, {28: 5.75}
TASKS = (
    Task("detector, 1536 px, content", 16, DETECTION, longest(1536)),
    Task("detector, 1536 px, padded to a square", 16, DETECTION, longest(1536, pad=True)),
    Task("segmenter, 512 px", 16, SEGMENTATION, shortest(512)),
    Task("LLaVA, 336 px, cropped", 14, LLAVA, shortest(336, crop=True)),
    Task("LLaVA, 336 px, padded to a square", 14, LLAVA, longest(336, pad=True)),
)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("images", nargs="+", help="files or folders")
    parser.add_argument("--sample", type=int, default=400, help="use at most so many images (default: 400)")
    parser.add_argument("--seed", type=int, default=0, help="which images are sampled (default: 0)")
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    args = parser.parse_args()
    paths = find_images(args.images)
    if len(paths) > args.sample:
        paths = sorted(random.Random(args.seed).sample(paths, args.sample))
    shares: dict[str, list[float]] = {task.name: [] for task in TASKS}
    for path in track(paths, "scoring", console=Console(stderr=True), transient=True):
        image = read_rgb(path)
        for task in TASKS:
            maps = score_maps_of(task.prepare(image), tuple(task.thresholds))
            shares[task.name].append(float(kept_shares([maps], task.thresholds, task.patch_size)))
    results = []
    for task in TASKS:
        values = sorted(shares[task.name])
        line = {"task": task.name, "thresholds": task.thresholds, "mean": statistics.mean(values)}
        tenths = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else values * 9
        line |= {"10th percentile": tenths[0], "median": statistics.median(values), "90th percentile": tenths[-1]}
        results.append({k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()})
        print(f"{task.name}: " + ", ".join(f"{k} {v:.1%}" for k, v in line.items() if isinstance(v, float)))
    if args.out:
        about = {"images": [path.stem for path in paths], "results": results}
        write_atomically(args.out, json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
