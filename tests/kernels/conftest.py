"""Every test of this room that takes `path` runs on each path of this machine's GPU."""

import pytest
from helpers.cpu_shim import cuda_paths, why_no_cuda


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "path" not in metafunc.fixturenames:
        return
    paths: list[object] = list(cuda_paths())
    if not paths:
        paths = [pytest.param("cuda", marks=pytest.mark.skip(reason=why_no_cuda()))]
    metafunc.parametrize("path", paths)
