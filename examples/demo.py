#!/usr/bin/env python
"""See adaptive patches at work: a small dense model becomes an APT on this machine, and one page shows what that gives.

examples:
  python examples/demo.py det
  python examples/demo.py llava --removed 0.4

Finds thresholds for a token budget, trains the new layers for a few minutes, evaluates all methods, times them and a
network of real size, and draws pictures; then writes OUT/TASK/index.html and a table. Started again, it goes on where
it stopped.
"""

import argparse
import json
import shlex
import subprocess
import sys
from datetime import date
from pathlib import Path

from mmengine.config import DictAction

from tools.cli import parser_of
from apt_backbones.files import write_atomically
from examples.demo_page import render, share_histogram, training_curve
from examples.steps import Steps, console, fingerprint, run
from tools.machine import hardware

ROOT = Path(__file__).parents[1]
DENSE = {
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
TITLES = {"det": "detection", "seg": "segmentation", "llava": "vision-language models"}


def parse_args() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("task", choices=DENSE)
    parser.add_argument("--dense", type=Path, help="the dense model: a file, for llava a folder (default: the shipped)")
    parser.add_argument("--removed", type=float, default=0.27, help="share of content tokens to remove (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("work_dirs/demo"), help="for everything (%(default)s)")
    parser.add_argument("--pictures", type=int, default=4, help="images to draw (%(default)s)")
    parser.add_argument("--data", type=Path, default=Path("data/photoshapes_big"), help="for llava (%(default)s)")
    parser.add_argument("--limit", type=int, default=600, help="for llava: questions to answer (%(default)s)")
    parser.add_argument(
        "--cfg-options", nargs="+", action=DictAction, help="for det and seg: settings that replace the configs'"
    )
    return parser.parse_args()


def mm_content(args: argparse.Namespace, folder: Path, command: str) -> dict:
    from examples import demo_mm
    from examples.photoshapes_results import measure, write_tables
    from examples.photoshapes_runs import Experiment

    experiment = Experiment(args.task, args.dense, args.removed, folder, args.cfg_options)
    results = measure(experiment, args.task, command)
    write_tables(results, folder)
    real_size = time_real_size(args.task, experiment.steps, 1 - args.removed, experiment.data / "images/validation")
    return {**demo_mm.content(experiment, results, args.pictures), "real_size": real_size}


def llava_content(args: argparse.Namespace, folder: Path, command: str) -> dict:
    from examples import demo_llava
    from examples.photoshapes_vqa_results import write_tables

    adaptation = demo_llava.Adaptation(args.dense, args.data, args.removed, folder)
    report = adaptation.measure(args.limit, command)
    write_tables(report, folder / "photoshapes_vqa")
    real_size = time_real_size("llava", adaptation.steps, 1 - args.removed, args.data / "images/validation")
    return {**demo_llava.content(adaptation, report, args.pictures), "real_size": real_size}


def time_real_size(task: str, steps: Steps, keep: float, images: Path) -> dict:
    """Speed of a network of real size relative to the ordinary dense one, at the demo's share of tokens.

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
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"{shlex.join(command)} failed: {done.stderr.strip().splitlines()[-1]}")
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
    steps, losses = content["loss"]
    shares, budget = content["shares"], content["budget"]
    metric, dense, apt = content["accuracy"]
    real = content["real_size"]
    return {
        "title": f"Adaptive patches for {TITLES[task]}",
        "intro": (
            "An Adaptive Patch Transformer (APT) covers the smooth parts of an image with large patches and the busy "
            "parts with small ones, so that the network reads fewer tokens. Here a small dense "
            f"{content['what']} was turned into an APT on this machine: thresholds were chosen for a token budget, a "
            "few new layers were trained for minutes, and everything else stayed as it was."
        ),
        "tiles": [
            {"value": f"{content['kept']:.0%}", "label": "of the content's tokens kept"},
            {"value": f"{dense:.1f} → {apt:.1f}", "label": f"{metric}, dense → APT"},
            {"value": f"{content['speed']:.2f}x", "label": "speed of this small model"},
            {"value": f"{real['median']:.2f}x", "label": f"speed of {real['what']}"},
            {"value": f"{content['minutes']:.1f} min", "label": f"short fine-tune, {steps[-1]} iterations"},
        ],
        "table": content["table"],
        "measured_on": content["measured_on"],
        "methods": content["methods"],
        "speed": (
            f"{content['speed_text']} Adaptive patches make the trunk faster, and only it: in so small a model the "
            f"rest takes much of the time. At a real size they show: {real['what']}, with random weights and "
            f"{real['kept']:.0%} of the tokens, was {real['median']:.2f} times as fast as the ordinary dense one "
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
                    f"their {content['scorer']} score is below {content['thresholds']}. The smoothest image keeps "
                    f"{min(shares):.0%} of its tokens, the busiest {max(shares):.0%}."
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
    args.dense = args.dense or DENSE[args.task]
    if not args.dense.exists():
        raise FileNotFoundError(f"no dense model at {args.dense}; name one with --dense")
    folder = args.out / args.task
    command = shlex.join(["examples/demo.py", *sys.argv[1:]])
    content = (llava_content if args.task == "llava" else mm_content)(args, folder, command)
    write_atomically(folder / "index.html", render(page_of(args.task, content, command)))
    console.print(
        f"\nDone: open [bold]{folder / 'index.html'}[/] in a browser. "
        "Next: your own checkpoint, with the commands at the page's end.",
        soft_wrap=True,
        highlight=False,
    )


if __name__ == "__main__":
    run(main)
