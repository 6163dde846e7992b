"""Figures of a benchmark as JSON rows, tables and plots."""

import contextlib
import datetime
import platform
import statistics
import sys
from pathlib import Path

import torch
from rich.table import Table

from tools.drawing import chart
from tools.machine import processor

from .cases import BACKBONE_STAGES, Case
from .measure import Host, ratios


def rows_of(host: Host, measure: str) -> list[dict]:
    """One row per case: see docs/benchmarks/README.md for what each entry means."""
    return [_row(host, case, measure) for case in host.cases]


def _row(host: Host, case: Case, measure: str) -> dict:
    seconds = [value for values in case.seconds[measure] for value in values]
    row = {
        "mode": case.name,
        "tokens_per_image": round(case.tokens, 1),
        "content_kept": round(case.content_kept, 4),
        "padding_kept": None if case.padding_kept is None else round(case.padding_kept, 4),
        "gflops_per_image": round(case.gflops[measure], 4) if measure in case.gflops else None,
        "images_per_second": round(len(host.batches[0].square) / statistics.median(seconds), 4),
        "ms": round(1000 * statistics.median(seconds), 3),
        "peak_gb": round(case.peak_bytes / 1e9, 4),
        "stages_ms": {stage: round(1000 * value, 3) for stage, value in stage_medians(case).items()},
        "seconds": [[round(value, 6) for value in values] for values in case.seconds[measure]],
        **case.extra,
    }
    for reference in references(host.cases, case):
        pairs = ratios(case, reference, measure)
        row[f"speed_vs_{reference.name}"] = {
            "median": round(statistics.median(pairs), 3),
            "min": round(min(pairs), 3),
            "max": round(max(pairs), 3),
            **bounds(case, reference, measure, host.measures[measure]),
        }
    return row


def references(cases: list[Case], case: Case) -> list[Case]:
    """The cases that a case is compared with: those with its own head, and those with the reference head."""
    return [other for other in cases if other.is_reference and other.head in (case.head, "reference")]


def stage_medians(case: Case) -> dict[str, float]:
    stages = list(dict.fromkeys(stage for run in case.stages for stage in run))
    return {stage: statistics.median(run.get(stage, 0.0) for run in case.stages) for stage in stages}


def bounds(case: Case, reference: Case, measure: str, stages: tuple[str, ...] | None) -> dict[str, float]:
    """Ratios to expect: by arithmetic; and, from the reference's stages, what Amdahl's law gives.

    - ``if_proportional``: every stage that works on tokens takes the reference's time by the share of its tokens;
    - ``if_trunk_free``: the trunk, with all that belongs to it, takes no time;
    - ``with_this_trunk``: the trunk takes what it took, the rest what the reference's took.
    """
    expected = {}
    if measure in case.gflops:
        expected["by_arithmetic"] = reference.gflops[measure] / case.gflops[measure]
    if case.stages and case.rectangular == reference.rectangular:
        ours, theirs = (
            {stage: value for stage, value in stage_medians(x).items() if stages is None or stage in stages}
            for x in (case, reference)
        )
        total = sum(theirs.values())
        shares = {stage: case.work[stage] / tokens for stage, tokens in reference.work.items()}
        rest = sum(value for stage, value in theirs.items() if stage not in BACKBONE_STAGES)
        trunk = sum(value for stage, value in ours.items() if stage in BACKBONE_STAGES)
        proportional = sum(value * shares.get(stage, 1) for stage, value in theirs.items())
        expected["if_proportional"] = total / proportional
        if set(theirs) - {*BACKBONE_STAGES, "rest"}:
            expected["if_trunk_free"] = total / rest
            expected["with_this_trunk"] = total / (rest + trunk)
    return {name: round(value, 3) for name, value in expected.items()}


def table_of(rows: list[dict], title: str) -> Table:
    columns = {
        "mode": lambda row: row["mode"],
        "content": lambda row: f"{row['content_kept']:.1%}",
        "padding": lambda row: "-" if row["padding_kept"] is None else f"{row['padding_kept']:.1%}",
        "GFLOP/img": lambda row: f"{row['gflops_per_image']:.4g}" if row["gflops_per_image"] else "-",
        "peak GB": lambda row: f"{row['peak_gb']:.3g}",
        "ms": lambda row: f"{row['ms']:.4g}",
        "img/s": lambda row: f"{row['images_per_second']:.3f}",
    }
    versus = list(dict.fromkeys(key for row in rows for key in row if key.startswith("speed_vs_")))
    for key in versus:
        columns[key.removeprefix("speed_").replace("_", " ")] = lambda row, key=key: _speed(row.get(key))
    extra = ("activations_gb", "gradients_gb", "trained_parameters")
    for key in (key for key in extra if key in rows[0]):
        columns[key.replace("_", " ")] = lambda row, key=key: f"{row[key]:.4g}"
    return _table(title, columns, rows)


