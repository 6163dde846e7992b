#!/usr/bin/env python
"""Results on PhotoShapes, all from one command.

examples:
  python examples/photoshapes_results.py det
  python examples/photoshapes_results.py det --dense det_configs/checkpoints/eva02_tiny_dense_photoshapes.safetensors

Trains the dense model (or resumes it, or takes it if it is finished), finds thresholds that remove the asked share of
the images' content tokens, short-fine-tunes, evaluates every method on the validation images, and times them
against each other image by image. Writes docs/results/photoshapes_TASK.json and .md. Started again, it repeats nothing
that is finished and whose inputs (configuration, checkpoint, data, code) are still the same.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

from mmengine.config import DictAction

from tools.cli import parser_of
from apt_backbones.files import write_atomically
from examples.photoshapes_runs import TASKS, Experiment, minutes_trained, scorer_of
from examples.steps import run
from tools.machine import hardware


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--dense", type=Path, metavar="FILE", help="weights of a dense model, instead of training one")
    parser.add_argument("--removed", type=float, default=0.27, help="share of content tokens to remove (%(default)s)")
    parser.add_argument(
        "--work-dir", type=Path, default=Path("work_dirs"), help="for checkpoints, in a folder per task (%(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="for the tables (%(default)s)")
    parser.add_argument(
        "--cfg-options", nargs="+", action=DictAction, help="settings that replace those of all configs: key=value"
    )
    return parser.parse_args(argv)


def measure(experiment: Experiment, task: str, command: str) -> dict:
    """Everything in the table."""
    metrics = {row: experiment.evaluate(row) for row in experiment.rows}
    titles = experiment.task.metrics.items()
    return {
        "task": task,
        "command": command,
        "hardware": hardware(),
        "versions": experiment.versions,
        "scorer": scorer_of(experiment.config(experiment.path("apt"))),
        "thresholds": experiment.calibration["thresholds"],
        "minutes_dense": minutes_trained(experiment.dense) if experiment.trains_dense else None,
        "minutes_short_finetune": minutes_trained(experiment.tuned),
        "rows": [
            {
                "title": row.title,
                "config": row.config,
                "metrics": {title: found[name] * factor for title, (name, factor) in titles},
                **{k: found[k] for k in ("tokens", "content_kept", "content_kept_min", "content_kept_max")},
                "padding_kept": found.get("padding_kept"),
                "images_per_second": 1 / experiment.seconds[row.title],
            }
            for row, found in metrics.items()
        ],
    }


def table(results: dict) -> str:
    titles = list(results["rows"][0]["metrics"])
    head = ["method", *titles, "content tokens", "padding tokens", "img/s", "relative to dense"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    dense = results["rows"][0]["images_per_second"]
    for row in results["rows"]:
        padding = f"{row['padding_kept']:.1%}" if row["padding_kept"] is not None else "none"
        cells = [row["title"], *(f"{row['metrics'][t]:.2f}" for t in titles), f"{row['content_kept']:.1%}", padding]
        cells += [f"{row['images_per_second']:.2f}", f"{row['images_per_second'] / dense:.2f}x"]
        lines.append("| " + " | ".join(cells) + " |")
    thresholds = ", ".join(f"{size} px: {t:g}" for size, t in results["thresholds"].items())
    minutes = results["minutes_dense"]
    trained = "" if minutes is None else f"Dense training from scratch took {minutes:.0f} minutes. "
    return "\n".join(
        [
            f"# PhotoShapes: {results['task']}",
            "",
            f"Made by `{results['command']}` on {results['hardware']}.",
            f"{trained}The short fine-tune took {results['minutes_short_finetune']:.1f} minutes. "
            f"Thresholds ({results['scorer']}): {thresholds}.",
            "",
            *lines,
            "",
            "Tokens are those kept, of all base patches. Speed is of the whole model for one image at a time, without",
            "loading: medians over images that go through all methods in turn.",
            "",
        ]
    )


def write_tables(results: dict, folder: Path) -> None:
    """``photoshapes_TASK.json`` and ``.md``."""
    write_atomically(folder / f"photoshapes_{results['task']}.json", json.dumps(results, indent=1) + "\n")
    write_atomically(folder / f"photoshapes_{results['task']}.md", table(results))


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    experiment = Experiment(args.task, args.dense, args.removed, args.work_dir / args.task, args.cfg_options)
    command = shlex.join(["examples/photoshapes_results.py", *(argv or sys.argv[1:])])
    results = measure(experiment, args.task, command)
    write_tables(results, args.out)
    print(table(results))


if __name__ == "__main__":
    run(main)
