#!/usr/bin/env python
"""Results on PhotoShapes, all from one command.

examples:
  python examples/photoshapes_results.py det
  python examples/photoshapes_results.py det --dense det_configs/checkpoints/eva02_tiny_dense_photoshapes.safetensors

Trains the dense model (or resumes it, or takes it if it is finished), finds thresholds that remove the asked share of
the images' content tokens, short-fine-tunes, evaluates every method on the validation images, and times them
against each other image by image. Writes docs/results/photoshapes_TASK.json. Started again, it repeats nothing
that is finished and whose inputs (configuration, checkpoint, data, code) are still the same.
"""

import argparse
import shlex
import sys
from pathlib import Path

from mmengine.config import DictAction

from tools.cli import parser_of
from examples.photoshapes_runs import TASKS, Experiment
from examples.report import write_report
from examples.steps import run


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


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    experiment = Experiment(args.task, args.dense, args.removed, args.work_dir / args.task, args.cfg_options)
    command = shlex.join(["examples/photoshapes_results.py", *(argv or sys.argv[1:])])
    print(write_report(args.out / f"photoshapes_{args.task}.json", experiment.report(command)))


if __name__ == "__main__":
    run(main)
