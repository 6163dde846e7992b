#!/usr/bin/env python
"""See adaptive patches at work: a small dense model becomes an APT on this machine, and one page shows what that gives.

examples:
  python examples/demo.py det
  python examples/demo.py llava --removed 0.4

Finds thresholds for a token budget, trains the new layers for a few minutes, evaluates all methods, times them and a
network of real size, and draws pictures; then writes OUT/TASK/index.html and a table. Started again, it resumes.
"""

import argparse
import json
import shlex
import sys
from datetime import date
from pathlib import Path

from tools.cli import check_shares, parser_of, run_tool
from apt_backbones.files import write_atomically
from examples.demo_page import render, share_histogram, training_curve
from examples.report import AFTER, BEFORE, DENSE, listed, write_report
from tools.machine import hardware
from tools.mm_config import add_settings_argument
from tools.results import columns, read_table
from tools.steps import Steps, console, fingerprint, run

ROOT = Path(__file__).parents[1]
CHECKPOINTS = {
    "det": Path("det_configs/checkpoints/eva02_tiny_dense_photoshapes.safetensors"),
    "seg": Path("seg_configs/checkpoints/eva02_tiny_dense_photoshapes.safetensors"),
    "llava": Path("llava_apt/checkpoints/small_photoshapes"),
}
# What is timed at a real size, with random weights: its name, and arguments of tools/benchmark.py.
REAL_SIZE = {
    "det": ("the trunk of EVA-02-B at 512 px", ["det_configs/eva02_b_apt_1536.py", "--img-sizes", "512"]),
    "seg": ("the trunk of EVA-02-B at 512 px", ["seg_configs/eva02_b_apt_512.py"]),
    "llava": ("an answer of a larger LLaVA", ["llava-small"]),
}
METHODS = {
    DENSE: "the unchanged model, every patch of one size.",
    "random": "as many tokens as APT keeps, the others dropped at random.",
    "resizing": "APT's patches without its new layers.",
    BEFORE: "equal to resizing: the new layers start at zero.",
    AFTER: "the new layers trained, everything else as in the dense model.",
    "most frequent answer": "what training answers most often, without looking.",
}
TITLES = {"det": "detection", "seg": "segmentation", "llava": "vision-language models"}


def parse_args() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("task", choices=CHECKPOINTS)
    parser.add_argument("--dense", type=Path, help="the dense model: a file, for llava a folder (default: the shipped)")
    parser.add_argument("--removed", type=float, default=0.27, help="share of content tokens to remove (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("work_dirs/demo"), help="for everything (%(default)s)")
    parser.add_argument("--pictures", type=int, default=4, help="images to draw (%(default)s)")
    parser.add_argument("--data", type=Path, default=Path("data/photoshapes_big"), help="for llava (%(default)s)")
    parser.add_argument("--limit", type=int, default=600, help="for llava: questions to answer (%(default)s)")
    add_settings_argument(parser)
    args = parser.parse_args()
    check_shares([args.removed], "--removed")
    return args


def content_of(args: argparse.Namespace, folder: Path, command: str) -> dict:
    """What the page shows, as far as it depends on the task; also writes the report's file."""
    if args.task == "llava":
        from examples import demo_llava as module

        experiment = module.Adaptation(args.dense, args.data, args.removed, folder, args.limit)
        words = {"what": "LLaVA", "speed_text": module.SPEED, "next": module.NEXT}
    else:
        from examples import demo_mm as module
        from examples.photoshapes_results import Experiment

        experiment = Experiment(args.task, args.dense, args.removed, folder, args.cfg_options)
        what = {"det": "detector", "seg": "segmenter"}[args.task]
        words = {"what": what, "speed_text": module.speed_text(experiment), "next": module.NEXT[args.task]}
    images = experiment.data / "images/validation"
    report, path = experiment.report(command), folder / f"photoshapes_{args.task}.json"
    write_report(path, report)
    return {
        **words,
        **report,
        "results": read_table(path),
        "losses": experiment.losses(),
        "shares": experiment.calibration["shares"],
        "budget": 1 - args.removed,
        "real_size": time_real_size(args.task, experiment.steps, 1 - args.removed, images),
        **module.show(experiment, args.pictures),
    }


def time_real_size(task: str, steps: Steps, keep: float, images: Path) -> dict:
    """Speed of a network of real size relative to the reference dense one, at the demo's share of tokens.

    Returns:
        ``what`` it is, ``kept``, and of the ratios over pairs of runs ``median``, ``min`` and ``max``.
    """
    what, arguments = REAL_SIZE[task]
    arguments = [*arguments, "--modes", "dense,apt", "--keep", f"{keep:.4g}", "--images", str(images)]
    arguments += ["--aspect", "1:1", "--num-images", "4", "--rounds", "2"]  # squares: what padding costs is left out

    def measure() -> dict:
        file = steps.folder / "real_size.part"
        steps.folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(ROOT / "tools/benchmark.py"), *arguments, "--json", str(file)]
        run_tool(command, f"{shlex.join(command)} failed")
        dense, apt = json.loads(file.read_text())["results"][-1]["rows"]
        file.unlink()
        return {"what": what, "kept": apt["content_kept"], **apt[f"speed_vs_{dense['mode']}"]}

    inputs = {
        "arguments": arguments,
        "hardware": hardware(),
        "code": fingerprint(ROOT / "benchmarks", pattern="*.py"),
    }
    return steps.run("real_size", f"speed of {what}", inputs, measure)


