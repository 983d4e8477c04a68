"""The tools are scripts, not a package: their folder joins the path for the tests of this room."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
