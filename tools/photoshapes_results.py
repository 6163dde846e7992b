#!/usr/bin/env python
"""Results on PhotoShapes, all from one command: ``tools/photoshapes_results.py det``.

Trains the dense model (or resumes it, or takes it if it is finished), finds thresholds that remove the asked share of
the images' content tokens, short-fine-tunes, evaluates every method on the validation images, and times them
against each other image by image. Writes docs/results/photoshapes_TASK.json and .md.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, RUNNERS, init_default_scope
from mmengine.runner import Runner
from rich.console import Console
from rich.progress import track

from apt_backbones.calibrate import calibrate_thresholds, score_maps_of

PACKAGES = ("torch", "onedl-mmengine", "onedl-mmcv", "onedl-mmdetection", "onedl-mmsegmentation", "timm")
TIMED_IMAGES, TIMED_ROUNDS = 10, 3
console = Console(stderr=True)


@dataclass(frozen=True)
class Task:
    """What differs between tasks.

    Attributes:
        configs: path with {} for the method.
        metrics: title -> (name of the metric, factor).
        ratios: threshold of each merged size relative to that of the smallest.
        rectangles: whether there are test configurations without square padding.
    """

    configs: str
    metrics: dict[str, tuple[str, float]]
    ratios: tuple[float, ...]
    rectangles: bool = False


TASKS = {
    "det": Task(
        configs="det_configs/eva02_tiny_{}_photoshapes.py",
        metrics={
            "box mAP": ("coco/bbox_mAP", 100),
            "AP50": ("coco/bbox_mAP_50", 100),
            "mask mAP": ("coco/segm_mAP", 100),
        },
        ratios=(1.0, 0.3),
        rectangles=True,
    ),
    "seg": Task(
        configs="seg_configs/eva02_tiny_{}_photoshapes.py",
        metrics={
            "mIoU": ("mIoU", 1),
            "aAcc": ("aAcc", 1),
            "mIoU within 3 px of borders": ("border/mIoU", 1),
        },
        ratios=(1.0,),
    ),
}


@dataclass(frozen=True)
class Row:
    """One line of the table: a configuration tested with a checkpoint."""

    title: str
    config: str
    checkpoint: Path


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--dense", type=Path, metavar="FILE", help="weights of a dense model, instead of training one")
    parser.add_argument("--removed", type=float, default=0.27, help="share of content tokens to remove (%(default)s)")
    parser.add_argument(
        "--work-dir", type=Path, default=Path("work_dirs"), help="for checkpoints, in a folder per task (%(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="for the tables (%(default)s)")
    return parser.parse_args(argv)


def train(config: str, work_dir: Path, **settings: object) -> Path:
    """The last checkpoint of a configuration; trains or resumes it if there is none."""
    cfg = Config.fromfile(config)
    checkpoint = work_dir / Path(config).stem / f"iter_{cfg.train_cfg.max_iters}.pth"
    if not checkpoint.is_file():
        options = [f"{name}={value}" for name, value in settings.items()]
        command = [sys.executable, "tools/train.py", config, "--work-dir", str(checkpoint.parent), "--resume"]
        subprocess.run(command + (["--cfg-options", *options] if options else []), check=True)
    return checkpoint


def minutes_trained(checkpoint: Path) -> float:
    """Time spent in training iterations, by the run's own log."""
    interval = Config.fromfile(next(checkpoint.parent.glob("*.py"))).default_hooks.logger.interval
    logs = checkpoint.parent.glob("*/vis_data/scalars.json")
    lines = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    return sum({line["iter"]: line["time"] for line in lines if "loss" in line}.values()) * interval / 60


def calibrate(task: Task, removed: float) -> dict[int, float]:
    """Thresholds that remove this share of the validation images' content tokens; their annotations are not used."""
    cfg = Config.fromfile(task.configs.format("apt"))
    init_default_scope(cfg.default_scope)
    dataset, backbone = DATASETS.build(cfg.test_dataloader.dataset), cfg.model.backbone
    score_maps = [
        # BGR to RGB
        score_maps_of(dataset[index]["inputs"].flip(0)[None].float(), tuple(backbone.thresholds), scorer_of(cfg))
        for index in track(range(len(dataset)), "calibrating", console=console, transient=True)
    ]
    return calibrate_thresholds(score_maps, backbone.patch_size, 1 - removed, task.ratios)


