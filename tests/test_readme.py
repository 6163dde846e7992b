"""The documents' results are those of the committed tables."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import update_tables
from tests import check_docs

ROOT = Path(__file__).parents[1]


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


@pytest.mark.parametrize("document", check_docs.documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(document):
    for file, heading in re.findall(r"\]\(([^)#:\s]*)(?:#([\w-]+))?\)", document.read_text()):
        target = document.parent / file if file else document
        assert target.exists(), file
        if heading:
            titles = re.findall(r"(?m)^#+ (.*)$", target.read_text())
            assert heading in [re.sub(r"[^\w\s-]", "", title).lower().replace(" ", "-") for title in titles], heading
