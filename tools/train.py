#!/usr/bin/env python
"""Train a detector, segmenter or classifier, with the flags of mmdetection's and mmsegmentation's own tools/train.py.

examples:
  python tools/train.py det_configs/eva02_tiny_dense_photoshapes.py --resume
  torchrun --nproc_per_node 8 tools/train.py det_configs/eva02_l_apt_1536.py --launcher pytorch --amp

Adaptive configs short-fine-tune from the dense checkpoint that they name in load_from. Runs without a GPU, too.
"""

import argparse
from pathlib import Path

import torch

from tools.cli import check_at_least, parser_of, run
from apt_backbones.mm.runner import latest_checkpoint
from tools.mm_config import accumulate, add_common_arguments, build_runner, check_data, load_config


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("config", help="configuration file")
    add_common_arguments(parser)
    parser.add_argument("--amp", action="store_true", help="train with automatic mixed precision")
    parser.add_argument("--auto-scale-lr", action="store_true", help="scale the learning rate with the batch size")
    parser.add_argument(
        "--accumulate", type=int, default=1, metavar="N", help="N batches make a step, so that N times as many are seen"
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        help="resume from this checkpoint, or without a value from the latest one in the work directory",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_at_least(args, accumulate=1)
    if args.accumulate > 1 and args.auto_scale_lr:
        raise ValueError("--auto-scale-lr would take a batch for a step; give either it or --accumulate")
    cfg = load_config(args)
    check_data(cfg, ["train_dataloader", "val_dataloader"])
    if args.amp and not torch.cuda.is_available():
        raise ValueError("--amp needs a GPU, and torch finds none")
    if args.amp:
        cfg.optim_wrapper.type = "AmpOptimWrapper"
        cfg.optim_wrapper.setdefault("loss_scale", "dynamic")
    elif cfg.optim_wrapper.get("type") == "AmpOptimWrapper" and not torch.cuda.is_available():
        cfg.optim_wrapper.type = "OptimWrapper"  # in full precision, as there is no GPU
        for option in ("loss_scale", "dtype", "use_fsdp"):
            cfg.optim_wrapper.pop(option, None)
    if args.auto_scale_lr:
        if "base_batch_size" not in cfg.get("auto_scale_lr", {}):
            raise ValueError(f"--auto-scale-lr needs auto_scale_lr.base_batch_size, which {args.config} does not set")
        cfg.auto_scale_lr.enable = True
    if args.accumulate > 1:
        accumulate(cfg, args.accumulate)
    if args.resume == "auto":
        # Only a run that has begun is resumed: a fine-tune that has not starts from its load_from.
        if latest := latest_checkpoint(cfg.work_dir):
            cfg.resume, cfg.load_from = True, latest
    elif args.resume is not None:
        cfg.resume, cfg.load_from = True, args.resume
    if cfg.get("load_from") and not Path(cfg.load_from).is_file():
        raise FileNotFoundError(f"no checkpoint at {cfg.load_from}, from which {args.config} starts (load_from)")
    build_runner(cfg).train()


if __name__ == "__main__":
    run(main)
