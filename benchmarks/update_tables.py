#!/usr/bin/env python
"""Write the results tables of the READMEs from docs/results/*.json and docs/benchmarks/*.json.

examples:
  python benchmarks/update_tables.py          # after new results
  python benchmarks/update_tables.py --check  # tells whether the tables are up to date, and changes nothing

A table stands between the lines <!-- table: NAME --> and <!-- end of table -->. Names: summary, det, seg, vqa, speeds,
bench:FILE for a table of docs/benchmarks/FILE.json, and equal:FILE for one of docs/results/equal_tokens_FILE.json.
"""

import json
import re
import statistics
import sys
from pathlib import Path

from tools.cli import parser_of, run
from benchmarks.study import point_of
from examples.report import AFTER, DENSE, markdown_of
from tools.results import markdown, read_table

ROOT = Path(__file__).parents[1]
DOCUMENTS = (
    "README.md",
    "det_configs/README.md",
    "seg_configs/README.md",
    "llava_apt/README.md",
    "docs/learned_scorer.md",
)
FILLS = {"repeat": ", tokens repeated", "learned": ", learned maps", "dense": ", dense maps"}
MARKED = re.compile(r"(<!-- table: (\S+) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)

# Rows of the table of speeds: what it is, its file in docs/benchmarks/cpu, what was timed, and the modes without
# merging, at 70 % and at 50 % of the tokens.
TRUNK = ("packed", "apt 0.7", "apt 0.5")
SPEEDS = (
    ("EVA-02-B, trunk, 1536 px", "trunk_b_1536", "trunk", TRUNK),
    ("EVA-02-L, trunk, 512 px", "trunk_seg_l_512", "trunk", TRUNK),
    (
        "EVA-02-B detector, 1024 px, 4:3 padded to a square",
        "whole_det_b_1024",
        "whole model",
        ("packed", "apt 0.7", None),
    ),
    ("EVA-02-B + UperNet, 512 px", "whole_seg_b_512", "whole model", (None, "apt 0.7 (reference head)", None)),
    (
        "the same with our equal, faster head",
        "whole_seg_b_512",
        "whole model",
        ("dense (fast head)", "apt 0.7 (fast head)", None),
    ),
    ("LLaVA of a small size, first token", "llava_small", "first token", ("packed", "apt 0.7", None)),
    (
        "EVA-02-B, 512 px, step of the short against the full fine-tune",
        "training_b_512",
        "training step",
        (None, "apt 0.7", None),
    ),
)


def report(task: str) -> Path:
    return ROOT / f"docs/results/photoshapes_{task}.json"


def benchmark(name: str) -> dict:
    return json.loads((ROOT / f"docs/benchmarks/{name}.json").read_text())


def table(head: list[str], rows: list[list[str]]) -> str:
    return markdown(dict(zip(head, zip(*rows))))


def summary() -> str:
    """One row per task: accuracy of every method, and what APT keeps and gains."""
    rows = []
    for title, task, metric in (
        ("detection, Cascade Mask R-CNN", "det", "box mAP"),
        ("segmentation, UperNet", "seg", "mIoU"),
        ("LLaVA, questions", "vqa", "accuracy"),
    ):
        of = {result.method: result for result in read_table(report(task))}
        numbers = [f"{of[name].metrics[metric]:.1f}" for name in (DENSE, "random", "resizing", AFTER)]
        rows.append([title, metric, *numbers, f"{of[AFTER].content_kept:.1%}", f"{of[AFTER].relative_speed:.2f}x"])
    head = ["task", "metric", "dense", "random", "resizing", "APT", "content tokens kept", "speed of the whole model"]
    return table(head, rows)


def bench(name: str) -> str:
    """One row per mode of the first model of a benchmark; ratios are medians (range) over pairs of interleaved runs."""
    measured, rows = benchmark(name), []
    for row in measured["results"][0]["rows"]:
        others = (row.get(f"speed_vs_{other}") for other in ("dense", "dense-rect"))
        versus = ["{median:.2f}x ({min:.2f}-{max:.2f})".format(**other) if other else "" for other in others]
        rows.append([row["mode"], f"{row['content_kept']:.1%}", f"{row['images_per_second']:.3f}", *versus])
    head = ["mode", "content tokens kept", "img/s", "vs dense, square", "vs dense, rectangle"]
    return f"{table(head, rows)}\nHardware: {measured['hardware']}.\n"


def speeds() -> str:
    """One row per model: medians of its speed relative to the reference dense model, which has mmseg's own head."""
    rows = []
    for label, file, timed, modes in SPEEDS:
        measured = benchmark(f"cpu/{file}")
        (of,) = (result["rows"] for result in measured["results"] if result["title"].endswith(f", {timed}"))
        by_mode, dense = {row["mode"]: row for row in of}, of[0]["mode"]
        rows.append(
            [label, *(f"{by_mode[mode][f'speed_vs_{dense}']['median']:.2f}x" if mode else "" for mode in modes)]
        )
    return f"{table(['', 'nothing merged', '70 % of the tokens', '50 %'], rows)}\nHardware: {measured['hardware']}.\n"


def equal_tokens(name: str) -> str:
    """One row per method and size on the test split: quality, what it gains over dense images of as many tokens that
    the same head reads, and milliseconds. Means over seeds; errors are standard deviations, over scorers of several
    seeds or, for boxes, over samples of the images."""
    measured = json.loads((ROOT / f"docs/results/equal_tokens_{name}.json").read_text())
    metrics = ("mAP", "small", "large", "person") if name == "coco" else ("mIoU",)
    head = measured.get("kept_head")
    tested = [line for line in measured["results"] if line["split"] == "test" and line.get("head") == head]
    gained = {point_of(line): line for line in measured["gains"]}
    rows = []
    for point in dict.fromkeys(map(point_of, tested)):
        method, scorer, fill, image, _ = point
        lines = [line for line in tested if point_of(line) == point]
        label = {"apt": f"merging, {scorer}{FILLS.get(fill, '')}", "tome": "ToMe"}.get(method, method)
        row = [label, image.replace("x", " x "), f"{statistics.mean(line['tokens'] for line in lines):.0f}"]
        for metric in metrics:
            row.append(f"{statistics.mean(line[metric] for line in lines):.2f}")
            gain, error = _gain(gained.get(point, {}), metric)
            if gain is not None and metric in ("mIoU", "mAP", "person"):
                row[-1] += f" ({gain:+.2f}{'' if error is None else f' ± {error:.2f}'})"
        rows.append([*row, "" if lines[0]["ms"] is None else f"{lines[0]['ms']:.0f}"])
    return table(["method", "image", "tokens", *metrics, "CPU ms"], rows)


def _gain(entry: dict, metric: str) -> tuple[float | None, float | None]:
    if metric == "mIoU":
        return entry.get("kept"), entry.get("spread")
    return entry.get(metric, [None, None])[1], (entry.get("errors") or {}).get(metric)


def text_of(name: str) -> str:
    """What stands between a table's markers."""
    if name.startswith("bench:"):
        return bench(name.removeprefix("bench:"))
    if name.startswith("equal:"):
        return equal_tokens(name.removeprefix("equal:"))
    if name in ("det", "seg", "vqa"):
        return markdown_of(report(name))
    tables = {"summary": summary, "speeds": speeds}
    if name not in tables:
        raise ValueError(
            f"no table is called {name!r}; there are {', '.join(tables)}, det, seg, vqa, bench:FILE and equal:FILE"
        )
    return tables[name]()


def updated(text: str) -> str:
    """A document with its tables made anew."""
    return MARKED.sub(lambda match: match[1] + "\n" + text_of(match[2]) + "\n" + match[4], text)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--check", action="store_true", help="exit with an error if a table is not up to date")
    args = parser.parse_args()
    stale = [name for name in DOCUMENTS if updated((ROOT / name).read_text()) != (ROOT / name).read_text()]
    if args.check:
        sys.exit(f"error: tables of {', '.join(stale)} are not up to date: run make tables" if stale else 0)
    for name in stale:
        (ROOT / name).write_text(updated((ROOT / name).read_text()))
        print(f"{name} updated")


if __name__ == "__main__":
    run(main)
