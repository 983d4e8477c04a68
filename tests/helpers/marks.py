"""Cases that compute-sanitizer's tools run: `tools/sanitize.sh`."""

from __future__ import annotations

import pytest
from _pytest.mark import ParameterSet


def small(*values: object) -> ParameterSet:
    """A case of parametrize small enough for the slowest tool. Those of a file launch every kernel
    of its op."""
    return pytest.param(*values, marks=pytest.mark.sanitize)
