"""The documents' results are those of the committed tables."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import update_tables

ROOT = Path(__file__).parents[1]


def readme_row(task):
    (line,) = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith(f"| {task}")]
    return [float(number) for number in re.findall(r"(\d+\.\d+)", line)]


@pytest.mark.parametrize("task, file, metric", [("detection", "det", "box mAP"), ("segmentation", "seg", "mIoU")])
def test_the_readme_quotes_the_committed_results(task, file, metric):
    rows = json.loads((ROOT / f"docs/results/photoshapes_{file}.json").read_text())["rows"]
    by_title = {row["title"]: row for row in rows}
    tuned, learned = "APT after the short fine-tune", "learned scorer, interpolated maps"
    after, dense = by_title[tuned], by_title["dense"]
    titles = ("dense", "dense, smaller images", "random", "resizing", tuned, learned)
    expected = [by_title[title]["metrics"][metric] for title in titles]
    expected += [100 * after["content_kept"], after["per_second"] / dense["per_second"]]
    assert readme_row(task) == pytest.approx(expected, abs=0.051)


@pytest.mark.parametrize("document", update_tables.DOCUMENTS)
def test_tables_are_up_to_date(document):
    text = (ROOT / document).read_text()
    assert update_tables.MARKED.search(text), "has a table"
    assert update_tables.updated(text) == text, "run make tables"


def test_tables_change_with_the_results(tmp_path, monkeypatch):
    measured = json.loads((ROOT / "docs/results/photoshapes_seg.json").read_text())
    measured["rows"][0]["metrics"]["mIoU"] = 12.34
    (tmp_path / "seg.json").write_text(json.dumps(measured))
    monkeypatch.setattr(update_tables, "report", lambda task: tmp_path / "seg.json")
    text = update_tables.updated("a\n<!-- table: seg -->\nstale\n<!-- end of table -->\nb\n")
    assert "12.3" in text and "stale" not in text and text.startswith("a\n") and text.endswith("\nb\n")
    with pytest.raises(ValueError, match="no table is called 'x'"):
        update_tables.text_of("x")


def test_every_file_that_the_documents_link_to_exists():
    for document in [ROOT / "README.md", *ROOT.glob("*/README.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document}: {target}"


def test_every_tool_and_config_that_the_documents_name_exists():
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("*/README.md")]:
        text = document.read_text()
        for path in re.findall(r"\b((?:tools|benchmarks|examples|det_configs|seg_configs)/\w+\.py)\b", text):
            assert (ROOT / path).exists(), f"{document}: {path}"
