#!/usr/bin/env python
"""Write the results tables of the READMEs from docs/results/*.json and docs/benchmarks/*.json.

examples:
  python benchmarks/update_tables.py          # after new results
  python benchmarks/update_tables.py --check  # tells whether the tables are up to date, and changes nothing

A table stands between the lines <!-- table: NAME --> and <!-- end of table -->. Names: summary, det, seg, vqa, speeds,
and bench:FILE for a table of docs/benchmarks/FILE.json.
"""

import json
import re
import sys
from pathlib import Path

from tools.cli import parser_of, run

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "det_configs/README.md", "seg_configs/README.md", "llava_apt/README.md")
MARKED = re.compile(r"(<!-- table: (\S+) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)
TUNED = "APT after the short fine-tune"

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
    ("EVA-02-B + UperNet, 512 px", "whole_seg_b_512", "whole model", (None, "apt 0.7 (plain head)", None)),
    (
        "the same with our equal, cheaper head",
        "whole_seg_b_512",
        "whole model",
        ("dense (cheap head)", "apt 0.7 (cheap head)", None),
    ),
    ("LLaVA of a small size, first token", "llava_small", "first token", ("packed", "apt 0.7", None)),
    (
        "EVA-02-B, 512 px, step of the short against the full fine-tune",
        "training_b_512",
        "training step",
        (None, "apt 0.7", None),
    ),
)


def results(task: str) -> dict:
    return json.loads((ROOT / f"docs/results/photoshapes_{task}.json").read_text())


def benchmark(name: str) -> dict:
    return json.loads((ROOT / f"docs/benchmarks/{name}.json").read_text())


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose columns are to the right, but for the first."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def summary() -> str:
    """One row per task: accuracy of every method, and what APT keeps and gains."""
    rows = []
    for title, task, metric in (
        ("detection, Cascade Mask R-CNN", "det", "box mAP"),
        ("segmentation, UperNet", "seg", "mIoU"),
    ):
        of = {row["title"]: row for row in results(task)["rows"]}
        accuracies = [of[name]["metrics"][metric] for name in ("dense", "random", "resizing", TUNED)]
        speed = of[TUNED]["images_per_second"] / of["dense"]["images_per_second"]
        numbers = [f"{accuracy:.1f}" for accuracy in accuracies]
        rows.append([title, metric, *numbers, f"{of[TUNED]['content_kept']:.1%}", f"{speed:.2f}x"])
    of = results("vqa")["variants"]
    numbers = [f"{of[name]['accuracy']['']:.1f}" for name in ("dense", "random", "resizing", "APT")]
    kept = of["APT"]["content_tokens"] / of["dense"]["content_tokens"]
    rows.append(["LLaVA, questions", "accuracy", *numbers, f"{kept:.1%}", f"{vqa_speed('APT'):.2f}x"])
    head = ["task", "metric", "dense", "random", "resizing", "APT", "content tokens kept", "speed of the whole model"]
    return table(head, rows)


def methods(task: str) -> str:
    """One row per method of detection or segmentation, with what it takes to repeat it."""
    measured = results(task)
    metrics = list(measured["rows"][0]["metrics"])
    dense = measured["rows"][0]["images_per_second"]
    rows = []
    for row in measured["rows"]:
        padding = "none" if row["padding_kept"] is None else f"{row['padding_kept']:.1%}"
        numbers = [f"{row['metrics'][name]:.1f}" for name in metrics]
        speeds = [f"{row['images_per_second']:.2f}", f"{row['images_per_second'] / dense:.2f}x"]
        config = f"[{Path(row['config']).stem}]({Path(row['config']).name})"
        rows.append([row["title"], config, *numbers, f"{row['content_kept']:.1%}", padding, *speeds])
    head = ["method", "config", *metrics, "content tokens", "padding tokens", "img/s", "to dense"]
    thresholds = ", ".join(f"{size} px: {threshold:g}" for size, threshold in measured["thresholds"].items())
    return (
        f"{table(head, rows)}\nHardware: {measured['hardware']}. Thresholds ({measured['scorer']}): {thresholds}. "
        f"Checkpoints: {source_of(measured)}; `python {measured['command']}`.\n"
    )


