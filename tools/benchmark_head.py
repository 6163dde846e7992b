#!/usr/bin/env python
"""Speed of UPerHead's plain and cheap inference, in turn in one run, on random maps and weights.

examples:
  python tools/benchmark_head.py seg_configs/eva02_l_dense_512.py --threads 1
  python tools/benchmark_head.py seg_configs/eva02_l_dense_512.py --channels 256 512 1024 --img-size 256 512
  python tools/benchmark_head.py seg_configs/eva02_l_dense_512.py --device cuda --dtype bf16 --batch-size 8
"""

import argparse
import statistics
import sys
import time
import warnings

import torch
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import apt_backbones.mm.upernet  # noqa: F401  registers the head
from tools.cli import parser_of, run
from tools.mm_config import read_config

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
METHODS = ("plain", "cheap")


def parse_args() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("config", help="a segmentation config")
    parser.add_argument("--channels", type=int, nargs="+", help="widths of head and maps (default: the config's)")
    parser.add_argument("--img-size", type=int, nargs="+", help="pixels (default: the config's)")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--threads", type=int, help="of the CPU (default: torch's)")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds (default: 3)")
    return parser.parse_args()


def seconds_of(head: nn.Module, maps: list[Tensor], inference: str) -> tuple[float, Tensor]:
    head.inference = inference
    wait = torch.cuda.synchronize if maps[0].is_cuda else lambda: None
    wait()
    start = time.perf_counter()
    logits = head(maps)
    wait()
    return time.perf_counter() - start, logits


@torch.inference_mode()
def measure(model: dict, channels: int | None, side: int, args: argparse.Namespace) -> str:
    """A row of the table; raises AssertionError if the two kinds of inference do not agree."""
    options = dict(model["decode_head"], norm_cfg=dict(type="BN"))
    if channels:
        options.update(channels=channels, in_channels=[channels] * len(options["in_channels"]))
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    head = MODELS.build(options).to(device, dtype).eval()
    cells = side // model["backbone"]["patch_size"]
    maps = [
        torch.randn(args.batch_size, width, *[max(1, int(cells * scale))] * 2, device=device, dtype=dtype)
        for width, scale in zip(head.in_channels, model["neck"]["rescales"])
    ]
    logits, gflops = {}, {}
    for name in METHODS:  # this also warms up
        with FlopCounterMode(display=False) as counter:
            _, logits[name] = seconds_of(head, maps, name)
        gflops[name] = counter.get_total_flops() / args.batch_size / 1e9
    error = float((logits["cheap"] - logits["plain"]).norm() / logits["plain"].norm())
    assert error < (1e-4 if dtype == torch.float32 else 2e-2), f"plain and cheap differ by {error:.1e}"

    rounds = [{name: seconds_of(head, maps, name)[0] for name in METHODS} for _ in range(args.rounds)]
    seconds = {name: [one_round[name] for one_round in rounds] for name in METHODS}
    ratios = sorted(plain / cheap for plain, cheap in zip(seconds["plain"], seconds["cheap"]))
    plain, cheap = (statistics.median(seconds[name]) * 1000 for name in METHODS)
    cost = f"{gflops['plain']:.1f} | {gflops['cheap']:.1f} | {plain:.1f} | {cheap:.1f}"
    spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"
    return f"| {head.channels} | {'x'.join(map(str, maps[0].shape[2:]))} | {cost} | {spread} | {error:.0e} |"


def main() -> None:
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", module="mmseg")  # about losses, which do not run here
    init_default_scope("mmseg")
    model = read_config(args.config, import_custom_modules=False).model
    if model.get("decode_head", {}).get("type") != "FastUPerHead":
        raise ValueError(f"{args.config} has no decode_head of type FastUPerHead; name another segmentation config")
    on_gpu = args.device.startswith("cuda")
    hardware = torch.cuda.get_device_name() if on_gpu else torch.backends.cpu.get_cpu_capability()
    print(f"`python {' '.join(sys.argv)}`")
    print(f"torch {torch.__version__}, {hardware}, {torch.get_num_threads()} CPU threads, batch {args.batch_size}\n")
    print("| channels | finest map | GFLOP plain | cheap | ms plain | cheap | plain / cheap | difference |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for channels in args.channels or [None]:
        for side in args.img_size or [model.backbone.img_size]:
            print(measure(model, channels, side, args), flush=True)


if __name__ == "__main__":
    run(main)
