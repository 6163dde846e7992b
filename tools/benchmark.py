#!/usr/bin/env python
"""Speed of dense and adaptive models, side by side in one run.

examples:
  python tools/benchmark.py det_configs/eva02_b_apt_1536.py --keep 1.0 0.7 0.5
  python tools/benchmark.py seg_configs/eva02_l_apt_512.py --device cuda --dtype bf16 --batch-size 8
  python tools/benchmark.py det_configs/eva02_l_apt_1536.py --device cuda --images coco/val2017 --thresholds

Weights are random: speed does not depend on them. All modes run in turn on every batch, and ratios are taken between
runs on the same batch in the same round; medians are quoted. Modes:
  dense       the ordinary dense implementation, images padded to a square
  dense-rect  the same on images that are padded only to whole patches
  packed      the packed implementation without thresholds, images padded to a square
  random, resizing, apt
              adaptive; --padding says what becomes of the square's padding
"""

import argparse
import contextlib
import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from ordinary_eva02 import OrdinaryEva02
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from apt_backbones import APTEva02, PatchLayout
from apt_backbones.calibrate import calibrate_thresholds, score_maps_of
from apt_backbones.eva02 import PADDING_MODES
from apt_backbones.freeze import is_new
from apt_backbones.images import find_images, read_rgb, to_tensor

MODES = ("dense", "dense-rect", "packed", "random", "resizing", "apt")
HOST_ONLY = ("type", "init_cfg", "test_dtype", "drop_path_rate")  # what a config says to mmengine, or for training
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")  # scikit-image's, in three aspect ratios


@dataclass
class Batch:
    square: Tensor  # normalised and padded with zeros to the training square
    rectangle: Tensor  # padded to whole patches only
    content_cells: int


@dataclass
class Case:
    name: str
    backbone: nn.Module
    rectangular: bool = False
    seconds: list[list[float]] = field(default_factory=list)  # [round][batch]
    content_kept: float = 1.0
    padding_kept: float = 1.0
    gflops: float = 0.0
    peak_gb: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)

    def images(self, batch: Batch) -> Tensor:
        return batch.rectangle if self.rectangular else batch.square


def load_backbone_config(config: str) -> tuple[object, dict]:
    """The config and the arguments of its backbone."""
    from mmengine.config import Config

    cfg = Config.fromfile(config, import_custom_modules=False)
    arguments = {k: v for k, v in cfg.model.backbone.items() if k not in HOST_ONLY}
    return cfg, {**arguments, "with_cp": False}


def load_images(source: list[str] | None, side: int, limit: int) -> list[Image.Image]:
    """Images with their longer side as long as the training square's."""
    if source:
        paths = find_images(source)[:limit]
    else:
        import skimage

        paths = [Path(skimage.__file__).parent / "data" / name for name in PHOTOS][:limit]
    images = []
    for path in paths:
        image = read_rgb(path)
        scale = side / max(image.size)
        size = [max(1, round(length * scale)) for length in image.size]
        images.append(image.resize(size, Image.Resampling.BICUBIC))
    return images


