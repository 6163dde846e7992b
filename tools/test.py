#!/usr/bin/env python
"""Test a detector, segmenter or classifier, with the flags of mmdetection's and mmsegmentation's own tools/test.py.

examples:
  python tools/test.py det_configs/eva02_tiny_apt_photoshapes.py \\
      det_configs/checkpoints/eva02_tiny_apt_photoshapes.safetensors
  python tools/test.py seg_configs/eva02_l_apt_512.py work_dirs/seg/eva02_l_apt_512/iter_4000.pth --show-dir painted

Metrics and the tokens kept are printed and logged to the work directory. Runs without a GPU, too.
"""

import argparse
from pathlib import Path

from mmengine.evaluator import DumpResults

from tools.cli import parser_of, run
from tools.mm_config import add_common_arguments, build_runner, check_data, load_config


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("config", help="configuration file")
    parser.add_argument("checkpoint", help="checkpoint (.pth or .safetensors)")
    add_common_arguments(parser)
    parser.add_argument("--out", help="also write all predictions to this pickle file (.pkl)")
    parser.add_argument("--show-dir", help="also paint predictions into images in this folder of the work directory")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, float]:
    args = parse_args(argv)
    cfg = load_config(args)
    check_data(cfg, ["test_dataloader"])
    cfg.load_from = args.checkpoint
    if not Path(args.checkpoint).is_file():  # before the data is read, which may take minutes
        raise FileNotFoundError(f"no checkpoint at {args.checkpoint}")
    if args.show_dir:
        if "visualization" not in cfg.default_hooks:
            raise ValueError(f"--show-dir: {args.config} has no visualization hook; classifiers paint nothing")
        if cfg.default_scope == "mmseg":
            cfg.default_hooks.visualization.update(draw=True, interval=1)
            cfg.visualizer.save_dir = str(Path(cfg.work_dir, args.show_dir))
        else:
            cfg.default_hooks.visualization.update(draw=True, test_out_dir=args.show_dir)
    runner = build_runner(cfg)
    runner.model.requires_grad_(False)  # frozen projections run as one product
    if args.out:
        runner.test_evaluator.metrics.append(DumpResults(out_file_path=args.out))
    return runner.test()


if __name__ == "__main__":
    run(main)
