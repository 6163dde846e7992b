#!/usr/bin/env python
"""Find thresholds that meet a token budget on your own images.

examples:
  python tools/calibrate.py --images coco/val2017 --config det_configs/eva02_l_apt_1536.py --keep 0.7
  python tools/calibrate.py --images photos/ --sizes 28 --resize 336 --keep 0.7 --plot keep.png
  python tools/calibrate.py --images data/photoshapes/images/training \\
      --config det_configs/eva02_tiny_apt_photoshapes.py --keep 0.73 \\
      --checkpoint det_configs/checkpoints/eva02_tiny_apt_photoshapes.safetensors

Padding of batches is left out; that of LLaVA's squares counts. With a --checkpoint and several sizes, ratios between
the sizes' thresholds are tried at the same budget; the one whose features differ least from the dense model's is taken.
Runs without a GPU, on all cores.
"""

import argparse
import contextlib
import itertools
import os
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tools.cli import check_at_least, parser_of, run
from apt_backbones.calibrate import ScoreMaps, calibrate_thresholds, kept_shares, score_maps_of, share_curves
from apt_backbones.files import write_atomically
from apt_backbones.images import find_images, read_rgb, to_tensor
from apt_backbones.scores import SCORERS, check_sizes
from tools.drawing import chart
from tools.patch_settings import PatchSettings, settings_of, with_longest_side

if TYPE_CHECKING:
    from tools.mm_model import MMModel

QUANTILES = {"least": 0.0, "10th percentile": 0.1, "median": 0.5, "90th percentile": 0.9, "most": 1.0}
TRIED_RATIOS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.4, 2.0)  # of each size's threshold to that of the smallest

console = Console(stderr=True)


def score_all(paths: Sequence[Path], settings: PatchSettings, sizes: Sequence[int]) -> list[ScoreMaps]:
    """Score maps of image files, several files at a time."""

    def score(path: Path) -> ScoreMaps:
        return score_maps_of(to_tensor(settings.prepare(read_rgb(path))), sizes, settings.scorer)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # files side by side use the cores better than the pixels of one
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        maps = list(track(pool.map(score, paths), "scoring", len(paths), console=console, transient=True))
    torch.set_num_threads(threads)
    return maps


class Split(NamedTuple):
    """One way to share a budget between the sizes."""

    ratios: tuple[float, ...]
    thresholds: dict[int, float]
    kept: float
    error: float


def try_splits(
    model: "MMModel", paths: Sequence[Path], score_maps: Sequence[ScoreMaps], keep: float, current: Sequence[float]
) -> list[Split]:
    """Ratios between the sizes' thresholds that meet the budget, with the features' mean relative error on images.

    Args:
        model: a detector or segmenter.
        paths: images on which errors are measured.
        score_maps: of the images on which thresholds are calibrated.
        current: ratios to try beside ``TRIED_RATIOS``.
    """
    sizes, patch_size = tuple(model.trunk.thresholds), model.trunk.patch_size
    candidates = {(1.0, *rest) for rest in itertools.product(TRIED_RATIOS, repeat=len(sizes) - 1)} | {tuple(current)}
    met = {}
    for ratios in sorted(candidates):
        with contextlib.suppress(ValueError):  # without the larger patches a budget may be out of reach
            met[ratios] = calibrate_thresholds(score_maps, patch_size, keep, ratios)
    errors = dict.fromkeys(met, 0.0)
    for path in track(paths, "comparing features", console=console, transient=True):
        crops = model.crops(read_rgb(path))
        dense = model.features(crops)
        for ratios, thresholds in met.items():
            model.trunk.thresholds = thresholds
            errors[ratios] += model.error(crops, dense).relative(crops.content_BHW) / len(paths)
    return [Split(r, t, mean_share(score_maps, t, patch_size), errors[r]) for r, t in met.items()]


def mean_share(score_maps: Sequence[ScoreMaps], thresholds: dict[int, float], patch_size: int) -> float:
    """Tokens / base cells over all images."""
    cells = torch.tensor([scores[patch_size].numel() for scores in score_maps])
    return float((kept_shares(score_maps, thresholds, patch_size) * cells).sum() / cells.sum())


def table_of(splits: Sequence[Split], current: Sequence[float], most: int = 12) -> Table:
    table = Table("ratios of thresholds", "tokens kept", "feature error", title="splits of the budget, best first")
    ranked = sorted(splits, key=lambda split: split.error)
    for split in ranked[:most] + [split for split in ranked[most:] if split.ratios == tuple(current)]:
        mark = " (as given)" if split.ratios == tuple(current) else ""
        table.add_row(" : ".join(f"{r:g}" for r in split.ratios) + mark, f"{split.kept:.1%}", f"{split.error:.4f}")
    return table


