#!/usr/bin/env python
"""Speed of dense and adaptive models, side by side in one run.

examples:
  python tools/benchmark.py det_configs/eva02_b_apt_1536.py --keep 1.0 0.7 0.5
  python tools/benchmark.py det_configs/eva02_l_apt_1536.py --whole --stages --device cuda --dtype bf16 --thresholds
  python tools/benchmark.py seg_configs/eva02_l_apt_512.py --whole --heads reference,fast --batch-size 8 --stages
  python tools/benchmark.py llava-1.5-7b --device cuda --dtype bf16 --batch-size 8
  python tools/benchmark.py det_configs/eva02_b_apt_1536.py --train-step --keep 0.7
  python tools/benchmark.py det_configs/eva02_l_apt_1536.py --img-sizes 512 1024 1536 2048 --keep 1 0.7 0.5
  python tools/benchmark.py --scorers --img-sizes 1536

Configurations are adaptive ones of detectors, segmenters and classifiers; for LLaVA name a shape (llava-1.5-7b,
llava-1.5-13b, llava-small, llava-tiny) or the folder of a model. Weights are random: speed does not depend on them. All
modes run interleaved on every batch, and ratios are taken between runs on the same batch in the same round; medians are
quoted.
Modes:
  dense       the reference dense implementation (of timm's networks timm's own), images padded to a square
  dense-rect  the same on images that are padded only to whole patches
  packed      the packed implementation without thresholds, images padded to a square; compared with where timm has no
              such network (windows, finer maps, no prefix tokens)
  random, resizing, apt
              adaptive; --padding says what becomes of the square's padding
  apt-rect    apt on images that are padded only to whole patches
"""

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console

from tools.cli import check_at_least, parser_of, run
from apt_backbones.files import write_atomically
from apt_backbones.selection import PADDING_MODES
from benchmarks import report
from benchmarks.build import DTYPES, MODES, make_host
from benchmarks.hosts import INFERENCE
from benchmarks.measure import measure
from benchmarks.scorers import SIZES
from tools.machine import add_device_argument


def parse_args() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("configs", nargs="*", metavar="CONFIG", help="adaptive configurations, or LLaVA shapes")
    add_device_argument(parser)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of weights and computation (default: fp32)")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--img-sizes", type=int, nargs="+", help="sides of the square (default: the configuration's)")
    parser.add_argument("--images", nargs="+", metavar="IMAGE|DIR", help="default: four photographs of scikit-image")
    parser.add_argument("--num-images", type=int, default=4, help="use at most so many images (default: 4)")
    parser.add_argument("--aspect", type=_aspect, metavar="W:H", help="cut the images to this, e.g. 4:3")
    parser.add_argument("--modes", help=f"comma-separated, of {', '.join(MODES)} (default: all that apply)")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--keep", type=float, nargs="+", default=[0.7], help="shares of content tokens (default: 0.7)")
    budget.add_argument("--thresholds", action="store_true", help="use the configuration's instead of a budget")
    parser.add_argument("--padding", choices=PADDING_MODES, default="drop", help="adaptive modes' (default: drop)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default: 5)")
    parser.add_argument("--compile", action="store_true", help="compile trunks, dense and adaptive; LLaVA's decoding")
    parser.add_argument("--stages", action="store_true", help="also measure stages and print what they bound")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--whole", action="store_true", help="the whole detector or segmenter, not its trunk alone")
    kind.add_argument("--train-step", action="store_true", help="full fine-tune of dense modes, short of adaptive ones")
    kind.add_argument("--scorers", action="store_true", help="patch scoring alone, against a one-hot histogram")
    parser.add_argument("--heads", help="with --whole, of a segmenter: reference,fast (default: the configuration's)")
    parser.add_argument("--blocks", type=int, help="only the first blocks of the trunk, where all would take too long")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures and every single time here")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="speeds; for several --img-sizes how cost grows")
    args = parser.parse_args()
    if bool(args.configs) == args.scorers:
        parser.error("name configurations, or none with --scorers")
    check_at_least(args, rounds=1, batch_size=1, num_images=1, blocks=1)
    if args.scorers and any(side % max(SIZES) for side in args.img_sizes or ()):
        parser.error(f"--scorers takes sides that are multiples of {max(SIZES)} pixels")
    if args.blocks and args.whole:
        parser.error("--blocks is for trunks alone")
    modes = args.modes.split(",") if args.modes else []
    heads = args.heads.split(",") if args.heads else []
    if unknown := set(modes) - set(MODES):
        parser.error(f"unknown modes {', '.join(sorted(unknown))}; choose from {', '.join(MODES)}")
    if unknown := set(heads) - set(INFERENCE):
        parser.error(f"unknown heads {', '.join(sorted(unknown))}; choose from {', '.join(INFERENCE)}")
    args.modes, args.heads = modes, heads
    return args


def _aspect(text: str) -> float:
    try:
        width, height = map(float, text.split(":"))
        if width > 0 and height > 0:
            return width / height
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text} is not width:height, such as 4:3")


def measure_model(config: str | None, side: int | None, args: argparse.Namespace, console: Console) -> list[dict]:
    """Measure one model at one size and print its tables; one result for each thing that is timed."""
    host, facts = make_host(config, side, args)
    if args.plot and not any(case.is_reference for case in host.cases):
        raise ValueError("--plot shows speeds relative to the dense model; add dense to --modes")
    measure(host, args.rounds, args.stages)
    results = []
    for name in host.measures:
        title = f"{facts['title']}, {name}"
        results.append({**facts, "title": title, "rows": report.rows_of(host, name)})
        console.print(report.table_of(results[-1]["rows"], title))
    if args.stages:
        console.print(report.stage_table(results[-1]["rows"], title))
    return results


def main() -> None:
    args = parse_args()
    console, results = Console(width=None if sys.stdout.isatty() else 160), []
    for config in args.configs or [None]:
        of_config = []
        for side in args.img_sizes or [None]:
            of_config += measure_model(config, side, args, console)
            if args.json:
                content = {**report.environment(args.device), "results": results + of_config}
                write_atomically(args.json, json.dumps(content, indent=1) + "\n")
        results += of_config
        if args.plot:
            args.plot.parent.mkdir(parents=True, exist_ok=True)
            path = args.plot if len(args.configs) <= 1 else args.plot.with_stem(f"{args.plot.stem}_{Path(config).stem}")
            if len(args.img_sizes or ()) > 1:
                report.plot_growth(path, of_config)
            else:
                report.plot_speeds(path, of_config[-1]["rows"], of_config[-1]["title"])


if __name__ == "__main__":
    run(main)