def page_of(task: str, content: dict, command: str) -> dict:
    """What demo_page.html shows, in words that hold for all tasks."""
    steps, losses = zip(*content["losses"])
    shares, budget, real = content["shares"], content["budget"], content["real_size"]
    minutes = content["minutes_short_finetune"]
    table = columns(content["results"], digits=1)
    by_method = {result.method: result for result in content["results"]}
    dense, apt = by_method[DENSE], by_method[AFTER]
    metric = next(iter(dense.metrics))
    return {
        "title": f"Adaptive patches for {TITLES[task]}",
        "intro": (
            "An Adaptive Patch Transformer (APT) covers the smooth parts of an image with large patches and the busy "
            "parts with small ones, so that the network reads fewer tokens. Here a small dense "
            f"{content['what']} was turned into an APT on this machine: thresholds were chosen for a token budget, a "
            "few new layers were trained for minutes, and everything else stayed as it was."
        ),
        "tiles": [
            {"value": f"{apt.content_kept:.0%}", "label": "of the content's tokens kept"},
            {"value": f"{dense.metrics[metric]:.1f} → {apt.metrics[metric]:.1f}", "label": f"{metric}, dense → APT"},
            {"value": f"{apt.relative_speed:.2f}x", "label": "speed of this small model"},
            {"value": f"{real['median']:.2f}x", "label": f"speed of {real['what']}"},
            {"value": f"{minutes:.1f} min", "label": f"short fine-tune, {steps[-1]} iterations"},
        ],
        "table": {
            "head": list(table),
            "rows": [{"is_apt": cells[0] == AFTER, "cells": cells} for cells in zip(*table.values())],
        },
        "measured_on": content["measured_on"],
        "methods": [(method, meaning) for method, meaning in METHODS.items() if method in by_method],
        "speed": (
            f"{content['speed_text']} Adaptive patches make the trunk faster, and only it: in so small a model the "
            f"rest takes much of the time. At a real size they show: {real['what']}, with random weights and "
            f"{real['kept']:.0%} of the tokens, was {real['median']:.2f} times as fast as the reference dense one "
            f"({real['min']:.2f} to {real['max']:.2f} over pairs of runs, by tools/benchmark.py)."
        ),
        "machine": [
            ("hardware", content["hardware"]),
            ("versions", ", ".join(f"{name} {number}" for name, number in content["versions"].items())),
        ],
        "charts": [
            {
                "title": "Thresholds for a token budget",
                "svg": share_histogram(shares, budget),
                "caption": (
                    f"Asked: keep {budget:.0%} of the tokens of {len(shares)} images. Found: patches are merged if "
                    f"their {content['scorer']} score is below {listed(content['thresholds'])}. The smoothest image "
                    f"keeps {min(shares):.0%} of its tokens, the busiest {max(shares):.0%}."
                ),
            },
            {
                "title": "Short fine-tune",
                "svg": training_curve(steps, losses),
                "caption": "Training loss; only the new layers learn, and at the start they add nothing.",
            },
        ],
        "pictures_text": (
            "Validation images, from one that keeps few tokens to one that keeps many, chosen by rank and not by hand."
        ),
        "legends": content["legends"],
        "pictures": content["pictures"],
        "next_text": "Convert it, find thresholds on your images, train the new layers, test, and measure the speed:",
        "next": content["next"],
        "command": command,
        "date": str(date.today()),
    }


def main() -> None:
    args = parse_args()
    args.dense = args.dense or CHECKPOINTS[args.task]
    if not args.dense.exists():
        raise FileNotFoundError(f"no dense model at {args.dense}; name one with --dense")
    folder = args.out / args.task
    command = shlex.join(["examples/demo.py", *sys.argv[1:]])
    content = content_of(args, folder, command)
    write_atomically(folder / "index.html", render(page_of(args.task, content, command)))
    console.print(
        f"\nDone: open [bold]{folder / 'index.html'}[/] in a browser. "
        "Next: your own checkpoint, with the commands at the page's end.",
        soft_wrap=True,
        highlight=False,
    )


if __name__ == "__main__":
    run(main)
