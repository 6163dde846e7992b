#!/usr/bin/env python
"""Convert an original EVA-02 checkpoint to this project's names.

examples:
  python tools/convert_checkpoint.py eva02-det eva02_L_coco_sys.pth checkpoints/eva02_l_det_1536.safetensors
  python tools/convert_checkpoint.py eva02-seg eva02_L_ade_seg_upernet_sz512.pth checkpoints/eva02_l_seg_512.pth

SRC is read without executing anything in it and without loading it whole; DST (.safetensors, or .pth in mmengine's
form) appears only when complete. Every entry of SRC is used or listed as dropped.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tools.cli import parser_of, run
from apt_backbones import convert_eva02, read_checkpoint
from apt_backbones.files import write_atomically

KINDS = {"eva02-det": "det", "eva02-seg": "seg"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("kind", choices=KINDS, help="what SRC was trained for")
    parser.add_argument("source", metavar="SRC", type=Path, help="original checkpoint (.pth, .pt or .safetensors)")
    parser.add_argument("target", metavar="DST", type=Path, help="file to write (.safetensors or .pth)")
    parser.add_argument("--force", action="store_true", help="replace DST if it exists")
    return parser.parse_args(argv)


def convert(kind: str, source: Path, target: Path) -> list[str]:
    """Write the converted weights to ``target`` and return a report, line by line."""
    weights = read_checkpoint(source)
    converted = convert_eva02(weights, kind)
    # Conversion renames, and at most cuts a row off: what shares no memory with the result was dropped.
    used = {tensor.untyped_storage().data_ptr() for tensor in converted.values()}
    dropped = [name for name, tensor in weights.items() if tensor.untyped_storage().data_ptr() not in used]
    write(converted, target)
    size = sum(tensor.numel() for tensor in converted.values())
    return [
        *(f"dropped  {name}  (a buffer that the model computes)" for name in dropped),
        f"{len(weights)} entries read, {len(weights) - len(dropped)} used, {len(dropped)} dropped",
        f"{len(converted)} entries with {size / 1e6:.1f} M values written to {target}",
    ]


def write(weights: dict[str, Tensor], target: Path) -> None:
    def save(unfinished: Path) -> None:
        if target.suffix == ".safetensors":
            save_file({name: tensor.contiguous() for name, tensor in weights.items()}, unfinished)
        else:
            torch.save({"state_dict": weights, "meta": {}}, unfinished)

    write_atomically(target, save)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.target.suffix not in (".safetensors", ".pth"):
        raise ValueError(f"DST must end in .safetensors or .pth, not {args.target.name}")
    if args.target.exists() and not args.force:
        raise FileExistsError(f"{args.target} exists; choose another name or add --force")
    print("\n".join(convert(KINDS[args.kind], args.source, args.target)))


if __name__ == "__main__":
    run(main)
