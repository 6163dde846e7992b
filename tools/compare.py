#!/usr/bin/env python
"""Results of several runs in one table: accuracy, tokens and speed, and what they differ by from the first run.

examples:
  python tools/compare.py work_dirs/det/eva02_l_dense_1536 work_dirs/det/eva02_l_apt_1536
  python tools/compare.py work_dirs/demo/det docs/results/photoshapes_det.json --json comparison.json
  python tools/compare.py results/llava-1.5-7b results/llava-1.5-7b-apt

A run is a folder of tools/test.py, tools/train.py (then its last validation), lmms-eval (--output_path) or
examples/demo.py, or a table in JSON. Of several results in a folder the newest counts. Differences are to the first
line, or, if the first run has several methods, to its line of the same method. Speeds of different machines or days
tell little.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from tools.cli import parser_of, run
from apt_backbones.files import write_atomically
from tools.results import Result, columns, markdown, read_table

# Name in mmengine's logs -> title and factor; other metrics are shown only where none of these is.
METRICS = {
    "coco/bbox_mAP": ("box mAP", 100),
    "coco/bbox_mAP_50": ("AP50", 100),
    "coco/bbox_mAP_s": ("AP small", 100),
    "coco/segm_mAP": ("mask mAP", 100),
    "mIoU": ("mIoU", 1),
    "aAcc": ("aAcc", 1),
    "border/mIoU": ("mIoU within 3 px of borders", 1),
    "top1": ("top-1 accuracy", 1),
    "top5": ("top-5 accuracy", 1),
}
NO_METRICS = re.compile(
    r"(val/|test/)?(tokens|images_per_batch|(content|padding)_kept.*|time|data_time|step|iter|epoch|lr|base_lr|memory)"
)


# ------------------------------------------------------------------------------------------- reading


def read_run(path: Path) -> list[Result]:
    """The results of a run.

    Raises:
        FileNotFoundError: there is no such folder or file, or it holds no results.
        ValueError: a file is not a table of results.
    """
    if not path.exists():
        raise FileNotFoundError(f"no run at {path}")
    if path.is_file():
        return read_table(path, str(path))
    if tables := sorted(path.glob("photoshapes_*.json")):
        return [result for table in tables for result in read_table(table, str(path))]
    if found := newest(path.rglob("*_results.json")):
        return [read_lmms_eval(str(path), json.loads(found.read_text()))]
    if line := read_mmengine(path):
        return [of_mmengine(str(path), *line)]
    raise FileNotFoundError(
        f"no results in {path}: neither of tools/test.py, nor a validation, nor of lmms-eval, nor a photoshapes_*.json"
    )


def read_lmms_eval(name: str, content: dict) -> Result:
    """What lmms-eval wrote of all its tasks."""
    metrics = {
        f"{task} {metric.removesuffix(',none')}": value
        for task, measured in content["results"].items()
        for metric, value in measured.items()
        if isinstance(value, int | float) and "stderr" not in metric
    }
    throughput = content.get("throughput") or {}  # of what a model logs, lmms-eval writes averages
    seconds = throughput.get("avg_seconds_per_sample")
    tokens = throughput.get("avg_tokens_per_image")
    return Result(name, "", metrics, tokens, speed=1 / seconds if seconds else None)


def read_mmengine(path: Path) -> tuple[dict, Path, str] | None:
    """Metrics of the newest test, or of the last validation of a newer training, the folder of that run, and the data
    loader's name in its configuration."""
    test = newest(file for file in path.glob("*/*.json") if file.stem == file.parent.name)
    for log in sorted(path.glob("*/vis_data/scalars.json"), reverse=True):
        if test and (log.parents[1] == test.parent or newest([log, test]) == test):
            continue
        whole = [line for line in log.read_text().splitlines() if line.endswith("}")]  # a kill cuts the last
        lines = [json.loads(line) for line in whole]
        if validations := [line for line in lines if "loss" not in line and "lr" not in line]:
            return validations[-1], log.parents[1], "val_dataloader"
    return test and (json.loads(test.read_text()), test.parent, "test_dataloader")


def of_mmengine(name: str, line: dict, folder: Path, loader: str) -> Result:
    """A line of mmengine's log; its time is that of a batch, loading included."""
    images = line.get("images_per_batch") or batch_size(folder / "vis_data" / "config.py", loader)
    speed = images / line["time"] if line.get("time") else None
    kept = (line.get(key) for key in ("tokens", "content_kept", "padding_kept"))
    return Result(name, "", metrics_of(line), *kept, speed)


def metrics_of(line: dict) -> dict[str, float]:
    """Title -> value of the metrics that mmengine logged."""
    known = {title: line[key] * factor for key, (title, factor) in METRICS.items() if line.get(key, -1) >= 0}
    return known or {
        key: value for key, value in line.items() if isinstance(value, int | float) and not NO_METRICS.fullmatch(key)
    }


def batch_size(config: Path, loader: str) -> int:
    """Of a data loader; 1 if the configuration was not kept."""
    from mmengine.config import Config

    return Config.fromfile(config, import_custom_modules=False)[loader].batch_size if config.is_file() else 1


def newest(paths: Iterable[Path]) -> Path | None:
    return max(paths, key=lambda path: path.stat().st_mtime, default=None)


# ------------------------------------------------------------------------------------------- comparing


def compare(runs: list[list[Result]]) -> list[Result]:
    """All lines, each with what it differs by from its reference: the same method of the first run, or that run's first
    line; a run of another task, whose metrics are others, is compared to its own first line."""
    methods = {result.method: result for result in runs[0]}
    references = [(result, runs[0][0]) for result in runs[0][1:]]
    for results in runs[1:]:
        of_first_run = [(result, methods.get(result.method, runs[0][0])) for result in results]
        same_task = any(result.metrics.keys() & reference.metrics.keys() for result, reference in of_first_run)
        references += of_first_run if same_task else [(result, results[0]) for result in results[1:]]
    for result, reference in references:
        shared = result.metrics.keys() & reference.metrics.keys()
        result.differences = {title: result.metrics[title] - reference.metrics[title] for title in shared}
        if result.speed and reference.speed:
            result.relative_speed = result.speed / reference.speed
    return [result for results in runs for result in results]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="folder or JSON table; the first is compared to"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure to this file")
    args = parser.parse_args()
    results = compare([read_run(path) for path in args.runs])
    if args.json:
        write_atomically(args.json, json.dumps([asdict(result) for result in results], indent=1) + "\n")
    print(markdown(columns(results)), end="")


if __name__ == "__main__":
    run(main)
