"""A test of this room that takes `path` without saying which runs on each path of the GPU."""

import pytest
from helpers.cpu_shim import cuda_paths, why_no_cuda


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    asked = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    if "path" not in metafunc.fixturenames or "path" in asked:
        return
    paths: list[object] = list(cuda_paths())
    if not paths:
        paths = [pytest.param("cuda", marks=pytest.mark.skip(reason=why_no_cuda()))]
    metafunc.parametrize("path", paths)
