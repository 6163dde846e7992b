"""A comparison of methods on PhotoShapes: what its JSON file holds, and what is said below its table.

A report has the ``rows`` that tools.results reads, and ``task``, ``command``, ``hardware``, ``versions``,
``measured_on``, ``scorer``, ``thresholds`` (size -> threshold), ``minutes_dense`` and ``minutes_short_finetune`` (None
where they are not known), and where a learned scorer was measured ``learned_thresholds``.
"""

import json
from pathlib import Path

from apt_backbones.files import write_atomically
from tools.results import columns, markdown, read_table

DENSE, SMALLER_DENSE = "dense", "dense, smaller images"
BEFORE, AFTER = "APT before the short fine-tune", "APT after the short fine-tune"
LEARNED = "learned scorer, interpolated maps"


def write_report(path: Path, report: dict) -> str:
    """Write the JSON file; returns its table and facts as Markdown."""
    write_atomically(path, json.dumps(report, indent=1) + "\n")
    return markdown_of(path)


def markdown_of(path: Path) -> str:
    """Table and facts of a report's file."""
    report = json.loads(path.read_text())
    minutes = (report["minutes_dense"], report["minutes_short_finetune"])
    words = ("training the dense model took {:.0f} minutes", "the short fine-tune took {:.1f} minutes")
    trained = [text.format(value) for text, value in zip(words, minutes) if value is not None]
    facts = [
        f"Measured on {report['measured_on']}",
        f"Hardware: {report['hardware']}",
        f"Thresholds ({report['scorer']}): {listed(report['thresholds'])}",
        *([f"Of the learned scorer: {listed(learned)}"] if (learned := report.get("learned_thresholds")) else []),
        *([", ".join(trained).capitalize()] if trained else []),
        f"Command: `python {report['command']}`",
    ]
    return f"{markdown(columns(read_table(path), digits=1))}\n{'. '.join(facts)}.\n"


def listed(thresholds: dict) -> str:
    return ", ".join(f"{value:g} at {size} px" for size, value in thresholds.items())
