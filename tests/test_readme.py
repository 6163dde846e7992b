"""The documents' results are those of the committed tables."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import update_tables
from tests import check_docs

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
    text = update_tables.updated("a\n<!-- table: photoshapes:seg -->\nstale\n<!-- end of table -->\nb\n")
    assert "12.3" in text and "stale" not in text and text.startswith("a\n") and text.endswith("\nb\n")
    with pytest.raises(ValueError, match="no table is called 'x'"):
        update_tables.text_of("x")


@pytest.mark.parametrize("document", check_docs.documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(document):
    for file, heading in re.findall(r"\]\(([^)#:\s]*)(?:#([\w-]+))?\)", document.read_text()):
        target = document.parent / file if file else document
        assert target.exists(), file
        if heading:
            titles = re.findall(r"(?m)^#+ (.*)$", target.read_text())
            assert heading in [re.sub(r"[^\w\s-]", "", title).lower().replace(" ", "-") for title in titles], heading


@pytest.mark.parametrize("document", check_docs.documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_tool_and_config_that_the_documents_name_exists(document):
    for path in re.findall(
        r"\b((?:tools|benchmarks|examples|det_configs|seg_configs)/\w+\.py)\b", document.read_text()
    ):
        assert (ROOT / path).exists(), path
