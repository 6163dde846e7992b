#!/usr/bin/env python
"""Run every command and Python block of README.md and the other documents, small enough for a CPU.

examples:
  python -m tests.check_docs                       # all, in a temporary folder; what make docs-check does
  python -m tests.check_docs --list                # what runs in place of what the documents say
  python -m tests.check_docs --only calibrate.py   # commands that hold this text

tests/docs_table.py says what is substituted. A command that fails, or names a program, option or file that does not
exist, fails the check.
"""

import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from tools.cli import parser_of, run
from tests.docs_table import PRELUDES, SUBSTITUTIONS, fill

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`((?:python|make|torchrun|pytest) [^`]+)`")


class Command(NamedTuple):
    """A command of a document: a shell command line, or all Python blocks of the document."""

    document: str
    text: str
    is_python: bool = False

    @property
    def substituted(self) -> str:
        text = self.text
        for written, instead in SUBSTITUTIONS:
            text = text.replace(written, instead)
        return PRELUDES.get(self.document, "") + text if self.is_python else text


def documents() -> list[Path]:
    """README.md first, as a reader goes."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("*/README.md"))]
    return found + sorted(
        path for path in (ROOT / "docs").rglob("*.md") if path.name != "README.md" or path not in found
    )


def commands(document: Path) -> list[Command]:
    """Commands of a document's fenced blocks, in order; its Python blocks last, as one program."""
    name, found, programs = str(document.relative_to(ROOT)), [], []
    for language, body in BLOCK.findall(document.read_text()):
        if language in ("bash", "sh"):
            joined = re.sub(r"\s*\\\n\s*", " ", body)
            lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in joined.splitlines())
            found += [Command(name, line) for line in lines if line]
        elif language == "python":
            programs.append(body)
    return found + ([Command(name, "\n".join(programs), is_python=True)] if programs else [])


def inline_commands(document: Path) -> list[Command]:
    """Commands in the running text; they are not run, but their options are checked."""
    text = BLOCK.sub("", document.read_text())
    return [Command(str(document.relative_to(ROOT)), " ".join(found.split())) for found in INLINE.findall(text)]


def program_of(command: str) -> tuple[str, list[str]]:
    """The Python file or module (as "-m NAME") that a command runs, behind launchers, and its arguments; "" if none."""
    words = shlex.split(command)
    for index, word in enumerate(words):
        if word.endswith(".py"):
            return word, words[index + 1 :]
        if word == "-m":
            return f"-m {words[index + 1]}", words[index + 2 :]
    return "", words


def run_all(folder: Path, chosen: list[Command], console: Console) -> list[str]:
    """Run commands in a folder that ``fill`` made; returns what failed. What was run before is not run again."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(folder),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done, failed = set(), []
    for number, command in enumerate(chosen, start=1):
        text = command.substituted
        if text in done:
            continue
        done.add(text)
        words = [sys.executable, "-c", text] if command.is_python else ["bash", "-c", text]
        label = f"{command.document}: Python blocks" if command.is_python else text
        started = time.monotonic()
        process = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
        seconds = time.monotonic() - started
        console.print(
            f"{number}/{len(chosen)} {'ok' if process.returncode == 0 else 'FAILED'} {seconds:.0f} s  {label}"
        )
        if process.returncode:
            failed.append(f"{command.document}: {command.text}")
            console.print((process.stdout + process.stderr)[-3000:], markup=False)
    return failed


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--list", action="store_true", help="print documents' commands and what runs instead")
    parser.add_argument("--only", default="", metavar="TEXT", help="only commands that hold this text")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="run in this new folder and keep it")
    args = parser.parse_args()
    chosen = [command for path in documents() for command in commands(path) if args.only in command.text]
    if args.list:
        for command in chosen:
            print(f"{command.document}\n  says  {command.text}\n  runs  {command.substituted}\n")
        return
    console = Console(highlight=False, soft_wrap=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        console.print("preparing small data and checkpoints")
        fill(folder)
        failed = run_all(folder, chosen, console)
    if failed:
        raise ValueError(f"{len(failed)} commands of the documents fail: " + "; ".join(failed))
    console.print(f"all commands of {len(documents())} documents run")


if __name__ == "__main__":
    run(main)
