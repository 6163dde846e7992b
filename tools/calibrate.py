#!/usr/bin/env python
"""Find thresholds that meet a token budget on your own images.

examples:
  python tools/calibrate.py --images coco/val2017 --config det_configs/eva02_l_apt_1536.py --keep 0.7
  python tools/calibrate.py --images photos/ --sizes 28 --resize 336 --keep 0.7 --plot keep.png
"""

import argparse
import random
import sys
from pathlib import Path

import torch
from PIL import Image
from rich.progress import track

from apt_backbones.calibrate import calibrate_thresholds, kept_shares, score_maps_of
from apt_backbones.images import find_images, read_rgb, to_tensor
from apt_backbones.scores import SCORERS

QUANTILES = {"least": 0.0, "10th percentile": 0.1, "median": 0.5, "90th percentile": 0.9, "most": 1.0}


def settings_of(config: str) -> tuple[tuple[int, ...], str, tuple[int, int] | None]:
    """Merged sizes, scorer and (longest, shortest) test image side of an mm config."""
    from mmengine.config import Config

    cfg = Config.fromfile(config)
    backbone = cfg.model.backbone
    if not backbone.get("thresholds"):
        raise ValueError(f"{config} has no thresholds, so there is nothing to calibrate; name an adaptive config")
    scales = [step["scale"] for step in cfg.test_pipeline if "scale" in step]
    scale = tuple(sorted(scales[0], reverse=True)) if scales else None
    return tuple(sorted(map(int, backbone.thresholds))), backbone.get("scorer", "entropy"), scale


def resized(image: Image.Image, scale: tuple[int, int] | None) -> Image.Image:
    """The image as large as its aspect ratio allows with its longer side at most scale[0], its shorter scale[1]."""
    if scale is None:
        return image
    factor = min(scale[0] / max(image.size), scale[1] / min(image.size))
    return image.resize([max(1, round(side * factor)) for side in image.size], Image.Resampling.BILINEAR)


def plot(path: Path, score_maps: list, patch_size: int, thresholds: dict[int, float], keep: float) -> None:
    """Share of tokens against the threshold: the mean and the range of 80 % of the images."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    smallest = min(thresholds)
    scores = torch.cat([scores[smallest].flatten() for scores in score_maps])
    steps = torch.linspace(0, float(scores[scores.isfinite()].max()) * 1.02, 41).tolist()
    ratios = {size: t / max(thresholds[smallest], 1e-9) for size, t in thresholds.items()}
    shares = torch.stack([kept_shares(score_maps, {s: x * r for s, r in ratios.items()}, patch_size) for x in steps])
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axes.fill_between(steps, shares.quantile(0.1, 1), shares.quantile(0.9, 1), alpha=0.25, label="80 % of the images")
    axes.plot(steps, shares.mean(1), label="mean")
    axes.axvline(thresholds[smallest], linestyle=":", color="black", label=f"chosen: {thresholds[smallest]:.2f}")
    axes.axhline(keep, linestyle=":", color="grey")
    axes.set(xlabel=f"threshold at {smallest} px", ylabel="tokens kept", ylim=(0, 1.02))
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="\n".join(__doc__.splitlines()[2:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--images", nargs="+", required=True, metavar="IMAGE|DIR", help="images like yours")
    parser.add_argument("--keep", type=float, required=True, help="share of tokens to keep, e.g. 0.7, padding excluded")
    parser.add_argument("--config", help="take sizes, scorer and image size from this mm config")
    parser.add_argument("--sizes", type=int, nargs="+", help="merged patch sizes, e.g. 32 64 (base: 16)")
    parser.add_argument("--scorer", choices=SCORERS, help="default: the config's, or entropy")
    parser.add_argument("--resize", type=int, metavar="PIXELS", help="longer image side that the model sees")
    parser.add_argument("--ratios", type=float, nargs="+", help="thresholds relative to the first (default: 1)")
    parser.add_argument("--sample", type=int, default=1000, help="use at most so many images (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="which images are sampled (default: 0)")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="also plot tokens kept against the threshold")
    args = parser.parse_args()
    try:
        sizes, scorer, scale = settings_of(args.config) if args.config else (args.sizes, "entropy", None)
        sizes, scorer = tuple(args.sizes or sizes or ()), args.scorer or scorer
        scale = (args.resize, args.resize) if args.resize else scale
        if not sizes:
            raise ValueError("name the merged patch sizes with --sizes, or a --config that has them")
        paths = find_images(args.images)
        if len(paths) > args.sample:
            paths = sorted(random.Random(args.seed).sample(paths, args.sample))
        score_maps = [
            score_maps_of(to_tensor(resized(read_rgb(path), scale)), sizes, scorer)
            for path in track(paths, description="scoring", disable=not sys.stderr.isatty())
        ]
        patch_size = sizes[0] // 2
        thresholds = calibrate_thresholds(score_maps, patch_size, args.keep, args.ratios)
        shares = kept_shares(score_maps, thresholds, patch_size)
        cells = torch.tensor([scores[patch_size].numel() for scores in score_maps])
        if args.plot:
            plot(args.plot, score_maps, patch_size, thresholds, args.keep)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    spread = ", ".join(f"{name} {shares.quantile(level):.1%}" for name, level in QUANTILES.items())
    print(f"{len(paths)} images keep {(shares * cells).sum() / cells.sum():.1%} of their tokens (per image: {spread})")
    print(f"thresholds={thresholds}")


if __name__ == "__main__":
    main()
