"""Cases that compute-sanitizer's tools run: `tools/sanitize.sh`."""

from __future__ import annotations

from typing import Any

import pytest


def small(*values: object) -> Any:
    """A case of parametrize small enough for the slowest tool. Those of a file launch every kernel
    of its op."""
    return pytest.param(*values, marks=pytest.mark.sanitize)