def plot(path: Path, score_maps: Sequence[ScoreMaps], thresholds: dict[int, float], keep: float, unit: str) -> None:
    """Share of tokens against the threshold (mean, and the range of 80 % of the images), and its distribution."""
    smallest = next((size for size, threshold in thresholds.items() if threshold > 0), None)
    if smallest is None:
        raise ValueError("with every token kept there is no threshold to plot; leave out --plot")
    scores = torch.cat([scores[smallest].flatten() for scores in score_maps])
    chosen, patch_size = thresholds[smallest], min(thresholds) // 2
    most = min(1.02 * float(scores[scores.isfinite()].max()), 5 * chosen)  # some scorers have a long tail
    steps = torch.linspace(0, most, 101).tolist()
    ratios = [threshold / chosen for threshold in thresholds.values()]
    shares = share_curves(score_maps, patch_size, steps, ratios)
    figure, (curve, histogram) = chart((10, 4.2), 2, width_ratios=(2, 1), sharey=True)
    curve.fill_between(steps, shares.quantile(0.1, 1), shares.quantile(0.9, 1), alpha=0.25, label="80 % of the images")
    curve.plot(steps, shares.mean(1), label="mean")
    curve.axvline(chosen, linestyle=":", color="black", label=f"chosen: {chosen:.4g}")
    curve.axhline(keep, linestyle=":", color="grey")
    curve.set(xlabel=f"threshold at {smallest} px ({unit})", ylabel="tokens kept", ylim=(0, 1.02))
    curve.legend()
    kept = kept_shares(score_maps, thresholds, patch_size)
    histogram.hist(kept.numpy(), bins=20, range=(0, 1), orientation="horizontal", alpha=0.6)
    histogram.axhline(keep, linestyle=":", color="grey")
    histogram.set(xlabel=f"images, of {len(score_maps)}")
    write_atomically(path, lambda unfinished: figure.savefig(unfinished, dpi=150))


def settings_by(args: argparse.Namespace) -> PatchSettings:
    """The configuration's settings with the flags that were given in their place; sizes are its thresholds' keys."""
    if args.config:
        settings = settings_of(args.config)
        if not settings.thresholds and not args.sizes:
            raise ValueError(f"{args.config} has no thresholds: its model is dense; name an adaptive one, or --sizes")
    elif args.sizes:
        settings = PatchSettings(args.sizes[0] // 2, {}, "entropy", with_longest_side(None))
    else:
        raise ValueError("name the merged patch sizes with --sizes, or a --config that has them")
    if args.sizes:
        sizes = check_sizes(sorted(args.sizes))
        settings = replace(settings, patch_size=sizes[0] // 2, thresholds=dict.fromkeys(sizes, 0.0))
    if args.scorer:
        settings = replace(settings, scorer=args.scorer)
    return replace(settings, prepare=with_longest_side(args.resize)) if args.resize else settings


def main() -> None:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--images", nargs="+", required=True, metavar="IMAGE|DIR", help="images like yours")
    add("--keep", type=float, required=True, help="share of tokens to keep, e.g. 0.7, without the padding of batches")
    add("--config", help="take sizes, scorer and image size from this config, or from the folder of a LLaVA model")
    add("--sizes", type=int, nargs="+", help="merged patch sizes, e.g. 32 64; the base patch is half of the first")
    add(
        "--scorer",
        metavar="NAME|FILE",
        help=f"{', '.join(SCORERS)}, or a learned scorer's file (default: the config's, or entropy)",
    )
    add("--resize", type=int, metavar="PIXELS", help="longer image side that the model sees")
    add("--ratios", type=float, nargs="+", help="thresholds relative to the first (default: 1)")
    add("--checkpoint", metavar="FILE", help="weights of the config's model: find the ratios with the least error")
    add("--error-sample", type=int, default=32, metavar="N", help="images to measure errors on (default: 32)")
    add("--sample", type=int, default=1000, metavar="N", help="use at most so many images (default: 1000)")
    add("--seed", type=int, default=0, help="which images are sampled (default: 0)")
    add("--plot", type=Path, metavar="PNG", help="also plot tokens kept against the threshold, and per image")
    args = parser.parse_args()
    check_at_least(args, resize=1, sample=1, error_sample=1)
    if args.checkpoint and (not args.config or Path(args.config).is_dir()):
        raise ValueError("--checkpoint needs the --config of a detector or segmenter")
    if args.checkpoint and (args.sizes or args.resize):
        raise ValueError("--checkpoint goes with the config's own sizes and image size; leave out --sizes and --resize")
    settings, chance = settings_by(args), random.Random(args.seed)
    sizes = tuple(settings.thresholds)
    model = None
    if args.checkpoint:
        from tools.mm_model import MMModel

        model = MMModel(args.config, args.checkpoint)
        model.trunk.scorer = settings.scorer
    paths = find_images(args.images)
    if len(paths) > args.sample:
        paths = sorted(chance.sample(paths, args.sample))
    score_maps = score_all(paths, settings, sizes)
    ratios = args.ratios or [1.0] * len(sizes)
    thresholds = calibrate_thresholds(score_maps, settings.patch_size, args.keep, ratios)
    if model is not None:
        compared = chance.sample(paths, min(args.error_sample, len(paths)))
        splits = try_splits(model, compared, score_maps, args.keep, ratios)
        Console().print(table_of(splits, ratios))
        thresholds = min(splits, key=lambda split: split.error).thresholds
    shares = kept_shares(score_maps, thresholds, settings.patch_size)
    share = mean_share(score_maps, thresholds, settings.patch_size)
    spread = ", ".join(f"{name} {shares.quantile(level):.1%}" for name, level in QUANTILES.items())
    print(f"{len(paths)} images keep {share:.1%} of their tokens (per image: {spread})")
    print(f"thresholds={thresholds}")
    if args.plot:  # last, so that a mistake in its name does not lose what was found
        plot(args.plot, score_maps, thresholds, args.keep, settings.scorer)


if __name__ == "__main__":
    run(main)