def source_of(measured: dict) -> str:
    """Where the weights behind a table come from."""
    minutes = measured["minutes_dense"]
    trained = "shipped" if minutes is None else f"trained from scratch in {minutes:.0f} minutes"
    return f"dense {trained}, adaptive short-fine-tuned from it in {measured['minutes_short_finetune']:.1f} minutes"


def vqa() -> str:
    """One row per variant of the small LLaVA."""
    measured = results("vqa")
    kinds = list(measured["majority"])
    rows = [["most frequent answer", *(f"{measured['majority'][kind]:.1f}" for kind in kinds), "", "", "", ""]]
    for name, variant in measured["variants"].items():
        accuracies = [f"{variant['accuracy'][kind]:.1f}" for kind in kinds]
        tokens = [f"{variant['tokens']:.1f}", f"{variant['content_tokens']:.1f}"]
        speed = sorted(variant["samples_per_second"])[len(variant["samples_per_second"]) // 2]
        rows.append([name, *accuracies, *tokens, f"{speed:.1f}", f"{vqa_speed(name):.2f}x"])
    head = ["", *(kind or "all" for kind in kinds), "tokens", "without padding", "samples/s", "to dense"]
    setup = measured["setup"]
    return (
        f"{table(head, rows)}\nAccuracies in percent, image tokens per image. Hardware: {setup['machine']}. "
        f"Thresholds: {setup['thresholds']} (pixels=bits). Checkpoints: trained by the commands above; "
        f"`{setup['command']}`.\n"
    )


def vqa_speed(name: str) -> float:
    """Speed relative to dense: the median of the rounds, each of which ran both."""
    of = results("vqa")["variants"]
    ratios = sorted(a / b for a, b in zip(of[name]["samples_per_second"], of["dense"]["samples_per_second"]))
    return ratios[len(ratios) // 2]


def bench(name: str) -> str:
    """One row per mode of the first model of a benchmark; ratios are medians (range) over pairs of runs in turn."""
    measured, rows = benchmark(name), []
    for row in measured["results"][0]["rows"]:
        others = (row.get(f"speed_vs_{other}") for other in ("dense", "dense-rect"))
        versus = ["{median:.2f}x ({min:.2f}-{max:.2f})".format(**other) if other else "" for other in others]
        rows.append([row["mode"], f"{row['content_kept']:.1%}", f"{row['images_per_second']:.3f}", *versus])
    head = ["mode", "content tokens kept", "img/s", "vs dense, square", "vs dense, rectangle"]
    return f"{table(head, rows)}\nHardware: {measured['hardware']}.\n"


def speeds() -> str:
    """One row per model: medians of its speed relative to the ordinary dense model, which has mmseg's own head."""
    rows = []
    for label, file, timed, modes in SPEEDS:
        measured = benchmark(f"cpu/{file}")
        (of,) = (result["rows"] for result in measured["results"] if result["title"].endswith(f", {timed}"))
        by_mode, dense = {row["mode"]: row for row in of}, of[0]["mode"]
        rows.append(
            [label, *(f"{by_mode[mode][f'speed_vs_{dense}']['median']:.2f}x" if mode else "" for mode in modes)]
        )
    return f"{table(['', 'nothing merged', '70 % of the tokens', '50 %'], rows)}\nHardware: {measured['hardware']}.\n"


def text_of(name: str) -> str:
    """What stands between a table's markers."""
    if name.startswith("bench:"):
        return bench(name.removeprefix("bench:"))
    tables = {
        "summary": summary,
        "vqa": vqa,
        "speeds": speeds,
        "det": lambda: methods("det"),
        "seg": lambda: methods("seg"),
    }
    if name not in tables:
        raise ValueError(f"no table is called {name!r}; there are {', '.join(tables)} and bench:FILE")
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
