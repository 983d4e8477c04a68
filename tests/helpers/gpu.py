"""What a test on a GPU needs of its machine, and the one way to skip where it is lacking.

A GPU, a driver, a library or a part of the build that is not there skips with its name. A GPU or a
build that fails does not. Under MILPY_TEST_GPU=1 nothing that milpy itself needs may be lacking,
since a skip would hide that nothing was tested: tools/test_gpu.py sets it where there is a GPU.
Other people's libraries, torch and CuPy, are tried where they are: their absence skips by name
there too, and the table counts it.
"""

from __future__ import annotations

import importlib
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from milpy.errors import EngineError
from milpy.wheels import add_library_dirs

# Of csrc/ops/find.c and csrc/kernels. Any other message fails, so that one that changes is seen.
LACKS = (
    "this build has no CUDA",
    "found no NVIDIA driver",
    "the NVIDIA driver is for CUDA",
    "the driver shows no device",
    "found no libcublasLt",
    "found no /",  # a file that make builds
)


def must_have_gpu() -> bool:
    return os.environ.get("MILPY_TEST_GPU") == "1"


def may_skip(reason: str) -> bool:
    return not must_have_gpu() and any(lack in reason for lack in LACKS)


def need_cuda() -> None:
    """Where the extension finds its first GPU, nothing; skips or fails elsewhere."""
    from milpy import _C  # noqa: PLC0415 - what imports this file may run without the extension

    add_library_dirs(_C.add_library_dir)
    try:
        problem = _C.gpu_reports()[0]["problem"]
    except EngineError as none:
        problem = str(none)
    if problem:
        assert may_skip(problem), problem
        pytest.skip(problem)


def need_file(path: Path, maker: str) -> None:
    """A part of the build."""
    if not path.exists():
        reason = f"found no {path}: `{maker}` makes it"
        if must_have_gpu():
            pytest.fail(reason)
        pytest.skip(reason)


def need_library(name: str) -> Any:
    """One that is there and cannot be imported fails by its own words."""
    if find_spec(name) is None:
        pytest.skip(f"needs {name}: found none")
    return importlib.import_module(name)


def need_torch() -> Any:
    torch = need_library("torch")
    if not torch.cuda.is_available():
        pytest.skip(f"needs torch with CUDA: found {torch.__version__}")
    return torch


def need_cupy() -> Any:
    return need_library("cupy")
