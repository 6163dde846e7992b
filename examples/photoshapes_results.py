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

import json
import platform
import shlex
import sys
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from mmengine.runner import Runner, find_latest_checkpoint

from tools.cli import check_shares, parser_of
from apt_backbones.calibrate import calibrate_thresholds, kept_shares, score_maps_of
from examples.report import AFTER, BEFORE, DENSE, LEARNED, SMALLER_DENSE, write_report
from tools.compare import metrics_of
from tools.machine import hardware
from tools.mm_config import add_settings_argument, advice_for, merge_number_keys
from tools.mm_runs import (
    TIMED_IMAGES,
    TIMED_ROUNDS,
    Bar,
    build,
    quiet,
    ratios_of,
    rescaled,
    scorer_of,
    tested_images,
    time_interleaved,
)
from tools.steps import Steps, announced, console, digest, fingerprint, run

PACKAGES = ("torch", "onedl-mmengine", "onedl-mmcv", "onedl-mmdetection", "onedl-mmsegmentation", "timm")
KEPT = ("tokens", "content_kept", "content_kept_min", "content_kept_max", "padding_kept")
LOGGED, SAVED = 30, 6  # times in a short fine-tune, if it has as many iterations
ROOT = Path(__file__).parents[1]
TASKS = ("det", "seg")
SMALLER = {"det": 168 / 192, "seg": 136 / 160}  # images of about as many tokens, in whole patches


@dataclass(frozen=True)
class Row:
    """One line of the table: a configuration tested with a checkpoint, on images of this share of its size."""

    title: str
    config: str
    checkpoint: Path
    scale: float = 1.0


