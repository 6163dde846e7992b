#!/usr/bin/env python
"""Write the results tables of the READMEs from docs/results/*.json and docs/benchmarks/*.json.

examples:
  python benchmarks/update_tables.py          # after new results
  python benchmarks/update_tables.py --check  # tells whether the tables are up to date, and changes nothing

A table stands between the lines <!-- table: NAME --> and <!-- end of table -->. Names: headline, summary, expected,
speeds, photoshapes:TASK, budgets:FILE, bench:FILE for a table of docs/benchmarks/FILE.json, and equal:FILE (for
classification classes:FILE) for one of docs/results/equal_tokens_FILE.json.
"""

import json
import math
import re
import statistics
import sys
from pathlib import Path

import numpy as np

from tools.cli import parser_of, run
from benchmarks.study import PATCH, point_of
from examples.report import AFTER, DENSE, SMALLER_DENSE, markdown_of
from tools.equal_tokens import table_of
from tools.results import markdown, read_table

ROOT = Path(__file__).parents[1]
DOCUMENTS = (
    "README.md",
    "det_configs/README.md",
    "seg_configs/README.md",
    "llava_apt/README.md",
    "cls_configs/README.md",
    "docs/equal_tokens.md",
)
METRICS = ("mIoU", "mAP", "person", "any class", "any class, small")
FILLS = {"repeat": "network's maps", "interpolate": "interpolated", "learned": "learned", "dense": "dense maps"}
MARKED = re.compile(r"(<!-- table: (\S+) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)

# Rows of the first table: what it is, its file, the metric, and how maps are filled.
HEADLINES = (
    ("CamVid, linear head, mIoU", "camvid", "mIoU", "learned"),
    ("CamVid, UperNet, mIoU", "camvid_upernet", "mIoU", "learned"),
    ("COCO's things, linear head, mIoU", "things", "mIoU", "repeat"),
    ("COCO's persons, boxes of a weak detector, AP", "coco", "person", "interpolate"),
    ("groceries, 81 classes, linear head, accuracy", "grocery", "accuracy", "repeat"),
    ("clothing, 10 classes, linear head, accuracy", "clothing-dataset-small", "accuracy", "repeat"),
)
# Further ones, of tools/equal_tokens.py; last, the file in which a tuned network read the smaller images.
OWN_TESTS = (
    ("nuclei, linear head, mIoU", "nuclei_seg", "mIoU", "nuclei_seg_lora"),
    ("nuclei, UperNet, mIoU", "nuclei_upernet", "mIoU", None),
    ("nuclei, boxes of a small detector, mAP", "nuclei_det_seed1", "box mAP", None),
    ("text on receipts, linear head, mIoU", "receipts_seg", "mIoU", None),
    ("text on receipts, UperNet, mIoU", "receipts_upernet", "mIoU", None),
    ("blood cells, boxes of a small detector, mAP", "bccd_det", "box mAP", None),
    ("COCO's persons, boxes of a small detector, 308 pixels, mAP", "persons_308_det", "box mAP", None),
    ("the same, 448 pixels, more than suits it", "persons_det", "box mAP", None),
)
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
    """One row per task: accuracy of every method, and what APT keeps and gains. Of several smaller images the largest,
    of several rows with a learned scorer the one with trained layers."""
    rows = []
    for title, task, metric in (
        ("detection, Cascade Mask R-CNN", "det", "box mAP"),
        ("segmentation, UperNet", "seg", "mIoU"),
        ("LLaVA, questions", "vqa", "accuracy"),
    ):
        of = {result.method: result for result in read_table(report(task))}
        smaller = next((name for name in of if name.startswith(SMALLER_DENSE)), None)
        learned = next((name for name in reversed(of) if "learned scorer" in name), None)
        methods = (DENSE, smaller, "random", "resizing", AFTER, learned)
        numbers = [f"{of[name].metrics[metric]:.1f}" if name in of else "" for name in methods]
        rows.append([title, metric, *numbers, f"{of[AFTER].content_kept:.1%}", f"{of[AFTER].relative_speed:.2f}x"])
    names = ["dense", "smaller image", "random", "resizing", "APT", "learned scorer"]
    return table(["task", "metric", *names, "content tokens kept", "speed of the whole model"], rows)


def headline() -> str:
    """One row per study of pretrained weights, at the measured budget nearest to two thirds of the tokens: quality of
    the whole image and of a smaller one of as many tokens, and what else at that many gains over the latter; in bold if
    by more than two errors."""
    rows = []
    for label, file, metric, fill in HEADLINES:
        measured = json.loads((ROOT / f"docs/results/equal_tokens_{file}.json").read_text())
        results, gained = (
            [line for line in lines if line.get("pool", "cls") == "cls"]
            for lines in (measured["results"], measured.get("gains", measured["results"]))
        )
        entropy = [_gain_of(line, metric) for line in gained if line["scorer"] == "entropy"]
        image = entropy[0]["image"]
        tokens = math.prod(int(side) // PATCH for side in image.split("x"))
        learned = [
            _gain_of(line, metric)
            for line in gained
            if (line["scorer"], line["image"], line["fill"]) == ("learned", image, fill) and line.get("adapters", True)
        ]
        best = min(learned, key=lambda of: abs(of["tokens"] / tokens - 2 / 3))
        points = [(of["tokens"] / tokens, of["gain"]) for of in _filled(entropy, fill)]
        dense = [
            line
            for line in results
            if (line["method"], line["image"], line.get("split", "test")) == ("dense", image, "test")
            and line.get("head") == measured.get("kept_head")
        ]
        whole = statistics.mean(line[metric] for line in _filled(dense, fill))
        lora = "" if best["lora"] is None else f"{best['gain'] - best['lora']:+.1f}"
        smaller = best["value"] - best["gain"]
        share = best["tokens"] / tokens
        quality = [f"{whole:.1f}", f"{smaller:.1f}", lora, _between(points, share)]
        rows.append([label, f"{share:.0%}", *quality, _bold(best["gain"], best["error"])])
    rows += [_of_own_test(*of) for of in OWN_TESTS]
    return table(
        ["", "tokens", "whole image", "smaller image", "with LoRA", "merging, entropy", "merging, learned"], rows
    )


def _filled(lines: list[dict], fill: str) -> list[dict]:
    """Those whose maps are filled so or, where none are, in the best other way: where nothing merges nothing is
    learned, and not every study interpolates dense maps."""
    fills = {line["fill"] for line in lines}
    best = fill if fill in fills else max(fills, key=list(FILLS).index)
    return [line for line in lines if line["fill"] == best]


def _of_own_test(label: str, file: str, metric: str, tuned: str | None) -> list[str]:
    """A row of ``headline``."""
    dense, best, entropy = _near_two_thirds(file)
    points = [(line["content_kept"], line["gains"][metric]["tokens"]) for line in entropy]
    of, gain = best["metrics"][metric], best["gains"][metric]
    lora = ""
    if tuned:
        lora = f"{gain['tokens'] - _near_two_thirds(tuned)[1]['gains'][metric]['tokens']:+.1f}"
    smaller, entropy = of - gain["tokens"], _between(points, best["content_kept"])
    quality = [f"{dense['metrics'][metric]:.1f}", f"{smaller:.1f}", lora, entropy]
    return [label, f"{best['content_kept']:.0%}", *quality, _bold(gain["tokens"], gain["error"])]


def _between(points: list[tuple[float, float]], share: float) -> str:
    """The gain at a share of the tokens, on straight lines between those that were measured; with its own share, if the
    nearest was measured elsewhere."""
    shares, gains = zip(*sorted(points))
    nearest = min(max(share, shares[0]), shares[-1])
    return f"{np.interp(nearest, shares, gains):+.1f}" + (f" ({nearest:.0%})" if abs(share - nearest) > 0.05 else "")


def _near_two_thirds(file: str) -> tuple[dict, dict, list[dict]]:
    """Lines of a file of tools/equal_tokens.py: the whole image, merging to about two thirds of its tokens by the
    learned scorer, and merging by entropy."""
    dense, *lines = json.loads((ROOT / f"docs/results/{file}_equal_tokens.json").read_text())["rows"]
    lines = sorted((line for line in lines if line["scale"] == 1), key=lambda line: abs(line["content_kept"] - 2 / 3))
    best = next(line for line in lines if (line["scorer"] or "").endswith(".safetensors"))
    return dense, best, [line for line in lines if line["scorer"] == "entropy"]


def _bold(gain: float, error: float) -> str:
    """In bold if by more than two errors."""
    text = f"{gain:+.1f} ± {error:.1f}"
    return f"**{text}**" if gain > 2 * error else text


def _gain_of(line: dict, metric: str) -> dict:
    """What a line of a study's results says of one metric over smaller images, whatever the study calls it."""
    of = {name: line[name] for name in ("scorer", "image", "fill", "tokens")}
    if metric == "mIoU":
        return of | {"value": line["mIoU"], "gain": line["kept"], "error": line["error"], "lora": line["lora"]}
    if metric == "accuracy":
        gain, error, lora = (line[f"accuracy_over_{name}"] for name in ("dense", "dense_error", "lora"))
        return of | {"value": line[metric], "gain": gain, "error": error, "lora": lora}
    value, gain = line[metric]
    return of | {"value": value, "gain": gain, "error": line["errors"][metric], "lora": None}


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
    the same head reads, and milliseconds. Means over seeds; errors are standard deviations over samples of the images.
    For one metric, columns are the ways in which maps are filled."""
    measured = json.loads((ROOT / f"docs/results/equal_tokens_{name}.json").read_text())
    metrics = [name for name in METRICS if name in measured["results"][0]]
    points, rows = {}, {}
    for line in measured["results"]:
        if line["split"] == "test" and line.get("head") == measured.get("kept_head"):
            points.setdefault(point_of(line), []).append(line)
    gained = {point_of(line): line for line in measured["gains"]}
    fills = [fill for fill in FILLS if any(point[2] == fill for point in points)] if len(metrics) == 1 else []

    def quality(point: tuple, metric: str) -> str:
        entry = gained.get(point, {})
        if metric == "mIoU":
            gain, error = entry.get("kept"), entry.get("error")
        else:
            gain, error = entry.get(metric, [None, None])[1], (entry.get("errors") or {}).get(metric)
        return _with_gain(statistics.mean(line[metric] for line in points[point]), gain, error)

    for method, scorer, fill, image, budget in points:
        rows.setdefault((method, scorer, None if fills else fill, image, budget), []).append(fill)
    lines = []
    for (method, scorer, fill, image, budget), same in rows.items():
        of = {each: (method, scorer, each, image, budget) for each in same}
        label = {"apt": f"merging, {scorer}", "lora": "dense + LoRA", "tome": "ToMe"}.get(method, method)
        label += {"interpolate": ", interpolated maps", "learned": ", learned maps"}.get(fill, "")
        tokens = statistics.mean(line["tokens"] for line in points[of[same[0]]])
        cells = [quality(of[each], metrics[0]) if each in of else "" for each in fills]
        cells = cells or [quality(of[fill], metric) for metric in metrics]
        times = [
            f"{points[of[each]][0]['ms']:.0f}" for each in fills or same if each in of and points[of[each]][0]["ms"]
        ]
        lines.append([label, image.replace("x", " x "), f"{tokens:.0f}", *cells, " / ".join(times)])
    return table(["method", "image", "tokens", *([FILLS[fill] for fill in fills] or metrics), "CPU ms"], lines)


def budgets(name: str) -> str:
    """What tools/equal_tokens.py found."""
    report = json.loads((ROOT / f"docs/results/{name}_equal_tokens.json").read_text())
    return f"{table_of(report)}\nHardware: {report['hardware']}. Command: `python {report['command']}`.\n"


def classes(name: str) -> str:
    """One row per method and size: accuracy by pooling, of the CLS token also cross-entropy and divergence, each with
    what it gains over dense images of as many tokens; of the CLS token's accuracy also over those read with LoRA."""
    measured, rows = json.loads((ROOT / f"docs/results/equal_tokens_{name}.json").read_text()), {}
    for line in measured["results"]:
        key = (line["method"], line["scorer"], line["adapters"], line["image"], line["budget"])
        rows.setdefault(key, []).append(line)
    lines = []
    for (method, scorer, adapters, image, _), pools in rows.items():
        merging = f"merging, {scorer}{' + adapters' * adapters}"
        label = {"apt": merging, "lora": "dense + LoRA", "tome": "ToMe"}.get(method, method)
        columns = [(line, "accuracy", 1) for line in pools]
        columns += [(pools[0], "cross_entropy", 3), (pools[0], "divergence", 3)]
        cells = [
            _with_gain(line[key], line[f"{key}_over_dense"], line[f"{key}_over_dense_error"], digits)
            for line, key, digits in columns
        ]
        gain, error = (pools[0][f"accuracy_over_lora{suffix}"] for suffix in ("", "_error"))
        cells.insert(1, "" if gain is None else f"{gain:+.1f} ± {error:.1f}")
        lines.append([label, image.split("x")[0], f"{pools[0]['tokens']:.0f}", *cells, f"{pools[0]['ms']:.0f}"])
    pools = [line["pool"] for line in next(iter(rows.values()))]
    names = ["CLS token", "over LoRA", *pools[1:], "cross-entropy", "divergence", "CPU ms"]
    return table(["method", "image", "tokens", *names], lines)


def expected() -> str:
    """One row per task: the shares of tokens that the paper's thresholds keep on photographs."""
    measured = json.loads((ROOT / "docs/results/tokens_kept_coco.json").read_text())["results"]
    names = ("mean", "10th percentile", "median", "90th percentile")
    return table(["task", *names], [[line["task"], *(f"{line[name]:.1%}" for name in names)] for line in measured])


def photoshapes(task: str) -> str:
    return markdown_of(report(task))


def _with_gain(value: float, gain: float | None, error: float | None, digits: int = 2) -> str:
    if gain is None:
        return f"{value:.{digits}f}"
    return f"{value:.{digits}f} ({gain:+.{digits}f}{'' if error is None else f' ± {error:.{digits}f}'})"


def text_of(name: str) -> str:
    """What stands between a table's markers."""
    kind, *of = name.split(":")
    if kind not in TABLES:
        raise ValueError(f"no table is called {name!r}; there are {', '.join(TABLES)}")
    return TABLES[kind](*of)


TABLES = {
    "headline": headline,
    "summary": summary,
    "expected": expected,
    "speeds": speeds,
    "photoshapes": photoshapes,
    "budgets": budgets,
    "bench": bench,
    "equal": equal_tokens,
    "classes": classes,
}


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
