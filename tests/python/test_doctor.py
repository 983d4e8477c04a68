"""What is told of GPUs: by `milpy doctor`, and at load where device auto is the CPU."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.devices import gpu_count

import milpy
from milpy import _C, LLM, doctor, loading
from milpy.errors import EngineError, MilpyError
from milpy.wheels import add_library_dirs

PACKAGE = Path(milpy.__file__).parent


def run(*arguments: str, **variables: str) -> str:
    """stdout and stderr of a fresh Python."""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), **variables}
    done = subprocess.run(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120, env=environment,
    )  # fmt: skip
    return done.stdout


def values_of(report: str, name: str) -> list[str]:
    pairs = (line.split(maxsplit=1) for line in report.splitlines())
    return [pair[1] for pair in pairs if len(pair) == 2 and pair[0] == name]


def problem_of_gpus() -> str:
    """Why no GPU can be used here; "" where one can."""
    try:
        _C.gpu_reports()
    except MilpyError as problem:
        return str(problem)
    return ""


# ---- what a report's lines say ----


def test_a_gpu_that_runs_is_told_with_what_runs_there() -> None:
    gpu = {
        "name": "NVIDIA H200", "compute_capability": 90, "driver_cuda": 13020, "build_cuda": 13000,
        "total_bytes": 140 << 30, "problem": "", "free_bytes": 139 << 30, "kernels": "Hopper's own",
        "cublaslt_version": 130105, "cublaslt_path": "/a/libcublasLt.so.13",
    }  # fmt: skip
    assert list(doctor.gpu_lines(gpu)) == [
        "NVIDIA H200, compute capability 9.0",
        "can be used; 139.0 GiB of 140.0 GiB are free",
        "kernels: Hopper's own",
        "cuBLASLt 13.1.5 in /a/libcublasLt.so.13",
    ]
    gpu |= {"problem": "cuda: found no libcublasLt.so.13", "compute_capability": 86}
    assert list(doctor.gpu_lines(gpu)) == [
        "NVIDIA H200, compute capability 8.6",
        "cannot run: cuda: found no libcublasLt.so.13",
    ]


def test_a_cuda_version_reads_as_nvidia_writes_it() -> None:
    assert [doctor.cuda_version(n) for n in (11000, 12090, 13020)] == [
        "CUDA 11.0", "CUDA 12.9", "CUDA 13.2",
    ]  # fmt: skip


# ---- where none can be used ----


@pytest.mark.skipif(_C.HAS_CUDA, reason="this build has CUDA")
def test_a_build_without_cuda_says_so_and_how_to_get_one() -> None:
    report = run("-m", "milpy", "doctor")
    (line,) = values_of(report, "cuda")
    assert line.startswith("cannot run: this build has no CUDA")
    assert "device auto      cpu\n" in report
    # No use where there is no GPU.
    assert ("for one: nvcc" in line) == (gpu_count() > 0)
    for ask in (_C.gpu_reports, _C.find_gpu):
        with pytest.raises(EngineError, match="this build has no CUDA"):
            ask()


@pytest.mark.parametrize("has_gpu", [False, True])
def test_a_model_that_auto_puts_on_the_cpu_says_why(
    model: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    has_gpu: bool,
) -> None:
    """A warning where there is a GPU, which somebody may have counted on."""
    reason = problem_of_gpus()
    if not reason:
        pytest.skip("a GPU can be used here")
    if has_gpu:
        (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(loading, "DEVICE_FILES", tmp_path)
    with caplog.at_level(logging.INFO, "milpy"), LLM(model, device="auto", progress=False):
        pass
    (record,) = (r for r in caplog.records if r.message.startswith("device auto is the CPU: "))
    assert record.message.endswith(reason)
    assert record.levelname == ("WARNING" if has_gpu else "INFO")


def test_a_model_that_is_asked_onto_the_cpu_says_nothing(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "milpy"), LLM(model, device="cpu", progress=False):
        pass
    assert "is the CPU" not in caplog.text


# ---- on a GPU ----


@pytest.mark.gpu
def test_doctor_tells_what_runs_on_each_gpu() -> None:
    report = run("-m", "milpy", "doctor", MILPY_CUDA_PATH="")
    gpus = _C.gpu_reports()
    assert " in this build, CUDA 1" in values_of(report, "cuda")[0]
    assert f"device auto      cuda:{_C.find_gpu()}\n" in report
    for ordinal in range(len(gpus)):
        name, memory, kernels, library = values_of(report, f"cuda:{ordinal}")
        assert name.startswith(gpus[ordinal]["name"]) and ", compute capability " in name
        assert "be used; " in memory and memory.endswith(" are free")
        assert kernels.startswith(("kernels: Hopper's own", "kernels: portable: Hopper's own want"))
        assert library.startswith("cuBLASLt 1") and "/libcublasLt.so.1" in library


@pytest.mark.gpu
def test_the_portable_kernels_run_where_the_environment_asks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    add_library_dirs(_C.add_library_dir)
    monkeypatch.setenv("MILPY_CUDA_PATH", "portable")
    gpu = _C.gpu_reports()[0]
    says_so = gpu["kernels"] == "portable, as MILPY_CUDA_PATH says"
    assert says_so or gpu["compute_capability"] != 90


@pytest.mark.gpu
def test_a_cublaslt_that_is_not_there_is_told_with_its_path(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILPY_CUBLASLT", "/nonexistent/libcublasLt.so.13")
    expected = 'cuda: MILPY_CUBLASLT is "/nonexistent/libcublasLt.so.13": '
    gpu = _C.gpu_reports()[0]
    assert gpu["problem"].startswith(expected) and gpu["name"]
    for device in ("cuda", "auto"):
        with pytest.raises(EngineError, match=expected):
            LLM(model, device=device, progress=False)
