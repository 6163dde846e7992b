"""Files that are written as a whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: str | os.PathLike, content: str | bytes | Callable[[Path], object]) -> Path:
    """Write a file under a temporary name beside it, then give it its own; a failure leaves what was there before.

    Args:
        path: its folder is made if it does not exist.
        content: text, bytes, or a function that saves to the path that it is given (of the same suffix).

    Returns:
        The path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the user wants new files, which safetensors makes private
        if callable(content):
            content(temporary)
        else:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # or a power cut could leave the new name with old or no content
        temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
