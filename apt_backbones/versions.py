"""What is too old is named where it is imported, with the command that helps."""

import re
from importlib.metadata import PackageNotFoundError, version


def require(package: str, least: str) -> None:
    """Raise ImportError if an installed package is older than a version; one that is not installed is not checked.

    Args:
        package: name under which pip knows it.
        least: numbers with dots between them.
    """
    try:
        installed = version(package)
    except PackageNotFoundError:
        return
    if _numbers(installed) < _numbers(least):
        raise ImportError(f"{package} {installed} is too old: pip install '{package}>={least}'")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.match(r"[\d.]*\d", text)[0].split("."))


require("torch", "2.10")
require("timm", "1.0.31")
