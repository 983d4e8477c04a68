"""Every test of this room that takes `isa` runs on each instruction set of the machine."""

import pytest
from helpers.cpu_shim import isas


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "isa" in metafunc.fixturenames:
        metafunc.parametrize("isa", isas())
