"""The README's results are those of the committed tables."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def readme_row(task):
    (line,) = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith(f"| {task}")]
    return [float(number) for number in re.findall(r"(\d+\.\d+)", line)]


@pytest.mark.parametrize("task, file, metric", [("detection", "det", "box mAP"), ("segmentation", "seg", "mIoU")])
def test_the_readme_quotes_the_committed_results(task, file, metric):
    rows = json.loads((ROOT / f"docs/results/photoshapes_{file}.json").read_text())["rows"]
    by_title = {row["title"]: row for row in rows}
    titles = ("dense", "random", "resizing", "APT after the short fine-tune")
    after, dense = by_title[titles[-1]], by_title["dense"]
    expected = [by_title[title]["metrics"][metric] for title in titles]
    expected += [100 * after["content_kept"], after["images_per_second"] / dense["images_per_second"]]
    assert readme_row(task) == pytest.approx(expected, abs=0.051)


def test_every_file_that_the_documents_link_to_exists():
    for document in [ROOT / "README.md", *ROOT.glob("*/README.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document}: {target}"


def test_every_tool_and_config_that_the_documents_name_exists():
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("*/README.md")]:
        for path in re.findall(r"\b((?:tools|det_configs|seg_configs)/\w+\.py)\b", document.read_text()):
            assert (ROOT / path).exists(), f"{document}: {path}"
