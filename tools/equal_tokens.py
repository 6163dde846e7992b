#!/usr/bin/env python
"""Is merging better than simply a smaller image? By your model, on your test set, at equal tokens and at equal time.

examples:
  python tools/equal_tokens.py seg_configs/eva02_l_apt_512.py work_dirs/seg/eva02_l_apt_512/iter_4000.pth
  python tools/equal_tokens.py seg_configs/eva02_l_learned_512.py checkpoints/eva02_l_seg_512.pth \\
      --scorer checkpoints/scorer.safetensors entropy random --keep 0.5 0.7 0.9 --scales 1 1.25
  python tools/equal_tokens.py det_configs/eva02_tiny_apt_photoshapes.py \\
      det_configs/checkpoints/eva02_tiny_apt_photoshapes.safetensors

Tests an adaptive configuration without merging, on images of its own size and of smaller ones, and with merging at
thresholds that keep shares of the tokens (found on the test's images; its labels are not used). Writes a table, a chart
and a JSON file, which tools/compare.py reads, too. In parentheses is what a method gains over a smaller image of as
many tokens of the content, and of IoU, accuracy and COCO's average precision the standard deviation of that over
samples of the images; between the sizes that are tested the curve is a straight line. Ten images are timed that, in
every line, keep as many tokens as all do. --scales merges larger images, too, if your model reads them well. The same
weights see all sizes; if you have others that were trained on smaller images, --smaller compares with those, and
--merged gives merging those that were trained with it.
Finished tests are kept in the work directory: the same command resumes.
"""

import argparse
import json
import math
import shlex
import statistics
import sys
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from mmengine.runner import Runner

from tools.cli import check_shares, parser_of
from apt_backbones.calibrate import calibrate_thresholds, score_maps_of
from apt_backbones.files import write_atomically
from apt_backbones.scores import SCORERS, check_scorer
from apt_backbones.selection import undo_normalization
from apt_backbones.trunk import AdaptiveTrunk, find_trunk
from tools.compare import metrics_of
from tools.drawing import chart
from tools.machine import hardware
from tools.mm_config import add_settings_argument, check_data, is_classifier, load_config
from tools.mm_runs import (
    TIMED_IMAGES,
    TIMED_ROUNDS,
    Bar,
    build,
    data_key,
    quiet,
    ratios_of,
    rescaled,
    rgb_of,
    scorer_of,
    side_of,
    sides_of,
    test_with_samples,
    tested_images,
    time_interleaved,
    trunk_of,
)
from tools.results import markdown
from tools.steps import Steps, digest, fingerprint, run, scorer_key

KEEP = (0.5, 0.6, 0.7, 0.8, 0.9)
BELOW = 0.85  # of the smallest budget: the smallest image, so that no method is beyond the curve
CALIBRATED_ON = 200  # images
MEASURED = 20  # images whose sizes count
DRAWS = 50  # samples of the images


class Row(NamedTuple):
    """What is tested.

    Attributes:
        scale: of the images' sides, relative to the configuration's.
        scorer: by which patches are merged; "random": dropped at random, as many as the configuration's scorer would
            merge; None: neither.
        keep: share of the tokens that thresholds are calibrated for.
    """

    scale: float
    scorer: str | None = None
    keep: float = 1.0

    @property
    def method(self) -> str:
        """What it has in common with other budgets, and dense images with those of other sizes."""
        if self.scorer is None:
            return "dense"
        return ("random" if self.scorer == "random" else f"merging, {Path(self.scorer).stem}") + size_of(self.scale)

    @property
    def title(self) -> str:
        return f"dense{size_of(self.scale)}" if self.scorer is None else f"{self.method}, {100 * self.keep:g}%"


def size_of(scale: float) -> str:
    """What titles add for a scale."""
    return "" if scale == 1 else f", images of {100 * scale:.3g}%"


