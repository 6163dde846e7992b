"""Results of methods, one of whose runs had them all or each its own, and the one table that shows them everywhere."""

import json
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Result:
    """One line: a run, or one method of a run that has several.

    Attributes:
        metrics: title -> value.
        tokens: patch tokens per image.
        content_kept, padding_kept: shares of the tokens of the content and of its padding.
        speed: images (for LLaVA questions) per second.
        relative_speed: to the reference's.
        differences: title of a metric -> difference to the reference.
    """

    run: str
    method: str
    metrics: dict[str, float]
    tokens: float | None = None
    content_kept: float | None = None
    padding_kept: float | None = None
    speed: float | None = None
    relative_speed: float | None = None
    differences: dict[str, float] = field(default_factory=dict)


def read_table(path: Path, run: str = "") -> list[Result]:
    """What a script of examples/ wrote: speeds are relative to the first line, the dense model.

    Raises:
        ValueError: the file is not such a table.
    """
    try:
        rows = json.loads(path.read_text())["rows"]
        figures = ("tokens", "content_kept", "padding_kept", "per_second")
        results = [Result(run, row["title"], row["metrics"], *map(row.get, figures)) for row in rows]
        for result in results:
            result.relative_speed = result.speed and result.speed / results[0].speed
        if results:
            return results
        raise ValueError("it has no rows")
    except (KeyError, TypeError, ValueError) as error:  # the last: no JSON, or no text at all
        raise ValueError(f"{path} is not a table of tools/equal_tokens.py or of results on PhotoShapes") from error


def columns(results: list[Result], digits: int = 2) -> dict[str, list[str]]:
    """Title -> a cell per result; columns in which no result has anything are left out.

    Args:
        digits: of metrics, behind the decimal point.
    """
    cells = {"run": [r.run for r in results], "method": [r.method for r in results]}
    for title in dict.fromkeys(title for result in results for title in result.metrics):
        metric, difference = f"{{:.{digits}f}}", f" ({{:+.{digits}f}})"
        cells[title] = [
            _cell(r.metrics.get(title), metric) + _cell(r.differences.get(title), difference) for r in results
        ]
    cells["tokens"] = [_cell(r.tokens, "{:.1f}") for r in results]
    cells["content tokens kept"] = [_cell(r.content_kept, "{:.1%}") for r in results]
    cells["padding tokens kept"] = [_cell(r.padding_kept, "{:.1%}") for r in results]
    cells["per second"] = [_cell(r.speed, "{:.2f}") for r in results]
    cells["relative speed"] = [_cell(r.relative_speed, "{:.2f}x") for r in results]
    return {title: texts for title, texts in cells.items() if any(texts)}


def markdown(columns: dict[str, list[str]]) -> str:
    """A Markdown table; its columns are to the right, but for the first."""
    lines = [list(columns), ["---", *["---:"] * (len(columns) - 1)], *zip(*columns.values())]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