class Experiment:
    """A dense model, its adaptation to a token budget, and the comparison of all methods; each step done when needed.

    Args:
        task: "det" or "seg".
        dense: checkpoint of the dense model; it is trained if none is given.
        removed: share of content tokens to remove.
        work_dir: for everything that is kept between runs.
        options: settings that replace those of all configurations.

    Raises:
        FileNotFoundError: there is no such checkpoint, or no data.
    """

    def __init__(self, task: str, dense: Path | None, removed: float, work_dir: Path, options: dict | None = None):
        self.task, self.has_rectangles = task, task == "det"  # test configs without square padding
        self.removed, self.work_dir, self.options = removed, work_dir, options or {}
        self.trains_dense = dense is None
        if dense and not dense.is_file():
            raise FileNotFoundError(f"no checkpoint at {dense}; leave out --dense to train one")
        self.data = Path(self.config(self.path("dense")).test_dataloader.dataset.data_root)
        if not self.data.is_dir():
            raise FileNotFoundError(f"no data at {self.data}; {advice_for(self.data)}")
        self.versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
        code = fingerprint(ROOT / "apt_backbones", ROOT / "tools/mm_runs.py", __file__, pattern="*.py")
        self.steps = Steps(
            work_dir / "steps", {"data": fingerprint(self.data), "code": code, "versions": self.versions}
        )
        self._dense = dense

    def path(self, method: str, rectangle: bool = False) -> str:
        """Configuration file of a method, relative to the repository."""
        return f"{self.task}_configs/eva02_tiny_{method}_photoshapes{'_rect' * rectangle}.py"

    def config(self, path: str) -> Config:
        with quiet():  # the toolboxes are imported
            cfg = Config.fromfile(ROOT / path)
        cfg.merge_from_dict(self.options)
        merge_number_keys(cfg._cfg_dict)
        return cfg

    def adapted(self, path: str, scale: float = 1.0) -> Config:
        """The configuration with the thresholds that were found, if it has thresholds; for images of another scale."""
        cfg = self.config(path)
        if "thresholds" in cfg.model.backbone:
            calibration = self.calibration_of_learned if path == self.path("learned") else self.calibration
            cfg.model.backbone.thresholds = calibration["thresholds"]
        return rescaled(cfg, scale, cfg.model.backbone.patch_size) if scale != 1 else cfg

    # ------------------------------------------------------------------------------------------- steps

    @cached_property
    def dense(self) -> Path:
        """Checkpoint of the dense model."""
        path = self.path("dense")
        return self._dense or train(self.config(path), self.work_dir / Path(path).stem, "training of the dense model")

    @cached_property
    def calibration(self) -> dict:
        """``thresholds`` by size, and the ``shares`` of their tokens that the validation images then keep."""
        return self._calibration("apt")

    @cached_property
    def calibration_of_learned(self) -> dict:
        """The same with the learned scorer."""
        return self._calibration("learned")

    def _calibration(self, method: str) -> dict:
        cfg = self.config(self.path(method))
        inputs = {"config": digest(cfg.to_dict()), "removed": self.removed}
        title = f"thresholds of the {method} configuration that keep {1 - self.removed:.0%} of the content tokens"
        found = self.steps.run(f"thresholds_{method}", title, inputs, lambda: calibrate(cfg, self.removed))
        return {**found, "thresholds": {int(size): value for size, value in found["thresholds"].items()}}

    @cached_property
    def tuned(self) -> Path:
        """Checkpoint after the short fine-tune."""
        cfg = self.adapted(self.path("apt"))
        iterations = cfg.train_cfg.max_iters
        logged = max(1, iterations // LOGGED)
        cfg.merge_from_dict(
            {
                "load_from": str(self.dense),
                "train_cfg.val_begin": 10**9,  # the table has every figure
                "default_hooks.logger.interval": logged,
                "log_processor.window_size": logged,
                "default_hooks.checkpoint.interval": max(1, iterations // SAVED),
            }
        )
        inputs = digest([self.steps.common, cfg.to_dict(), fingerprint(self.dense)])
        folder = self.work_dir / f"{Path(self.path('apt')).stem}-{inputs}"
        return train(cfg, folder, f"short fine-tune, {iterations} iterations")

    @cached_property
    def rows(self) -> list[Row]:
        path, dense, tuned = self.path, self.dense, self.tuned
        rows = [
            Row(DENSE, path("dense"), dense),
            Row(SMALLER_DENSE, path("dense"), dense, SMALLER[self.task]),
            Row("random", path("random"), dense),
            Row("resizing", path("resizing"), dense),
            Row(BEFORE, path("apt"), dense),
            Row(AFTER, path("apt"), tuned),
            Row(LEARNED, path("learned"), dense),
        ]
        if self.has_rectangles:
            rows.insert(1, Row("dense, not padded to a square", path("dense", rectangle=True), dense))
            rows.append(Row("APT after, not padded to a square", path("apt", rectangle=True), tuned))
        return rows

    def evaluate(self, row: Row) -> dict[str, float]:
        """All metrics of a row."""

        def test() -> dict[str, float]:
            with quiet(), Bar("images") as bar:
                runner = self.runner(row)
                runner.register_hook(bar)
                return {name: float(value) for name, value in runner.test().items()}

        name = row.title.replace(",", "").replace(" ", "_")
        return self.steps.run(name, f"evaluation: {row.title}", self.inputs(row), test)

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Seconds per image of every row."""
        inputs = {row.title: self.inputs(row) for row in self.rows}
        inputs |= {"hardware": hardware(), "images": TIMED_IMAGES, "rounds": TIMED_ROUNDS}

        def measure() -> dict[str, float]:
            with quiet():
                return time_interleaved({row.title: self.loaded(row) for row in self.rows})

        return self.steps.run(
            "speed", f"speed: {TIMED_IMAGES} images through all methods, interleaved", inputs, measure
        )

    def report(self, command: str) -> dict:
        """The comparison, as examples/report.py describes it."""
        found = {row: self.evaluate(row) for row in self.rows}
        return {
            "task": self.task,
            "command": command,
            "hardware": hardware(),
            "versions": self.versions,
            "measured_on": f"PhotoShapes' {len(self.calibration['shares'])} validation images",
            "scorer": scorer_of(self.config(self.path("apt"))),
            "thresholds": self.calibration["thresholds"],
            "learned_thresholds": self.calibration_of_learned["thresholds"],
            "minutes_dense": minutes_trained(self.dense) if self.trains_dense else None,
            "minutes_short_finetune": minutes_trained(self.tuned),
            "rows": [
                {
                    "title": row.title,
                    "config": row.config,
                    "metrics": metrics_of(metrics),
                    **{k: metrics.get(k) for k in KEPT},
                    "content_kept": metrics["content_kept"] * row.scale**2,
                    "per_second": 1 / self.seconds[row.title],
                }
                for row, metrics in found.items()
            ],
        }

    def losses(self) -> list[tuple[int, float]]:
        """Iterations of the short fine-tune and their losses, as they were logged."""
        return [(line["iter"], line["loss"]) for line in training_log(self.tuned)]

    # ------------------------------------------------------------------------------------------- models

    def inputs(self, row: Row) -> dict[str, str]:
        """What the results of a row depend on."""
        return {
            "config": digest(self.adapted(row.config, row.scale).to_dict()),
            "checkpoint": fingerprint(row.checkpoint),
        }

    def runner(self, row: Row) -> Runner:
        cfg = self.adapted(row.config, row.scale)
        cfg.update(load_from=str(row.checkpoint), work_dir=str(self.work_dir / "tests"))
        return build(cfg)

    def loaded(self, row: Row) -> Runner:
        """A runner whose model has its weights and is ready for ``test_step``."""
        runner = self.runner(row)
        runner.load_or_resume()
        runner.model.eval()
        return runner


def train(cfg: Config, folder: Path, title: str) -> Path:
    """The last checkpoint of a training in this folder, which is begun, continued, or found to be finished."""
    with quiet():
        latest = find_latest_checkpoint(str(folder))
    latest = folder / Path(latest).name if latest else None
    last = folder / f"iter_{cfg.train_cfg.max_iters}.pth"
    if latest == last and last.is_file():
        console.print(f"[green]kept[/]  {title}", highlight=False)
        return last
    cfg.work_dir = str(folder)
    if latest and latest.is_file():
        cfg.update(resume=True, load_from=str(latest))
        title += f", continued after {latest.stem.removeprefix('iter_')}"
    with announced(title), quiet(), Bar("iterations") as bar:
        runner = build(cfg)
        runner.register_hook(bar)
        runner.train()
    return last


def training_log(checkpoint: Path) -> list[dict]:
    """What the run that made a checkpoint logged, by iteration; what was done twice, as it was the last time."""
    logs = sorted(checkpoint.parent.glob("*/vis_data/scalars.json"))
    lines = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    lines = {line["iter"]: line for line in lines if "loss" in line}
    return [lines[iteration] for iteration in sorted(lines)]


def minutes_trained(checkpoint: Path) -> float:
    """Time spent in training iterations, by the run's own log."""
    interval = Config.fromfile(next(checkpoint.parent.glob("*.py"))).default_hooks.logger.interval
    return sum(line["time"] for line in training_log(checkpoint)) * interval / 60


def calibrate(cfg: Config, removed: float) -> dict:
    """Thresholds that remove this share of the validation images' content tokens; their annotations are not used.

    The thresholds of larger patches keep about the proportion to the smallest's that they have in the configuration.
    """
    init_default_scope(cfg.default_scope)
    with quiet():
        dataset, backbone = DATASETS.build(cfg.test_dataloader.dataset), cfg.model.backbone
    sizes, ratios = tuple(backbone.thresholds), ratios_of(backbone.thresholds)
    score_maps = [score_maps_of(image, sizes, scorer_of(cfg)) for image in tested_images(dataset)]
    thresholds = calibrate_thresholds(score_maps, backbone.patch_size, 1 - removed, ratios)
    return {"thresholds": thresholds, "shares": kept_shares(score_maps, thresholds, backbone.patch_size).tolist()}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--dense", type=Path, metavar="FILE", help="weights of a dense model, instead of training one")
    parser.add_argument("--removed", type=float, default=0.27, help="share of content tokens to remove (%(default)s)")
    parser.add_argument(
        "--work-dir", type=Path, default=Path("work_dirs"), help="for checkpoints, in a folder per task (%(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="for the tables (%(default)s)")
    add_settings_argument(parser)
    args = parser.parse_args()
    check_shares([args.removed], "--removed")
    experiment = Experiment(args.task, args.dense, args.removed, args.work_dir / args.task, args.cfg_options)
    command = shlex.join(["examples/photoshapes_results.py", *sys.argv[1:]])
    print(write_report(args.out / f"photoshapes_{args.task}.json", experiment.report(command)))


if __name__ == "__main__":
    run(main)
