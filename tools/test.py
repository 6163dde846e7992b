#!/usr/bin/env python
"""Test a detector or segmenter: ``tools/test.py CONFIG CHECKPOINT``, with the flags of the toolboxes' own.

tools/test.py det_configs/eva02_tiny_apt_photoshapes.py work_dirs/det/eva02_tiny_apt_photoshapes/iter_60.pth
"""

import argparse

from mm_config import add_common_arguments, load_config, run
from mmengine.evaluator import DumpResults
from mmengine.registry import RUNNERS


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", help="configuration file")
    parser.add_argument("checkpoint", help="checkpoint (.pth or .safetensors)")
    add_common_arguments(parser)
    parser.add_argument("--out", help="also write all predictions to this pickle file (.pkl)")
    parser.add_argument("--show-dir", help="also paint predictions into images in this folder of the work directory")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, float]:
    args = parse_args(argv)
    cfg = load_config(args)
    cfg.load_from = args.checkpoint
    if args.show_dir:
        cfg.default_hooks.visualization.update(draw=True, test_out_dir=args.show_dir)
    runner = RUNNERS.build(cfg)
    if args.out:
        runner.test_evaluator.metrics.append(DumpResults(out_file_path=args.out))
    return runner.test()


if __name__ == "__main__":
    run(main)
