"""What the programs that make data sets share."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from tools.cli import parser_of

Item = TypeVar("Item")
SHARES = {"training": 0.6, "validation": 0.2, "test": 0.2}


def splits_of(items: Sequence[Item]) -> dict[str, Sequence[Item]]:
    """Items in their order, 60 % for training, 20 % for validation and 20 % for the test."""
    splits, first, share = {}, 0, 0.0
    for name, more in SHARES.items():
        share += more
        last = round(share * len(items))
        splits[name], first = items[first:last], last
    return splits


def source_and_destination(doc: str, source: str) -> tuple[Path, Path]:
    """SRC and DST of the command line of a program with this docstring; ``source`` says what SRC is."""
    parser = parser_of(doc)
    parser.add_argument("source", type=Path, metavar="SRC", help=source)
    parser.add_argument("destination", type=Path, metavar="DST", help="folder to make; must not exist, or be empty")
    args = parser.parse_args()
    return args.source, args.destination


@contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """A folder to write into. It becomes the destination when all is written; an error leaves nothing.

    Raises:
        FileExistsError: the destination holds something.
    """
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise FileExistsError(f"{destination} already exists; remove it or name another folder")
    destination.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(destination)
    prefix = f".{destination.name}-{os.getpid()}-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=destination.parent) as scratch:
        folder = Path(scratch) / "new"
        folder.mkdir()
        yield folder
        os.replace(folder, destination)


def remove_abandoned(destination: Path) -> None:
    """Remove what runs for the same folder left that were killed."""
    ours = re.compile(rf"\.{re.escape(destination.name)}-(\d+)-[a-z0-9_]+")
    for folder in list(destination.parent.iterdir()):
        if match := ours.fullmatch(folder.name):
            try:
                os.kill(int(match[1]), 0)
            except ProcessLookupError:
                shutil.rmtree(folder, ignore_errors=True)
            except PermissionError:
                pass  # another user's, at work
