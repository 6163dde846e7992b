"""What the command line tools share: help made of their docstrings, and mistakes that end in one line."""

import argparse
import sys
from collections.abc import Callable


def parser_of(doc: str) -> argparse.ArgumentParser:
    """A parser whose help is a module's docstring: its first line, then its examples as they stand."""
    first, _, rest = doc.partition("\n")
    return argparse.ArgumentParser(
        description=first, epilog=rest.strip("\n"), formatter_class=argparse.RawDescriptionHelpFormatter
    )


def run(main: Callable[[], object]) -> None:
    """Run a tool; what the user can correct is reported in one line. ``python -X dev`` shows where it was raised."""
    try:
        main()
    except (OSError, ValueError, ImportError) as error:
        if sys.flags.dev_mode:
            raise
        sys.exit(f"error: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
