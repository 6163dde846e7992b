"""What tools/train.py and tools/test.py share: flags, and the configuration that the flags change."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from mmengine.config import Config, DictAction


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--work-dir", help="folder for logs and checkpoints (work_dirs/CONFIG)")
    parser.add_argument(
        "--cfg-options", nargs="+", action=DictAction, help='settings that replace the file\'s: key=value, key="[a,b]"'
    )
    parser.add_argument("--launcher", choices=("none", "pytorch", "slurm", "mpi"), default="none", help="job launcher")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help="set by the launcher")


def load_config(args: argparse.Namespace) -> Config:
    """The configuration file with the flags applied."""
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    if not Path(args.config).is_file():
        raise FileNotFoundError(f"no configuration at {args.config}; see det_configs/ and seg_configs/")
    cfg = Config.fromfile(args.config)
    cfg.launcher = args.launcher
    if args.cfg_options:
        cfg.merge_from_dict(args.cfg_options)
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or str(Path("work_dirs", Path(args.config).stem))
    return cfg


def run(main: Callable[[], object]) -> None:
    """Run a tool; files that are missing are reported in one line."""
    try:
        main()
    except FileNotFoundError as error:
        sys.exit(f"error: {error}")