class Comparison:
    """The tests; each is done when it is needed.

    Args:
        args: the flags of this tool.

    Raises:
        FileNotFoundError, ValueError: no configuration of an adaptive model, no data, no such scorer.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.cfg = args, load_config(args)
        check_data(self.cfg, ["test_dataloader"])
        for weights in filter(None, (args.checkpoint, args.smaller, args.merged)):
            if not Path(weights).is_file():
                raise FileNotFoundError(f"no checkpoint at {weights}")
        if "module" in self.cfg.model:
            raise ValueError(f"{args.config} tests at several scales; name the configuration of one scale")
        if not trunk_of(self.cfg).get("thresholds"):
            raise ValueError(f"{args.config} has no thresholds: its model is dense; name an adaptive configuration")
        check_shares(args.keep)
        if min(args.scales) <= 0:
            raise ValueError("--scales takes positive numbers, such as 1 1.25")
        self.work_dir = Path(args.work_dir or Path("work_dirs", "equal_tokens", Path(args.config).stem))
        new_layers = trunk_of(self.cfg).get("new_layers") or ""
        files = {name: fingerprint(name) for name in (args.checkpoint, new_layers) if Path(name).is_file()}
        tested = {**self.cfg.to_dict(), "work_dir": None}  # a folder that is moved keeps what is finished
        self.cfg.update(work_dir=str(self.work_dir / "tests"), load_from=None, resume=False)
        self._runners: dict[tuple[float, str], Runner] = {}
        self._calibrated: dict[tuple[float, str], dict[float, dict[int, float]]] = {}
        self.thresholds = dict(self.trunk.thresholds)
        data = data_key(self.whole.test_dataloader.dataset)
        self.steps = Steps(self.work_dir / "steps", {"config": digest(tested), "files": files, "data": data})
        self.scorers = list(dict.fromkeys(args.scorer or [scorer_of(self.cfg)]))
        for scorer in self.scorers:
            if scorer != "random":
                check_scorer(scorer, tuple(self.thresholds))
        if len({Row(1.0, scorer).method for scorer in self.scorers}) < len(self.scorers):
            raise ValueError("--scorer: files of the same name cannot be told apart in a table; rename one")

    # ------------------------------------------------------------------------------------------- models

    def weights_of(self, row: Row) -> str:
        if row.scorer and self.args.merged:
            return self.args.merged
        return self.args.smaller if row.scale < 1 and self.args.smaller else self.args.checkpoint

    def runner(self, row: Row) -> Runner:
        """Tests images of a row's scale with its weights; runners of the same weights share them."""
        scale, weights = row.scale, self.weights_of(row)
        if (scale, weights) not in self._runners:
            with quiet():
                runner = build(self.cfg if scale == 1 else rescaled(self.cfg, scale, self.trunk.patch_size))
                other = next((found for (_, theirs), found in self._runners.items() if theirs == weights), None)
                if other is None:
                    runner.load_checkpoint(weights)
                else:
                    runner.model.load_state_dict(other.model.state_dict(), assign=True)
            runner.model.eval().requires_grad_(False)
            self._runners[scale, weights] = runner
        return self._runners[scale, weights]

    @cached_property
    def whole(self) -> Runner:
        """Tests whole images without merging."""
        return self.runner(Row(1.0))

    @property
    def trunk(self) -> AdaptiveTrunk:
        return find_trunk(self.whole.model)

    def set_up(self, row: Row) -> Runner:
        """The runner of a row, whose model merges as the row says."""
        runner = self.runner(row)
        trunk = find_trunk(runner.model)
        trunk.thresholds = self.calibrated(row.scale, row.scorer)[row.keep] if row.scorer else {}
        trunk.scorer = self.scored_by(row.scorer)
        trunk.merge = "random" if row.scorer == "random" else trunk_of(self.cfg).get("merge", "apt")
        return runner

    def scored_by(self, scorer: str | None) -> str:
        """The scorer of a row: the configuration's where the row has none of its own."""
        return scorer_of(self.cfg) if scorer in (None, "random") else scorer

    # ------------------------------------------------------------------------------------------- steps

    @cached_property
    def rows(self) -> list[Row]:
        budgets = sorted({*self.args.keep}, reverse=True)
        merging = [Row(scale, scorer, keep) for scale in self.merged for scorer in self.scorers for keep in budgets]
        shares = [scale**2 * keep for scale in self.merged for keep in budgets]
        return [*map(Row, self.scales([*shares, BELOW * min(shares)])), *merging]

    @cached_property
    def merged(self) -> list[float]:
        """Scales of images that are merged, in whole patches."""
        side, patch_size = self.side, self.trunk.patch_size
        numbers = [max(1, round(scale * (side // patch_size))) for scale in self.args.scales]
        return sorted({scale_of(number, side, patch_size, self.slides) for number in numbers})

    def scales(self, shares: Sequence[float]) -> list[float]:
        """1, those of merged images, and scales at which images have about these shares of the tokens: of the nearest
        size and its neighbours, for the last share only smaller ones, that at which some of the images fill whole
        patches best. At others their edges would be padded more than those of the whole images. (Smaller crops are
        whole patches.)
        """
        cells, patch_size = self.side // self.trunk.patch_size, self.trunk.patch_size
        images = [] if self.slides else tested_images(self.whole.test_dataloader.dataset, MEASURED)
        sides = [side for image in images for side in image.shape[2:]]

        def padding(number: int) -> float:
            pixels = [round(side * number / cells) for side in sides]
            return sum(-side % patch_size / side for side in pixels)

        *others, last = (round(cells * math.sqrt(share)) for share in shares)
        # Near the whole image smaller ones only, which are not itself.
        others = [cells - 2 if cells - 2 < near <= cells else near for near in others]
        tried = [*((near, near - 1, near + 1) for near in others), (last, last - 1, last - 2)]
        best = [min(numbers, key=padding) for numbers in tried]
        found = {scale_of(number, self.side, patch_size, self.slides) for number in best} | {*self.merged}
        return [1.0, *(scale for scale in sorted(found, reverse=True) if scale > 0 and scale != 1)]

    @property
    def slides(self) -> bool:
        return "crop_size" in (self.cfg.model.get("test_cfg") or {})

    @property
    def side(self) -> int:
        """That the model sees of an image, or of a crop where it slides."""
        if is_classifier(self.cfg):
            return side_of(self.cfg.test_dataloader.dataset)
        sizes = [sides_of(step.scale) for step in self.cfg.test_dataloader.dataset.pipeline if "scale" in step]
        if self.slides:
            sizes.append(self.cfg.model.test_cfg.crop_size)
        if not sizes:
            raise ValueError(f"{self.args.config} resizes no test images, so that none can be smaller; add a Resize")
        return min(map(min, sizes))

    def calibrated(self, scale: float, scorer: str) -> dict[float, dict[int, float]]:
        """Thresholds of every budget, for the scorer of a row."""
        scorer = self.scored_by(scorer)
        if (scale, scorer) not in self._calibrated:
            inputs = {"scorer": scorer_key(scorer), "keep": self.args.keep}
            title = f"thresholds of {Path(scorer).stem}{size_of(scale)}"
            found = self.steps.run(_name(title), title, inputs, lambda: self._calibrate(scale, scorer))
            by_size = {keep: {int(size): value for size, value in of.items()} for keep, of in found.items()}
            self._calibrated[scale, scorer] = {float(keep): thresholds for keep, thresholds in by_size.items()}
        return self._calibrated[scale, scorer]

    def _calibrate(self, scale: float, scorer: str) -> dict[float, dict[int, float]]:
        trunk, pixels_of = self.trunk, rgb_of
        if is_classifier(self.cfg):
            pixels_of = partial(undo_normalization, mean=trunk.pixel_mean, std=trunk.pixel_std)
        dataset, sizes = self.runner(Row(scale)).test_dataloader.dataset, tuple(self.thresholds)
        maps = [score_maps_of(image, sizes, scorer) for image in tested_images(dataset, CALIBRATED_ON, pixels_of)]
        ratios = ratios_of(self.thresholds) if scorer == scorer_of(self.cfg) else [1.0] * len(sizes)
        return {keep: calibrate_thresholds(maps, trunk.patch_size, keep, ratios) for keep in self.args.keep}

    def evaluate(self, row: Row) -> dict:
        """``metrics`` of a row, its tokens among them, and those of ``samples`` of the images."""

        def test() -> dict:
            runner = self.set_up(row)
            with quiet(), Bar("batches") as bar:
                runner.register_hook(bar)
                metrics, samples = test_with_samples(runner, DRAWS)
                runner.hooks.remove(bar)
            return {"metrics": metrics, "samples": samples}

        thresholds = self.calibrated(row.scale, row.scorer)[row.keep] if row.scorer else None
        inputs = {"thresholds": thresholds, "scale": row.scale}
        if row.scorer:
            inputs["scorer"] = scorer_key(self.scored_by(row.scorer))
        if self.weights_of(row) != self.args.checkpoint:
            inputs["weights"] = fingerprint(self.weights_of(row))
        return self.steps.run(_name(row.title), f"test: {row.title}", inputs, test)

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Per image of every row."""
        rows = {row.title: row for row in self.rows}

        def measure() -> dict[str, float]:
            runners = {title: self.runner(row) for title, row in rows.items()}
            with quiet():
                return time_interleaved(runners, lambda title: self.set_up(rows[title]))

        thresholds = {f"{s}{size_of(scale)}": self.calibrated(scale, s) for scale in self.merged for s in self.scorers}
        inputs = {"hardware": hardware(), "rows": rows, "thresholds": thresholds}
        inputs |= {"images": TIMED_IMAGES, "rounds": TIMED_ROUNDS}
        return self.steps.run("speed", "speed: images through all of them, interleaved", inputs, measure)

    def report(self, command: str) -> dict:
        for row in {self.weights_of(row): row for row in self.rows}.values():
            self.runner(row)  # weights that do not fit are refused before anything is tested
        tested = {row: self.evaluate(row) for row in self.rows}
        lines, samples = [], []
        for row, found in tested.items():
            metrics = found["metrics"]
            if "tokens" not in metrics:  # a classifier that merges nothing is timm's own network
                metrics |= {"tokens": round(row.scale * self.side / self.trunk.patch_size) ** 2, "content_kept": 1.0}
            of_scale, whole = (tested[Row(scale)]["metrics"]["tokens"] for scale in (row.scale, 1.0))
            kept = metrics["content_kept"] * of_scale / whole
            line = {**row._asdict(), "title": row.title, "method": row.method, "metrics": metrics_of(metrics)}
            line |= {"tokens": metrics["tokens"], "content_kept": kept, "seconds": self.seconds[row.title]}
            lines.append(line | {"per_second": 1 / line["seconds"]})
            samples.append([metrics_of(sample) for sample in found["samples"]])
        titles = max((line["metrics"] for line in lines), key=len)
        if not titles:
            raise ValueError("nothing was found in any image by any line; lower the score_thr of model.test_cfg")
        for number, line in enumerate(lines):
            if not line["metrics"]:  # mmdet has none where no boxes were found
                line["metrics"] = dict.fromkeys(titles, 0.0)
                samples[number] = [line["metrics"]] * DRAWS
        for number, line in enumerate(lines):
            if line["method"] != "dense":
                line["gains"] = {title: gains_of(number, title, lines, samples) for title in line["metrics"]}
        about = {"command": command, "config": self.args.config, "checkpoint": str(self.args.checkpoint)}
        about["checkpoint_of_smaller_images"] = str(self.args.smaller or self.args.checkpoint)
        about["checkpoint_of_merging"] = str(self.args.merged or self.args.checkpoint)
        return {**about, "hardware": hardware(), "torch": torch.__version__, "rows": lines}


def scale_of(number: int, side: int, patch_size: int, is_crop: bool) -> float:
    """At which a side has so many patches; a crop exactly, or it would be padded. (1 for as many as the side holds.)"""
    cells = side // patch_size
    return number * patch_size / side if is_crop and number != cells else number / cells


def gains_of(number: int, title: str, lines: Sequence[dict], samples: Sequence[Sequence[dict]]) -> dict:
    """What a line's metric is over dense images of as many ``tokens`` and as much ``time``; None where no image is as
    small. ``error`` is the standard deviation of the first over samples of the images; None without samples."""
    line, dense = lines[number], [index for index, line in enumerate(lines) if line["method"] == "dense"]

    def gain(cost: str, metrics: Sequence[dict]) -> float | None:
        value, *smaller = (of_line[title] for of_line in metrics)
        return over([(lines[index][cost], of_size) for index, of_size in zip(dense, smaller)], line[cost], value)

    measured = [lines[index]["metrics"] for index in (number, *dense)]
    gains = {"tokens": gain("content_kept", measured), "time": gain("seconds", measured), "error": None}
    # A sample may lack what a metric is of, such as small objects.
    drawn = zip(*(samples[index] for index in (number, *dense)))
    complete = [metrics for metrics in drawn if all(title in of_line for of_line in metrics)]
    if gains["tokens"] is not None and len(complete) > 1:
        gains["error"] = statistics.stdev(gain("content_kept", metrics) for metrics in complete)
    return gains


def over(curve: Sequence[tuple[float, float]], cost: float, value: float) -> float | None:
    """A value over that of a curve of (cost, value) at the same cost: at a higher cost than the curve's, over its last
    value, the largest image's; None at a lower one."""
    at = np.interp(cost, *zip(*sorted(curve)), left=np.nan)
    return None if np.isnan(at) else float(value - at)


def _name(title: str) -> str:
    """Of a file."""
    return "".join(letter if letter.isalnum() else "_" for letter in title)


# ------------------------------------------------------------------------------------------- showing


def table_of(report: dict) -> str:
    """In Markdown; in parentheses what a method gains."""
    lines = report["rows"]
    first, *_ = lines[0]["metrics"]
    cells = {"method": [line["title"] for line in lines]}
    cells["content tokens kept"] = [f"{line['content_kept']:.1%}" for line in lines]
    for title in lines[0]["metrics"]:
        cells[title] = [f"{line['metrics'][title]:.2f}{gain_of(line, title, 'tokens')}" for line in lines]
    cells["images/s"] = [f"{line['per_second']:.2f}" for line in lines]
    cells[f"{first} gain at equal time"] = [gain_of(line, first, "time").strip(" ()") for line in lines]
    return markdown(cells)


def gain_of(line: dict, metric: str, cost: str) -> str:
    gains = line.get("gains", {}).get(metric, {})
    if gains.get(cost) is None:
        return ""
    error = gains["error"] if cost == "tokens" else None
    return f" ({gains[cost]:+.2f})" if error is None else f" ({gains[cost]:+.2f} ± {error:.2f})"


def said_of(report: dict) -> list[str]:
    """A sentence per method: what it gains on the first metric."""
    first, *_ = report["rows"][0]["metrics"]
    gains: dict[str, list[dict]] = {}
    for line in report["rows"]:
        if "gains" in line:
            gains.setdefault(line["method"], []).append(line["gains"][first])
    sentences = []
    for method, found in gains.items():
        ranges = []
        for cost, words in (("tokens", "as many tokens"), ("time", "as much time")):
            values = [gain[cost] for gain in found if gain[cost] is not None]
            ranges += [f"{min(values):+.2f} to {max(values):+.2f} of {words}"] if values else []
        sentences.append(f"{method}: {first} over a smaller image {', '.join(ranges) or 'unknown: beyond its sizes'}")
    return sentences


def draw(path: Path, report: dict) -> None:
    """The first metric against tokens and against time."""
    first, *_ = report["rows"][0]["metrics"]
    methods: dict[str, list[dict]] = {}
    for line in report["rows"]:
        methods.setdefault(line["method"], []).append(line)
    merged = [line for line in report["rows"] if line["scorer"]]
    scorers, scales = (list(dict.fromkeys(line[name] for line in merged)) for name in ("scorer", "scale"))
    legend_lines = math.ceil(len(methods) / 3)
    figure, panels = chart((11, 4.3 + 0.25 * legend_lines), 2, sharey=True)
    costs = (
        (
            "tokens of the content, percent of those of the configuration's image",
            lambda line: 100 * line["content_kept"],
        ),
        ("milliseconds per image", lambda line: 1000 * line["seconds"]),
    )
    for panel, (label, cost) in zip(panels, costs):
        for method, lines in methods.items():
            points = sorted((cost(line), line["metrics"][first]) for line in lines)
            style = dict(color="black", linestyle="--", marker="o", label="dense, other sizes")
            if method != "dense":
                color, marker = scorers.index(lines[0]["scorer"]), scales.index(lines[0]["scale"])
                style = dict(color=f"C{color}", marker="os^Dv"[marker % 5], label=method)
            panel.plot(*zip(*points), **style)
        panel.set(xlabel=label)
        panel.grid(alpha=0.3)
    panels[0].set(ylabel=first)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(Path(report["config"]).stem)
    figure.savefig(path, dpi=130)


def main(argv: list[str] | None = None) -> dict:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("config", help="configuration of an adaptive model")
    add("checkpoint", help="its weights (.pth or .safetensors)")
    add("--keep", type=float, nargs="+", default=KEEP, metavar="SHARE", help="budgets of tokens (0.5 0.6 0.7 0.8 0.9)")
    add(
        "--scorer",
        nargs="+",
        metavar="NAME|FILE",
        help=f"{', '.join(SCORERS)}, files of learned scorers, or random (default: the configuration's)",
    )
    add("--scales", type=float, nargs="+", default=[1.0], help="of images that are merged, 1: the configuration's (1)")
    add("--smaller", metavar="CHECKPOINT", help="weights for smaller images (default: the same)")
    add("--merged", metavar="CHECKPOINT", help="weights for merging (default: the same, or those for smaller images)")
    add("--work-dir", type=Path, help="for finished tests (work_dirs/equal_tokens/CONFIG)")
    add("--out", type=Path, metavar="JSON", help="the results; the chart is beside it (WORK_DIR/equal_tokens.json)")
    add_settings_argument(parser)
    args = parser.parse_args(argv)
    comparison = Comparison(args)
    report = comparison.report(shlex.join(["tools/equal_tokens.py", *(argv or sys.argv[1:])]))
    out = args.out or comparison.work_dir / "equal_tokens.json"
    write_atomically(out, json.dumps(report, indent=1) + "\n")
    draw(out.with_suffix(".png"), report)
    print(table_of(report), *said_of(report), f"written: {out}, {out.with_suffix('.png')}", sep="\n")
    return report


if __name__ == "__main__":
    run(main)