def make_batches(images: list[Image.Image], model: APTEva02, side: int, batch_size: int) -> list[Batch]:
    """Batches of images of the same shape class; a batch repeats an image so that its rectangle is exact."""
    batches = []
    for image in images:
        mean, std = model.normalisation_bits.cpu().view(torch.float32)
        normalised = (to_tensor(image) - mean) / std
        rectangle = model._pad(normalised).expand(batch_size, -1, -1, -1)
        square = F.pad(normalised, (0, side - image.width, 0, side - image.height)).expand(batch_size, -1, -1, -1)
        cells = (rectangle.shape[2] // model.patch_size) * (rectangle.shape[3] // model.patch_size) * batch_size
        batches.append(Batch(square.contiguous(), rectangle.contiguous(), cells))
    return batches


def make_cases(
    arguments: dict, modes: Sequence[str], thresholds: dict[str, dict[int, float]], padding: str, device: torch.device
) -> list[Case]:
    """One case per mode, adaptive ones per set of thresholds; all share one set of weights."""
    torch.manual_seed(0)
    dense = APTEva02(**{**arguments, "thresholds": None}).to(device).eval()

    def adaptive(merge: str, limits: dict[int, float]) -> APTEva02:
        model = APTEva02(**{**arguments, "thresholds": limits, "merge": merge, "padding": padding}).to(device).eval()
        for name in ("patch_embed", "blocks", "pos_embed", "cls_token"):
            setattr(model, name, getattr(dense, name))
        return model

    cases = []
    for mode in modes:
        if mode in ("dense", "dense-rect"):
            cases.append(Case(mode, OrdinaryEva02(dense).eval(), rectangular=mode == "dense-rect"))
        elif mode == "packed":
            cases.append(Case(mode, dense))
        else:
            cases += [Case(f"{mode} {label}", adaptive(mode, limits)) for label, limits in thresholds.items()]
    return cases


def gflops_of(layout: PatchLayout, model: APTEva02) -> float:
    """Multiply-adds of the blocks' matrix products times two, in units of 1e9."""
    dim, hidden = model.embed_dim, model.blocks[0].mlp.fc2.in_features
    tokens, total = layout.num_tokens, 0
    for index in range(len(model.blocks)):
        is_global = model.window_size is None or index in model.global_blocks
        lengths = (layout.images if is_global else layout.windows).lengths
        total += tokens * (4 * dim * dim + 3 * dim * hidden) + 2 * dim * sum(n * n for n in lengths)
    return 2 * total / 1e9


def describe(case: Case, batches: list[Batch]) -> None:
    """Tokens kept, arithmetic and stages; raises if a mode does not compute what it claims."""
    content = content_cells = padding = padding_cells = 0
    stages: dict[str, list[float]] = {}
    for batch in batches:
        images = case.images(batch)
        model = case.backbone.model if isinstance(case.backbone, OrdinaryEva02) else case.backbone
        grid = tuple(-(-side // model.patch_size) for side in images.shape[2:])
        for feature_map in case.backbone(images):
            assert feature_map.shape == (len(images), model.embed_dim, *grid), f"{case.name}: {feature_map.shape}"
            assert feature_map.isfinite().all(), f"{case.name} computes NaN"
        layout = model.layout(images)
        rows, columns = (-(-side // model.patch_size) for side in batch.rectangle.shape[2:])
        is_content = (layout.row_T < rows) & (layout.column_T < columns) & (layout.side_T > 0)
        content += int(is_content.sum())
        content_cells += batch.content_cells
        padding += int(((layout.side_T > 0) & ~is_content).sum())
        padding_cells += len(images) * grid[0] * grid[1] - batch.content_cells
        case.gflops += gflops_of(layout, model) / len(images) / len(batches)
        if isinstance(case.backbone, APTEva02):
            for name, seconds in stages_of(case.backbone, images).items():
                stages.setdefault(name, []).append(seconds)
    case.content_kept, case.padding_kept = content / content_cells, padding / max(padding_cells, 1)
    case.stages = {name: statistics.median(seconds) for name, seconds in stages.items()}


def stages_of(model: APTEva02, images: Tensor) -> dict[str, float]:
    """Median seconds of the parts of one forward; the blocks and maps are what remains."""
    layout = model.layout(images)
    parts: dict[str, Callable[[], object]] = {
        "score and select": lambda: model._select(images) if model.thresholds else None,
        "score, select, layout": lambda: model.layout(images),
        "embed": lambda: model._embed(images, layout),
        "rotary": lambda: model._rope(layout),
    }
    return {name: statistics.median(timed(part, images.device) for _ in range(3)) for name, part in parts.items()}


def check_equal(dense: Case, packed: Case, batch: Batch, tolerance: float) -> None:
    """Raises unless the packed model without merging equals the ordinary one."""
    for ours, theirs in zip(packed.backbone(batch.square), dense.backbone(batch.square)):
        error = float((ours - theirs).abs().max() / theirs.abs().max())
        assert error <= tolerance, f"packed and ordinary dense model differ by {error:.1e}"


def timed(function: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def train_step(backbone: nn.Module, images: Tensor) -> None:
    """Forward and backward: all weights of dense modes, only the new layers of adaptive ones (the short fine-tune)."""
    is_adaptive = isinstance(backbone, APTEva02) and bool(backbone.thresholds)
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(is_new(name) or not is_adaptive)
        parameter.grad = None
    sum(feature_map.float().square().mean() for feature_map in backbone(images)).backward()


def measure(cases: list[Case], batches: list[Batch], rounds: int, step: Callable, device: torch.device) -> None:
    """Fill in ``seconds``; every case runs on every batch in every round, the first round warms up."""
    for number in track(range(rounds + 1), description="timing", disable=not sys.stderr.isatty()):
        for case in cases:
            case.seconds.append([])
        for batch in batches:
            for case in cases:
                images = case.images(batch)
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                case.seconds[-1].append(timed(lambda: step(case.backbone, images), device))  # noqa: B023
                if device.type == "cuda":
                    case.peak_gb = max(case.peak_gb, torch.cuda.max_memory_allocated() / 1e9)
        if number == 0:
            for case in cases:
                case.seconds.clear()


def ratios(case: Case, reference: Case) -> list[float]:
    """Reference time / case time, pair by pair."""
    return [slow / fast for slows, fasts in zip(reference.seconds, case.seconds) for slow, fast in zip(slows, fasts)]


def rows_of(cases: list[Case], batch_size: int) -> list[dict]:
    by_name = {case.name: case for case in cases}
    rows = []
    for case in cases:
        seconds = [value for values in case.seconds for value in values]
        row = {
            "mode": case.name,
            "content_kept": round(case.content_kept, 4),
            "padding_kept": round(case.padding_kept, 4),
            "gflops_per_image": round(case.gflops, 4),
            "images_per_second": round(batch_size / statistics.median(seconds), 4),
            "peak_gb": round(case.peak_gb, 2) or None,
            "stages_ms": {name: round(value * 1000, 2) for name, value in case.stages.items()},
            "seconds": [[round(value, 5) for value in values] for values in case.seconds],
        }
        for reference in ("dense", "dense-rect"):
            if reference in by_name:
                pairs = ratios(case, by_name[reference])
                row[f"speed_vs_{reference}"] = {
                    "median": round(statistics.median(pairs), 3),
                    "min": round(min(pairs), 3),
                    "max": round(max(pairs), 3),
                    "bound_by_arithmetic": round(by_name[reference].gflops / case.gflops, 3),
                }
        rows.append(row)
    return rows


def table_of(rows: list[dict], title: str) -> Table:
    table = Table(title=title)
    for column in ("mode", "content", "padding", "GFLOP/img", "img/s", "vs dense", "vs dense-rect", "arithmetic"):
        table.add_column(column, justify="left" if column == "mode" else "right")
    for row in rows:
        versus = [
            "{median:.2f} ({min:.2f}-{max:.2f})".format(**row[key]) if key in row else "-"
            for key in ("speed_vs_dense", "speed_vs_dense-rect")
        ]
        bound = f"{row['speed_vs_dense']['bound_by_arithmetic']:.2f}" if "speed_vs_dense" in row else "-"
        shares = (f"{row['content_kept']:.1%}", f"{row['padding_kept']:.1%}")
        table.add_row(
            row["mode"], *shares, f"{row['gflops_per_image']:.0f}", f"{row['images_per_second']:.3f}", *versus, bound
        )
    return table


def environment(device: torch.device) -> dict:
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "hardware": f"{hardware}, {torch.get_num_threads()} CPU threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def plot(path: Path, rows: list[dict], title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.5 * len(rows) + 1.2), layout="constrained")
    speeds = [row["speed_vs_dense"] for row in rows]
    medians = [speed["median"] for speed in speeds]
    spread = [[s["median"] - s["min"] for s in speeds], [s["max"] - s["median"] for s in speeds]]
    axes.barh([row["mode"] for row in rows], medians, xerr=spread, color="#56B4E9", ecolor="#555555", capsize=3)
    axes.plot([s["bound_by_arithmetic"] for s in speeds], range(len(rows)), "|", color="black", markersize=18)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.invert_yaxis()
    axes.set(xlabel="speed relative to dense (median, range over pairs; | = ratio of arithmetic)", title=title)
    figure.savefig(path, dpi=150)


def parse_args() -> argparse.Namespace:
    first, _, rest = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", nargs="+", metavar="CONFIG", help="adaptive detection or segmentation configs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="autocast to this (default: fp32)")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--img-size", type=int, help="side of the training square (default: the config's)")
    parser.add_argument("--images", nargs="+", metavar="IMAGE|DIR", help="default: four photographs of scikit-image")
    parser.add_argument("--num-images", type=int, default=4, help="use at most so many images (default: 4)")
    parser.add_argument("--modes", default=",".join(MODES), help="comma-separated (default: all)")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--keep", type=float, nargs="+", default=[0.7], help="shares of content tokens (default: 0.7)")
    budget.add_argument("--thresholds", action="store_true", help="use the config's thresholds instead of a budget")
    parser.add_argument("--padding", choices=PADDING_MODES, default="drop", help="adaptive modes' (default: drop)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default: 5)")
    parser.add_argument("--train-step", action="store_true", help="time forward and backward; adaptive hosts frozen")
    parser.add_argument("--stages", action="store_true", help="also print what scoring, layout and embedding take")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures and every single time here")
    parser.add_argument("--plot", type=Path, metavar="PNG")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    device = torch.device(args.device)
    modes = args.modes.split(",")
    if unknown := set(modes) - set(MODES):
        sys.exit(f"error: unknown modes {', '.join(sorted(unknown))}; choose from {', '.join(MODES)}")
    results, console = [], Console()
    for config in args.configs:
        try:
            result = benchmark(config, args, modes, device)
        except (ValueError, OSError) as error:
            sys.exit(f"error: {error}")
        results.append(result)
        console.print(table_of(result["rows"], result["title"]))
        if args.stages:
            console.print_json(data={row["mode"]: row["stages_ms"] for row in result["rows"] if row["stages_ms"]})
        if args.plot:
            plot(args.plot.with_stem(f"{args.plot.stem}_{Path(config).stem}"), result["rows"], result["title"])
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({**environment(device), "results": results}, indent=1) + "\n")


def benchmark(config: str, args: argparse.Namespace, modes: list[str], device: torch.device) -> dict:
    _, arguments = load_backbone_config(config)
    if args.img_size:
        arguments["img_size"] = args.img_size
    if not arguments.get("thresholds"):
        raise ValueError(f"{config} has no thresholds; name an adaptive config")
    side, patch_size = arguments["img_size"], arguments.get("patch_size", 16)
    images = load_images(args.images, side, args.num_images)
    sizes = tuple(sorted(int(size) for size in arguments["thresholds"]))
    if args.thresholds:
        thresholds = {"(config)": {int(size): value for size, value in arguments["thresholds"].items()}}
    else:
        maps = [score_maps_of(to_tensor(image), sizes, arguments.get("scorer", "entropy")) for image in images]
        thresholds = {f"{keep:g}": calibrate_thresholds(maps, patch_size, keep) for keep in args.keep}
    cases = make_cases(arguments, modes, thresholds, args.padding, device)
    reference = next(c.backbone.model if isinstance(c.backbone, OrdinaryEva02) else c.backbone for c in cases)
    batches = [
        Batch(batch.square.to(device), batch.rectangle.to(device), batch.content_cells)
        for batch in make_batches(images, reference, side, args.batch_size)
    ]
    dtype = DTYPES[args.dtype]
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    with autocast:
        with torch.inference_mode():
            by_name = {case.name: case for case in cases}
            if "dense" in by_name and "packed" in by_name:
                check_equal(by_name["dense"], by_name["packed"], batches[0], 1e-4 if args.dtype == "fp32" else 5e-2)
            for case in cases:
                describe(case, batches)
        if args.train_step:
            # Without new layers there is nothing to fine-tune.
            cases = [case for case in cases if not case.name.startswith(("random", "resizing"))]
            measure(cases, batches, args.rounds, train_step, device)
        else:
            with torch.inference_mode():
                measure(cases, batches, args.rounds, lambda backbone, x: backbone(x), device)
    title = f"{Path(config).stem}: trunk at {side} px, batch {args.batch_size}, {args.dtype}"
    title += ", training step" if args.train_step else ""
    return {
        "title": title,
        "config": config,
        "thresholds": thresholds,
        "padding": args.padding,
        "rows": rows_of(cases, args.batch_size),
    }


if __name__ == "__main__":
    main()
