"""Where the nvidia-* wheels of this Python keep their libraries (the [cuda13] extra).

Imports nothing of the C core: its tests and benchmarks tell other programs of them, too.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path


def library_dirs() -> list[str]:
    """Folders of cuBLASLt and its like, as pip lays them out: nvidia/cu13/lib and others."""
    spec = importlib.util.find_spec("nvidia")
    roots = [] if spec is None else list(spec.submodule_search_locations or [])
    found = (path for root in roots for path in Path(root).glob("*/lib"))
    return sorted(str(path) for path in found if path.is_dir())


@functools.cache
def add_library_dirs(add: Callable[[str], None]) -> None:
    """Tell them to `add`, _C.add_library_dir say, once. Before a model is made on a GPU."""
    for directory in library_dirs():
        add(directory)
