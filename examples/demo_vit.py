#!/usr/bin/env python
"""See adaptive patches at work in a pretrained ViT of timm's: tokens, speed, and what its features still show.

examples:
  python examples/demo_vit.py
  python examples/demo_vit.py --weights dinov2_s14.safetensors --images photos/ --keep 0.5
  python examples/demo_vit.py --model vit_small_patch16_dinov3.lvd1689m --images photos/

Distils a scorer from the network's features (from hundreds of other images it is better: --scorer FILE), finds a
threshold for the budget, and compares the adaptive network with the dense one, with a smaller image of as many tokens,
and with tokens dropped at random; then writes OUT/index.html and OUT/features.jpg. Without --weights timm downloads its
own. Started again, it resumes.
"""

import copy
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tools.cli import parser_of, run_tool
from apt_backbones import adapt
from apt_backbones.calibrate import calibrate_thresholds, score_maps_of
from apt_backbones.files import write_atomically
from apt_backbones.images import find_images, read_rgb, to_tensor
from apt_backbones.merging_losses import Prototypes
from apt_backbones.trunk import AdaptiveTrunk
from benchmarks.images import photographs
from examples.demo_page import data_uri, render, share_histogram
from examples.demo_pictures import WIDTH, enlarged, patch_legend, patches, spread
from tools.drawing import compose
from tools.frozen_model import Frozen, frozen_model
from tools.machine import hardware
from tools.steps import announced, console, run, track

ROOT = Path(__file__).parents[1]
DENSE, APT, SMALLER, RANDOM = "dense", "adaptive", "smaller image", "random"
METHODS = {
    DENSE: "timm's own network on every patch.",
    APT: "smooth patches merged, chosen by a scorer that was distilled from this network.",
    SMALLER: "the dense network on the image, scaled down to as many tokens.",
    RANDOM: "as many tokens as the adaptive network keeps, the others dropped at random.",
}
ROUNDS = 3
SEGMENTS = 16


class Seen(NamedTuple):
    """One image through all methods.

    Attributes:
        image: as the network sees it.
        patches: picture of the adaptive patches.
        maps: of each method (D, H, W), on the dense network's cells.
        tokens: of each method, without CLS and registers.
        seconds: of each method, a list.
    """

    image: Image.Image
    patches: Image.Image
    maps: dict[str, Tensor]
    tokens: dict[str, int]
    seconds: dict[str, list[float]]


