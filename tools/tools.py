"""What `import tools` finds in a script that is run by its path, whatever the working directory.

Python puts the script's folder on its path, so that this file stands for the package; it puts the repository's root
there instead. tools/, benchmarks/ and examples/ each have it. Scripts import tools.cli before anything else of this
project (pyproject.toml keeps it on top).
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)
__path__ = [str(ROOT / "tools")]
