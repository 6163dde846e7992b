"""Steps of a long run whose results are kept, so that a run that is started again does only what is missing."""

import hashlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich import progress
from rich.console import Console

from apt_backbones.files import write_atomically
from tools import cli

console = Console(stderr=True)


class Steps:
    """Results of finished steps, a JSON file each; a result is used again only for the very same inputs.

    Args:
        folder: for the files; made when the first step is finished.
        common: what every step depends on, as names and values that JSON can hold.
    """

    def __init__(self, folder: Path, common: dict | None = None):
        self.folder, self.common = folder, common or {}

    def run(self, name: str, title: str, inputs: dict, function: Callable[[], object]):
        """The result of ``function()``, from an earlier run if its inputs were these; always as JSON gives it back.

        Args:
            name: of the file.
            title: what is said while it runs.
            inputs: all that the result depends on, beside what is common to all steps.
        """
        path = self.folder / f"{name}.json"
        inputs = as_json({**self.common, **inputs})
        if path.is_file() and (kept := json.loads(path.read_text()))["inputs"] == inputs:
            console.print(f"[green]kept[/]  {title}", highlight=False)
            return kept["result"]
        with announced(title):
            result = as_json(function())
        write_atomically(path, json.dumps({"inputs": inputs, "result": result}))
        return result


@contextmanager
def announced(title: str) -> Iterator[None]:
    """Say what is being done, and how long it took."""
    started = time.perf_counter()
    console.print(f"[cyan]doing[/] {title}", highlight=False)
    yield
    console.print(f"      [dim]{time.perf_counter() - started:.0f} s[/]", highlight=False)


def track(items: Iterable, title: str) -> Iterable:
    """The items, with a progress bar while they are gone through."""
    return progress.track(items, f"      {title}", console=console, transient=True, disable=not console.is_terminal)


def as_json(value: object):
    """What JSON makes of a value: keys become strings, tuples lists."""
    return json.loads(json.dumps(value, default=str))


def digest(value: object) -> str:
    """Ten hexadecimal digits that stand for a value."""
    return hashlib.sha256(json.dumps(value, default=str, sort_keys=True).encode()).hexdigest()[:10]


def fingerprint(*paths: str | Path, pattern: str = "*") -> str:
    """Ten hexadecimal digits that stand for the content of files and of all files in folders (that fit a pattern).

    Raises:
        FileNotFoundError: a path does not exist.
    """
    known = hashlib.sha256()
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"nothing at {path}")
        for file in sorted(path.rglob(pattern)) if path.is_dir() else [path]:
            if file.is_file():
                known.update(str(file.relative_to(path)).encode())
                known.update(hashlib.sha256(file.read_bytes()).digest())
    return known.hexdigest()[:10]


def stamps(files: Iterable[str | Path]) -> str:
    """Ten hexadecimal digits that stand for files that are too large to be read: their names, sizes and dates."""
    return digest([[str(file), (stat := os.stat(file)).st_size, stat.st_mtime_ns] for file in files])


def scorer_key(scorer: str) -> str:
    """What stands for a scorer: its name, or the content of its file."""
    return fingerprint(scorer) if Path(scorer).is_file() else scorer


def run(main: Callable[[], object]) -> None:
    """Run a tool that keeps finished steps, as ``cli.run`` does; SIGTERM interrupts it as Ctrl-C does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    cli.run(main, "interrupted; the same command resumes")