def distilled(args, paths: list[Path]) -> Path:
    """The scorer, by the tool that users have for it."""
    file = args.out / "scorer.safetensors"
    copies = max(2, -(-128 // len(paths)))  # enough views of few images, too
    command = [sys.executable, str(ROOT / "tools/distill_scorer.py"), args.model, "--images", *map(str, paths)]
    command += ["--out", str(file), "--resize", str(args.resize), "--view", str(args.resize // 56 * 28)]
    command += ["--copies", str(copies), "--epochs", "12", "--prototypes", "32"]
    if args.weights:
        command += ["--weights", args.weights]
    with announced("distilling a scorer (some minutes on a CPU)"):
        run_tool(command, "no scorer was distilled")
    return file


def in_whole_patches(image: Image.Image, patch_size: int) -> Image.Image:
    return image.resize(
        [max(1, round(side / patch_size)) * patch_size for side in image.size], Image.Resampling.BICUBIC
    )


def last_map(trunk: AdaptiveTrunk, images: Tensor) -> Tensor:
    return trunk.feature_maps(images, (-1,), norm=True)[0]


@torch.inference_mode()
def look(frozen: Frozen, dense: torch.nn.Module, image: Image.Image) -> Seen:
    """An image through all methods, interleaved."""
    trunk, patch_size = frozen.trunk, frozen.trunk.patch_size
    pixels = frozen.normalized(to_tensor(image))
    _, layout = last_map(trunk, pixels), trunk.last_layout
    tokens = sum(layout.num_patches)
    grid = [-(-side // patch_size) for side in pixels.shape[2:]]
    scale = (tokens / (grid[0] * grid[1])) ** 0.5
    small = [max(1, round(side * scale)) * patch_size for side in grid]
    smaller = frozen.normalized(to_tensor(image.resize(small[::-1], Image.Resampling.BICUBIC)))

    def of_timm(images: Tensor) -> Tensor:
        return dense.forward_intermediates(images, 1, norm=True, intermediates_only=True)[0]

    def of_random(images: Tensor) -> Tensor:
        trunk.merge = "random"
        try:
            return last_map(trunk, images)
        finally:
            trunk.merge = "resizing"

    runs: dict[str, Callable[[], Tensor]] = {
        DENSE: lambda: of_timm(pixels),
        APT: lambda: last_map(trunk, pixels),
        SMALLER: lambda: of_timm(smaller),
        RANDOM: lambda: of_random(pixels),
    }
    maps, seconds = {}, {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, function in runs.items():
            started = time.perf_counter()
            maps[name] = function()[0]
            seconds[name].append(time.perf_counter() - started)
    maps[SMALLER] = F.interpolate(maps[SMALLER][None], size=grid, mode="bilinear", antialias=True)[0]
    counts = {DENSE: grid[0] * grid[1], APT: tokens, SMALLER: small[0] * small[1] // patch_size**2, RANDOM: tokens}
    return Seen(image, patches(image, layout)[1], maps, counts, seconds)


def similarity(seen: Seen, method: str) -> float:
    """Mean cosine of the method's features and the dense network's, over the cells."""
    return float(F.cosine_similarity(seen.maps[method], seen.maps[DENSE], dim=0).mean())


def agreements(all_seen: list[Seen]) -> dict[str, float]:
    """Share of the cells that each method puts into the same segment as the dense network does; segments are clusters
    of the dense network's features on all images."""
    clusters = Prototypes.fit([seen.maps[DENSE][None] for seen in all_seen], SEGMENTS)
    found = {name: [] for name in METHODS}
    for seen in all_seen:
        segments = {name: clusters(maps[None]).argmax(1) for name, maps in seen.maps.items()}
        for name, values in found.items():
            values.append(float((segments[name] == segments[DENSE]).float().mean()))
    return {name: statistics.mean(values) for name, values in found.items()}


def colored(all_seen: list[Seen]) -> Callable[[Tensor, Image.Image], Image.Image]:
    """Draws features by the first three principal components of the dense network's."""
    cells = torch.cat([seen.maps[DENSE].flatten(1).T for seen in all_seen])
    center = cells.mean(0)
    axes = torch.pca_lowrank(cells - center, q=3, center=False)[2]
    low, high = torch.quantile((cells - center) @ axes, torch.tensor([0.02, 0.98]), dim=0)

    def draw(features: Tensor, image: Image.Image) -> Image.Image:
        colors = ((features.permute(1, 2, 0) - center) @ axes - low) / (high - low)
        pixels = Image.fromarray((255 * colors.clamp(0, 1)).round().byte().numpy())
        factor = WIDTH / max(image.size)
        return pixels.resize([round(side * factor) for side in image.size], Image.Resampling.NEAREST)

    return draw


def panels_of(seen: Seen, draw: Callable[[Tensor, Image.Image], Image.Image]) -> list[tuple[str, Image.Image]]:
    """Pictures to compare, with captions."""
    count = seen.tokens[APT]
    return [
        (f"{count} adaptive patches", enlarged(seen.patches)[0]),
        (f"dense features, {seen.tokens[DENSE]} tokens", draw(seen.maps[DENSE], seen.image)),
        (f"adaptive, {count} tokens", draw(seen.maps[APT], seen.image)),
        (f"smaller image, {seen.tokens[SMALLER]} tokens", draw(seen.maps[SMALLER], seen.image)),
    ]


def page_of(args, frozen: Frozen, all_seen: list[Seen], command: str) -> dict:
    """What demo_page.html shows."""

    def mean(values) -> float:
        return statistics.mean(values)

    cells, names = mean(seen.tokens[DENSE] for seen in all_seen), list(METHODS)
    close = {name: mean(similarity(seen, name) for seen in all_seen) for name in names}
    speeds = {
        name: statistics.median(a / b for seen in all_seen for a, b in zip(seen.seconds[DENSE], seen.seconds[name]))
        for name in names
    }
    agreed = agreements(all_seen)
    share = mean(seen.tokens[APT] for seen in all_seen) / cells
    shares = [seen.tokens[APT] / seen.tokens[DENSE] for seen in all_seen]
    rows = [
        [
            name,
            f"{mean(seen.tokens[name] for seen in all_seen):.0f}",
            f"{agreed[name]:.1%}",
            f"{close[name]:.3f}",
            f"{speeds[name]:.2f}x",
        ]
        for name in names
    ]
    size, threshold = next(iter(frozen.settings.thresholds)), next(iter(frozen.trunk.thresholds.values()))
    gain = "faster" if speeds[APT] > 1.02 else "no faster: it is too small to gain"
    draw, chosen = colored(all_seen), [all_seen[at] for at in spread(shares, args.pictures)]
    panels = [panels_of(seen, draw) for seen in chosen]
    write_atomically(args.out / "features.jpg", lambda part: compose(panels[-1]).save(part, "JPEG", quality=85))
    return {
        "title": f"Adaptive patches for {args.model}",
        "intro": (
            "An Adaptive Patch Transformer (APT) covers the smooth parts of an image with large patches and the busy "
            f"parts with small ones. Here {args.model}, with its pretrained weights, became one in a line of code. A "
            "scorer was distilled from its features, without labels, to choose what is merged; nothing else was "
            "trained."
        ),
        "tiles": [
            {"value": f"{share:.0%}", "label": "of the tokens kept"},
            {"value": f"{speeds[APT]:.2f}x", "label": f"the dense network's speed: {gain}"},
            {"value": f"{agreed[APT]:.0%}", "label": "of the cells in the same segment as for the dense network"},
            {"value": f"{agreed[SMALLER]:.0%}", "label": "for a smaller image of as many tokens"},
        ],
        "table": {
            "head": ["method", "tokens", "same segment as dense", "similarity to dense features", "speed"],
            "rows": [{"is_apt": row[0] == APT, "cells": row} for row in rows],
        },
        "measured_on": (
            f"{len(all_seen)} images with a longer side of {args.resize} pixels. Features are the last block's, "
            f"normed. Segments are {SEGMENTS} clusters of the dense network's; similarity is the mean cosine. What "
            "they mean for a task only the task's metric can tell"
        ),
        "methods": list(METHODS.items()),
        "speed": (
            f"The whole network, one image at a time, scoring included; all methods interleaved, {ROUNDS} rounds, "
            "medians of ratios to timm's own network on the same image."
        ),
        "machine": [("hardware", hardware()), ("versions", f"torch {torch.__version__}")],
        "charts": [
            {
                "title": "Threshold for a token budget",
                "svg": share_histogram(shares, args.keep),
                "caption": (
                    f"Asked: keep {args.keep:.0%} of the tokens on average. Found: patches of {size} pixels are merged "
                    f"if their expected loss is below {threshold:.4g}."
                ),
            }
        ],
        "pictures_text": (
            "From an image that keeps few tokens to one that keeps many. Features are drawn in the colors of their "
            "first three principal components, the same ones for all pictures."
        ),
        "legends": [patch_legend([frozen.trunk.patch_size, size])],
        "pictures": [
            {
                "caption": f"{seen.tokens[APT]} of {seen.tokens[DENSE]} tokens",
                "panels": [{"label": label, "uri": data_uri(picture)} for label, picture in of_image],
                "answers": [],
            }
            for seen, of_image in zip(chosen, panels)
        ],
        "next_text": "Distil a scorer on your own images, find thresholds for a budget, and add one line to your code:",
        "next": (
            f"python tools/distill_scorer.py {args.model} --images photos/ --out scorer.safetensors\n"
            f"python tools/calibrate.py --images photos/ --sizes {size} --scorer scorer.safetensors "
            f"--keep {args.keep:g}\n"
            f'adapt(model, thresholds={{{size}: {threshold:.4g}}}, scorer="scorer.safetensors", merge="resizing")'
        ),
        "command": command,
        "date": str(date.today()),
    }


def main() -> None:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--model", default="vit_small_patch14_dinov2", help="timm's name (%(default)s)")
    add("--weights", help="file with its weights (default: timm downloads them)")
    add("--images", nargs="+", metavar="IMAGE|DIR", help="default: four photographs of scikit-image")
    add("--scorer", type=Path, help="file of a learned scorer (default: one is distilled from these images)")
    add("--limit", type=int, default=50, help="use at most so many images (%(default)s)")
    add("--resize", type=int, default=448, help="longer image side in pixels (%(default)s)")
    add("--keep", type=float, default=0.6, help="share of tokens to keep (%(default)s)")
    add("--pictures", type=int, default=4, help="images to draw (%(default)s)")
    add("--out", type=Path, default=Path("work_dirs/demo/vit"), help="for everything (%(default)s)")
    args = parser.parse_args()
    if not 0.25 <= args.keep <= 1:
        raise ValueError(f"--keep {args.keep:g}: patches of twice the side keep from 0.25 to all (1) of the tokens")
    paths = (find_images(args.images) if args.images else photographs())[: args.limit]
    frozen = frozen_model(args.model, args.weights, None, args.resize)
    scorer = str(args.scorer or distilled(args, paths))
    images = [in_whole_patches(frozen.settings.prepare(read_rgb(path)), frozen.settings.patch_size) for path in paths]
    sizes = tuple(frozen.settings.thresholds)
    maps = [score_maps_of(to_tensor(image), sizes, scorer) for image in track(images, "scores")]
    thresholds = calibrate_thresholds(maps, frozen.settings.patch_size, args.keep)
    dense = adapt(copy.deepcopy(frozen.trunk), None)
    adapt(frozen.trunk, thresholds, scorer, "resizing", map_fill="interpolate")
    with announced(f"{len(images)} images through {len(METHODS)} methods"):
        all_seen = [look(frozen, dense, image) for image in track(images, "images")]
    command = shlex.join(["examples/demo_vit.py", *sys.argv[1:]])
    write_atomically(args.out / "index.html", render(page_of(args, frozen, all_seen, command)))
    console.print(f"\nDone: open [bold]{args.out / 'index.html'}[/] in a browser.", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    run(main)
