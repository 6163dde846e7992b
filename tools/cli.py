"""What the command line tools share: help made of their docstrings, and mistakes that end in one line."""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

# What OpenCV decodes at most, as PIL does (a few bytes can claim to be a gigapixel); read when cv2 is imported.
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", "178956970")


def parser_of(doc: str) -> argparse.ArgumentParser:
    """A parser whose help is a module's docstring: its first line, then its examples as they stand."""
    first, _, rest = doc.partition("\n")
    return argparse.ArgumentParser(
        description=first, epilog=rest.strip("\n"), formatter_class=argparse.RawDescriptionHelpFormatter
    )


def check_at_least(args: argparse.Namespace, **least: int) -> None:
    """Raise ValueError if a flag that is given is below its least value."""
    for name, value in least.items():
        if getattr(args, name) is not None and getattr(args, name) < value:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {value}")


def names_of(paths: Sequence[Path]) -> dict[Path, str]:
    """A name for what is made of each file: its own without suffix; where several have the same, with as much of their
    paths as tells them apart, or else numbers."""
    same: dict[str, list[Path]] = {}
    for path in dict.fromkeys(paths):
        same.setdefault(path.stem, []).append(path)
    names = {}
    for stem, group in same.items():
        longest = max(len(path.parts) for path in group)
        ends = [["_".join(path.parts[-n:]).replace(".", "_") for path in group] for n in range(1, longest + 1)]
        numbers = [f"{stem}_{number}" for number in range(1, len(group) + 1)]
        names |= zip(group, next(tried for tried in ([stem], *ends, numbers) if len({*tried}) == len(group)))
    return {path: names[path] for path in paths}


def positive(text: str) -> float:
    """The type of a flag that takes a number above 0."""
    if (number := float(text)) > 0:
        return number
    raise argparse.ArgumentTypeError(f"must be above 0, got {text}")


def check_shares(shares: Sequence[float], flag: str = "--keep") -> None:
    """Raise ValueError if a flag names what is no share of the tokens."""
    if not all(0 < share < 1 for share in shares):
        raise ValueError(f"{flag} takes shares between 0 and 1, such as 0.7")


def run_tool(command: Sequence[str], failed: str) -> None:
    """Run a tool in a process of its own, silently; raise ValueError, which begins with ``failed``, if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        *_, last = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()
        raise ValueError(f"{failed}: {last.removeprefix('error: ')}")


def run(main: Callable[[], object], interrupted: str = "interrupted") -> None:
    """Run a tool; what the user can correct is reported in one line. ``python -X dev`` shows where it was raised."""
    try:
        main()
    except (OSError, ValueError, ImportError) as error:
        if sys.flags.dev_mode:
            raise
        sys.exit(f"error: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        sys.exit(interrupted)
