"""Commands in the documents name programs, options and files that exist. (make docs-check also runs them all.)"""

import contextlib
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
from transformers import TrainingArguments

from tests import check_docs
from tests.docs_table import SUBSTITUTIONS

ROOT = Path(__file__).parents[1]

DOCUMENTS = check_docs.documents()
FENCED = [command for path in DOCUMENTS for command in check_docs.commands(path) if not command.is_python]
INLINE = [command for path in DOCUMENTS for command in check_docs.inline_commands(path)]
LAUNCHERS = {"python", "python3", "torchrun", "accelerate", ".venv/bin/python"}
OTHERS = {"make", "export", ".venv/bin/pre-commit"}
ELSEWHERE = {"-m pip", "-m pytest", "-m lmms_eval"}  # their options are not this project's
OWN_FOLDERS = ("tools/", "benchmarks/", "examples/", "det_configs/", "seg_configs/", "llava_apt/", "docs/", "tests/")


@cache
def options_of(program: str) -> set[str]:
    """Options that a program's help lists, with "_" for "-"."""
    printed, arguments = io.StringIO(), sys.argv
    sys.argv = [program, "--help"]
    try:
        with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
            if program.startswith("-m "):
                runpy.run_module(program[3:], run_name="__main__", alter_sys=False)
            else:
                runpy.run_path(str(ROOT / program), run_name="__main__")
    finally:
        sys.argv = arguments
    options = set(re.findall(r"--[\w-]+", printed.getvalue()))
    if program == "-m llava_apt.finetune":
        options |= {f"--{field.name}" for field in fields(TrainingArguments)}
    return {option.replace("-", "_") for option in options}


def ids(commands):
    return [f"{command.document}: {command.text[:60]}" for command in commands]


def test_commands_are_found():
    assert len(FENCED) > 30 and len(INLINE) >= 1
    assert {command.document for command in FENCED} >= {"README.md", "det_configs/README.md", "llava_apt/README.md"}


def test_lines_that_go_on_are_joined_and_comments_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(check_docs, "ROOT", tmp_path)
    (tmp_path / "x.md").write_text(
        "```bash\n# why\na --b \\\n    c  # d\n```\n\n```\nno command\n```\n```python\nx = 1\n```\n"
    )
    assert check_docs.commands(tmp_path / "x.md") == [("x.md", "a --b c", False), ("x.md", "x = 1\n", True)]


@pytest.mark.parametrize("command", FENCED + INLINE, ids=ids(FENCED + INLINE))
def test_programs_options_and_files_exist(command):
    first = next(word for word in shlex.split(command.text) if "=" not in word or word.startswith("-"))
    assert first in LAUNCHERS | OTHERS or (ROOT / first).is_file(), f"{first} is not known"
    if first == "make":
        target = shlex.split(command.text)[1]
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"no make {target}"
    program, arguments = check_docs.program_of(command.text)
    if program and program not in ELSEWHERE:
        known = options_of(program)
        for word in arguments:
            if word.startswith("--"):
                assert word.split("=")[0].replace("-", "_") in known, f"{program} has no {word}"
    for word in shlex.split(command.text):
        if word.startswith(OWN_FOLDERS) and "*" not in word and "--json" not in command.text:
            assert (ROOT / word).exists(), f"there is no {word}"


@pytest.mark.parametrize("folder", ["det_configs", "seg_configs"])
def test_configurations_that_tables_name_exist(folder):
    """Also of patterns such as `eva02_{b,l}_apt_1536.py`."""
    cells = re.findall(r"^\| (`[^|]*\.py`[^|]*) \|", (ROOT / folder / "README.md").read_text(), re.MULTILINE)
    named = [name for cell in cells for name in re.findall(r"`([^`]*\.py)`", cell)]
    echo = f"for name in {' '.join(named)}; do echo $name; done"
    files = subprocess.run(["bash", "-c", echo], cwd=ROOT / folder, capture_output=True, text=True, check=True)
    assert named and [file for file in files.stdout.split() if not (ROOT / folder / file).is_file()] == []


def test_every_substitution_is_needed():
    """What no document says any more is taken off the table."""
    programs = [command for path in DOCUMENTS for command in check_docs.commands(path) if command.is_python]
    used = set()
    for command in FENCED + programs:
        text = command.text
        for written, instead in SUBSTITUTIONS:
            used |= {written} if written in text else set()
            text = text.replace(written, instead)
    assert [written for written, _ in SUBSTITUTIONS if written not in used] == []


def test_a_command_that_fails_fails_the_check(tmp_path, capsys):
    from rich.console import Console

    commands = [
        check_docs.Command("x.md", text) for text in ("true", "false --now", "python -c 'import sys; sys.exit(3)'")
    ]
    failed = check_docs.run_all(tmp_path, commands, Console(quiet=True))
    assert failed == ["x.md: false --now", "x.md: python -c 'import sys; sys.exit(3)'"]


SCRIPTS = [
    path
    for folder in ("tools", "benchmarks", "examples")
    for path in sorted((ROOT / folder).glob("*.py"))
    if "__main__" in path.read_text()
]


@pytest.mark.parametrize("tool", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_has_help_with_examples(tool):
    assert "\nexamples:\n" in tool.read_text()


@pytest.mark.parametrize("script", ["tools/compare.py", "benchmarks/update_tables.py", "examples/make_photoshapes.py"])
def test_scripts_run_by_path_from_any_folder(script, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, ROOT / script, "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "usage: " in done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(3600)  # a hundred commands, of ten seconds each
def test_every_command_of_the_documents_runs(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["check_docs.py"])
    check_docs.main()