def stage_table(rows: list[dict], title: str) -> Table:
    stages = list(dict.fromkeys(stage for row in rows for stage in row["stages_ms"]))
    order = [*BACKBONE_STAGES, "projector", "neck"]
    stages.sort(key=lambda stage: (order.index(stage) if stage in order else len(order), stage == "rest"))
    columns = {"mode": lambda row: row["mode"]}
    for stage in stages:
        columns[stage] = lambda row, stage=stage: f"{row['stages_ms'][stage]:.4g}" if stage in row["stages_ms"] else "-"
    for bound in ("if_proportional", "if_trunk_free", "with_this_trunk"):
        if any(bound in _own_reference(row) for row in rows):
            columns[bound.replace("_", " ")] = lambda row, bound=bound: (
                f"{_own_reference(row)[bound]:.2f}x" if bound in _own_reference(row) else "-"
            )
    return _table(f"{title}: stages in ms; speed to expect vs dense with the same head and padding", columns, rows)


def _own_reference(row: dict) -> dict:
    """The comparison with the dense model of the row's own head, padded as the row's images are."""
    compared = [value for key, value in row.items() if key.startswith("speed_vs_") and "if_proportional" in value]
    return compared[-1] if compared else {}  # with the reference head comes first


def _speed(speed: dict | None) -> str:
    return "-" if speed is None else "{median:.2f} ({min:.2f}-{max:.2f})".format(**speed)


def _table(title: str, columns: dict, rows: list[dict]) -> Table:
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="left" if column == "mode" else "right")
    for row in rows:
        table.add_row(*(cell(row) for cell in columns.values()))
    return table


def environment(device: torch.device) -> dict:
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "hardware": f"{hardware}, {torch.get_num_threads()} CPU threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def plot_speeds(path: Path, rows: list[dict], title: str) -> None:
    """Bars: speed relative to the reference, with the range over pairs, and a mark at the ratio of arithmetic."""
    reference = _reference_of(rows)
    speeds = [row[f"speed_vs_{reference}"] for row in rows]
    with _figure(path, (8, 0.5 * len(rows) + 1.2)) as axes:
        medians = [speed["median"] for speed in speeds]
        spread = [[s["median"] - s["min"] for s in speeds], [s["max"] - s["median"] for s in speeds]]
        axes.barh([row["mode"] for row in rows], medians, xerr=spread, color="#56B4E9", ecolor="#555555", capsize=3)
        if all("by_arithmetic" in speed for speed in speeds):
            axes.plot([s["by_arithmetic"] for s in speeds], range(len(rows)), "|", color="black", markersize=18)
        axes.axvline(1, color="grey", linewidth=0.8)
        axes.invert_yaxis()
        explained = "median, range over pairs; | = ratio of arithmetic"
        axes.set(xlabel=f"speed relative to {reference} ({explained})", title=title)


def plot_growth(path: Path, results: list[dict]) -> None:
    """Two plots: seconds per image over image sides, a line per mode; and time relative to the reference over the share
    of its tokens, a line per side. Written as PATH_sides and PATH_tokens."""
    reference = _reference_of(results[0]["rows"])
    by_side = {result["img_size"]: {row["mode"]: row for row in result["rows"]} for result in results}
    modes = next(iter(by_side.values()))
    title = results[0]["title"].split(":")[0]
    with _figure(path.with_stem(f"{path.stem}_sides"), (7, 5)) as axes:
        for mode in modes:
            times = [1 / rows[mode]["images_per_second"] for rows in by_side.values()]
            axes.plot(list(by_side), times, "o-", label=mode)
        axes.set(xscale="log", yscale="log", xlabel="side of the square in pixels", ylabel="seconds per image")
        axes.set_xticks(list(by_side), map(str, by_side))
        axes.minorticks_off()
        axes.set_title(f"{title}: cost by image size")
        axes.legend()
    with _figure(path.with_stem(f"{path.stem}_tokens"), (7, 5)) as axes:
        for side, rows in by_side.items():
            whole = rows[reference]["tokens_per_image"]
            points = sorted(
                (row["tokens_per_image"] / whole, 1 / row[f"speed_vs_{reference}"]["median"])
                for mode, row in rows.items()
                if mode.startswith("apt")
            )
            axes.plot(*zip(*points), "o-", label=f"{side} px")
        axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8, label="proportional")
        axes.set(
            xlabel=f"tokens / tokens of {reference}", ylabel=f"time / time of {reference}", xlim=(0, 1), ylim=(0, 1.1)
        )
        axes.set_title(f"{title}: cost by tokens kept")
        axes.legend()


def _reference_of(rows: list[dict]) -> str:
    """The first mode that all others are compared with."""
    return next(row["mode"] for row in rows if all(f"speed_vs_{row['mode']}" in other for other in rows))


@contextlib.contextmanager
def _figure(path: Path, size: tuple[float, float]):
    figure, axes = chart(size)
    yield axes
    figure.savefig(path, dpi=120)
