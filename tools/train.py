#!/usr/bin/env python
"""Train a detector or segmenter: ``tools/train.py CONFIG``, with the flags of mmdetection's and mmsegmentation's own.

tools/train.py det_configs/eva02_tiny_dense_photoshapes.py --resume
torchrun --nproc_per_node 8 tools/train.py det_configs/eva02_l_apt_1536.py --launcher pytorch --amp
"""

import argparse

from mm_config import add_common_arguments, load_config, run
from mmengine.registry import RUNNERS
from mmengine.runner import find_latest_checkpoint


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", help="configuration file")
    add_common_arguments(parser)
    parser.add_argument("--amp", action="store_true", help="train with automatic mixed precision")
    parser.add_argument("--auto-scale-lr", action="store_true", help="scale the learning rate with the batch size")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        help="resume from this checkpoint, or without a value from the latest one in the work directory",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    cfg = load_config(args)
    if args.amp:
        cfg.optim_wrapper.type = "AmpOptimWrapper"
        cfg.optim_wrapper.setdefault("loss_scale", "dynamic")
    if args.auto_scale_lr:
        if "base_batch_size" not in cfg.get("auto_scale_lr", {}):
            raise ValueError(f"--auto-scale-lr needs auto_scale_lr.base_batch_size, which {args.config} does not set")
        cfg.auto_scale_lr.enable = True
    if args.resume == "auto":
        # Only a run that has begun is resumed: a fine-tune that has not starts from its load_from.
        if find_latest_checkpoint(cfg.work_dir):
            cfg.resume, cfg.load_from = True, None
    elif args.resume is not None:
        cfg.resume, cfg.load_from = True, args.resume
    RUNNERS.build(cfg).train()


if __name__ == "__main__":
    run(main)
