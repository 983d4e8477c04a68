"""A test of this room that takes `path` without saying which runs on each path of the GPU."""

import pytest
from helpers.cpu_shim import cuda_paths, why_no_cuda
from helpers.gpu import may_skip


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    asked = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    if "path" not in metafunc.fixturenames or "path" in asked:
        return
    paths: list[object] = list(cuda_paths())
    if not paths:
        # What may not skip runs, and fails by its own words.
        why = why_no_cuda()
        marks = [pytest.mark.skip(reason=why)] if may_skip(why) else []
        paths = [pytest.param("cuda", marks=marks)]
    metafunc.parametrize("path", paths)