def scorer_of(cfg: Config) -> str:
    return cfg.model.backbone.get("scorer", "entropy")


def evaluate(row: Row, work_dir: Path, thresholds: dict[int, float]) -> tuple[dict[str, float], Runner]:
    cfg = Config.fromfile(row.config)
    if "thresholds" in cfg.model.backbone:
        cfg.model.backbone.thresholds = thresholds
    cfg.update(load_from=str(row.checkpoint), work_dir=str(work_dir), experiment_name=row.title, log_level="WARNING")
    runner = RUNNERS.build(cfg)
    return runner.test(), runner


@torch.no_grad()
def time_interleaved(runners: dict[str, Runner]) -> dict[str, float]:
    """Seconds per image relative to the first runner: the median over images and rounds.

    Every image goes through all models in turn, so that whatever else the machine does hits all of them alike.
    """
    first = next(iter(runners))
    batches = {title: [] for title in runners}
    for title, runner in runners.items():
        for index in range(TIMED_IMAGES):
            batches[title].append({k: [v] for k, v in runner.test_dataloader.dataset[index].items()})
    seconds = {title: [] for title in runners}
    for index in track(range(TIMED_IMAGES), "timing", console=console, transient=True):
        for round_ in range(TIMED_ROUNDS + 1):
            for title, runner in runners.items():
                start = time.perf_counter()
                runner.model.test_step(batches[title][index])
                if round_:  # the first round warms up
                    seconds[title].append(time.perf_counter() - start)
    ratios = {t: statistics.median(a / b for a, b in zip(s, seconds[first])) for t, s in seconds.items()}
    return {title: statistics.median(seconds[first]) * ratio for title, ratio in ratios.items()}


def hardware() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")] or [platform.processor()]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} thread(s)"
    return f"{names[0]}, {os.cpu_count()} cores; {device}"


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


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.dense and not args.dense.is_file():
        sys.exit(f"error: no checkpoint at {args.dense}; leave out --dense to train one")
    task, work_dir = TASKS[args.task], args.work_dir / args.task
    config = task.configs.format
    dense = args.dense or train(config("dense"), work_dir)
    thresholds = calibrate(task, args.removed)
    settings = {"train_cfg.val_begin": 10**9}  # the table has every figure
    settings |= {f"model.backbone.thresholds.{size}": t for size, t in thresholds.items()}
    tuned = train(config("apt"), work_dir, load_from=dense, **settings)

    rows = [
        Row("dense", config("dense"), dense),
        Row("random", config("random"), dense),
        Row("resizing", config("resizing"), dense),
        Row("APT before the short fine-tune", config("apt"), dense),
        Row("APT after the short fine-tune", config("apt"), tuned),
    ]
    if task.rectangles:
        rows.insert(1, Row("dense, not padded to a square", config("dense").replace(".py", "_rect.py"), dense))
        rows.append(Row("APT after, not padded to a square", config("apt").replace(".py", "_rect.py"), tuned))
    evaluated = {row: evaluate(row, work_dir / "results", thresholds) for row in rows}
    seconds = time_interleaved({row.title: runner for row, (_, runner) in evaluated.items()})

    results = {
        "task": args.task,
        "command": shlex.join(["tools/photoshapes_results.py", *(argv or sys.argv[1:])]),
        "hardware": hardware(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "scorer": scorer_of(Config.fromfile(config("apt"))),
        "thresholds": thresholds,
        "minutes_dense": None if args.dense else minutes_trained(dense),
        "minutes_short_finetune": minutes_trained(tuned),
        "rows": [
            {
                "title": row.title,
                "config": row.config,
                "metrics": {title: float(metrics[name]) * factor for title, (name, factor) in task.metrics.items()},
                **{k: metrics[k] for k in ("tokens", "content_kept", "content_kept_min", "content_kept_max")},
                "padding_kept": metrics.get("padding_kept"),
                "images_per_second": 1 / seconds[row.title],
            }
            for row, (metrics, _) in evaluated.items()
        ],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    for suffix, text in ((".json", json.dumps(results, indent=1) + "\n"), (".md", table(results))):
        temporary = args.out / f".photoshapes_{args.task}{suffix}"
        temporary.write_text(text)
        os.replace(temporary, args.out / f"photoshapes_{args.task}{suffix}")
    print(table(results))


if __name__ == "__main__":
    main()
