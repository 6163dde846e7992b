"""A fine-tune's output folder: which run it belongs to, checkpoints that are whole, and nothing of another run."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from apt_backbones.files import write_atomically

from .new_layers import FILE_NAME

RUN_FILE = "finetune_run.json"  # the settings that decide what comes out
MANIFEST = "files.json"  # in a checkpoint: the size of each of its files
UNFINISHED = ".unfinished"  # what is being written

# What a run writes, and what another must neither mix with its own nor lose unasked.
_WRITTEN = (RUN_FILE, UNFINISHED, f"{PREFIX_CHECKPOINT_DIR}-*", FILE_NAME, "model*.safetensors*", "config.json")


def refuse_other_run(
    folder: Path, settings: Mapping[str, object], resume: bool = False, overwrite: bool = False
) -> None:
    """Raise ValueError unless a run with these settings may be begun in a folder, or resumed.

    Args:
        folder: need not exist.
        settings: name -> value, of JSON's types; a run goes on only with the settings that it was begun with.
        resume: the run in the folder is to go on; one begins if there is none.
        overwrite: what is in the folder may be deleted.
    """
    if resume and (folder / RUN_FILE).is_file():
        _refuse_other_settings(folder / RUN_FILE, json.loads(json.dumps(settings)))
        if checkpoint := last_checkpoint(folder):
            _refuse_damaged(checkpoint)
    elif not overwrite and (present := _written(folder)):
        way = "has no" if resume else "--resume goes on with its run if it has a"
        raise ValueError(
            f"{folder} already holds {present[0].name} and {way} {RUN_FILE}; choose another --output-dir, or "
            "--overwrite to delete its checkpoints and results"
        )


def begin_run(folder: Path, settings: Mapping[str, object], resume: bool = False) -> None:
    """Make a folder that of a run: unless it resumes what is there, delete that and write down the settings."""
    if resume and (folder / RUN_FILE).is_file():
        shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
        return
    for path in _written(folder):  # the old settings first: what is left if this is interrupted must not be resumed
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    write_atomically(folder / RUN_FILE, json.dumps(settings, indent=1))


def _written(folder: Path) -> list[Path]:
    return [path for pattern in _WRITTEN for path in sorted(folder.glob(pattern))]


def _refuse_other_settings(run_file: Path, settings: Mapping[str, object]) -> None:
    try:
        begun = dict(json.loads(run_file.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{run_file} is damaged ({error}); begin again with --overwrite") from error
    changed = [
        f"{name} {begun.get(name)} (now {settings.get(name)})"
        for name in {**begun, **settings}
        if begun.get(name) != settings.get(name)
    ]
    if changed:
        raise ValueError(
            f"{run_file.parent} holds a run with {', '.join(changed)}; resume it with the same settings, or choose "
            "another --output-dir for another run"
        )


def last_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the latest step, or None. All are whole: they get their names when they are."""
    checkpoints = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rpartition("-")[2].isdigit()]
    return max(checkpoints, key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def finish_checkpoint(unfinished: Path, checkpoint: Path) -> None:
    """Give a checkpoint that has all its files its own name."""
    write_atomically(unfinished / MANIFEST, json.dumps(_sizes(unfinished), indent=1))
    _sync(unfinished)
    if checkpoint.exists():
        shutil.rmtree(checkpoint)
    os.replace(unfinished, checkpoint)


def finish_result(unfinished: Path, folder: Path) -> None:
    """Move the files of a result to its folder, the new layers, by which a finished run is known, last."""
    _sync(unfinished)
    for path in sorted(unfinished.iterdir(), key=lambda path: path.name == FILE_NAME):
        os.replace(path, folder / path.name)
    unfinished.rmdir()


def _refuse_damaged(checkpoint: Path) -> None:
    """Raise ValueError unless a checkpoint has the files that it was written with, no more and no less."""
    with damage_named(checkpoint):
        expected, found = json.loads((checkpoint / MANIFEST).read_text()), _sizes(checkpoint)
        for name in sorted(expected.keys() | found.keys()):
            if name not in found:
                raise ValueError(f"{name} is missing")
            if name not in expected:
                raise ValueError(f"{name} was added")
            if found[name] != expected[name]:
                raise ValueError(f"{name} has {found[name]} instead of {expected[name]} bytes")
        if json.loads((checkpoint / TRAINER_STATE_NAME).read_text())["global_step"] != step_of(checkpoint):
            raise ValueError(f"{TRAINER_STATE_NAME} is of another step")


def _sizes(folder: Path) -> dict[str, int]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST]
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _sync(folder: Path) -> None:
    """Have the disk write what it was given, or a power cut could leave the new names with half of the content."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


@contextmanager
def damage_named(checkpoint: str | os.PathLike | None) -> Iterator[None]:
    """Report as one ValueError whatever the readers of a damaged or hostile checkpoint raise."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"{checkpoint} cannot be resumed: {reason(error)}; delete this folder to go on from the checkpoint before "
            "it, or from the start"
        ) from error


@contextmanager
def saving(what: str, folder: Path) -> Iterator[None]:
    """Report as one OSError what the libraries that write files raise when the disk is full."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        last = last_checkpoint(folder)
        kept = f"{last.name} is whole" if last else "there is no checkpoint yet"
        raise OSError(f"{what} could not be saved in {folder} ({reason(error)}); {kept}") from error


def reason(error: Exception) -> str:
    """What an exception says, in one line and without torch's advice to execute what a file holds."""
    *advice, text = re.split(r"WeightsUnpickler error:|trusted source\.", str(error))
    line = (text.strip() or type(error).__name__).splitlines()[0]
    return line.partition(". ")[0].rstrip(".") if advice else line


def content_of(path: str | os.PathLike) -> str:
    """Digest of a file's content; of a model's folder, that of its configuration and of its weights' names and sizes;
    the name of anything else, such as a model on the hub."""
    path = Path(path)
    if path.is_file():
        return "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    if not path.is_dir():
        return str(path)
    config = path / "config.json"
    weights = sorted((file.name, file.stat().st_size) for file in path.glob("*.safetensors"))
    content = (config.read_bytes() if config.is_file() else b"") + repr(weights).encode()
    return "sha256:" + hashlib.sha256(content).hexdigest()[:16]
