"""A build with CUDA where no GPU can be used: it is imported, says why not, and serves on the CPU.

The build is `make cuda`'s, which lies beside the one in milpy/ and may be older than it: CI makes
it, then sets MILPY_TEST_CUDA_BUILD=1.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXTENSION = ROOT / "build/with-cuda/milpy" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"

# A driver that runs CUDA 11.0 and has nothing newer.
OLD_DRIVER = """
int cuDriverGetVersion(int *version) { *version = 11000; return 0; }
int cuInit(unsigned flags) { (void)flags; return 0; }
int cuGetProcAddress(const char *symbol, void **to, int version, unsigned long long flags)
{ (void)symbol; (void)version; (void)flags; *to = 0; return 500; /* CUDA_ERROR_NOT_FOUND */ }
"""

FIRST = f"""
from helpers.order_workload import use_extension
use_extension({str(EXTENSION)!r})
from milpy import LLM, SamplingParams, _C, cli, demo
assert _C.__file__ == {str(EXTENSION)!r}
prompt = demo.format_request(demo.requests()[0]["text"])

def answer(device):
    with LLM(demo.BASE, device=device, progress=False, n_threads=2) as llm:
        outputs = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=16), use_tqdm=False)
        return llm.stats()["device"], list(outputs[0].outputs[0].token_ids)
"""


@pytest.fixture(scope="module", autouse=True)
def build() -> None:
    if os.environ.get("MILPY_TEST_CUDA_BUILD") != "1":
        pytest.skip("needs `make cuda` just before: MILPY_TEST_CUDA_BUILD=1 is not set")
    assert EXTENSION.exists(), f"found no {EXTENSION}"


@pytest.fixture(scope="module")
def why() -> str:
    """What is missing here, once a GPU that may be there is hidden."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "cuda: found no NVIDIA driver (libcuda.so.1)"
    return "cuda: the driver shows no device"


def run(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: this one may have the other extension."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    env = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", **variables}
    return subprocess.run(
        [sys.executable, "-c", FIRST + code], env=env, capture_output=True, text=True
    )


def test_doctor_says_why_cuda_is_not_used(why: str) -> None:
    done = run("raise SystemExit(cli.main(['doctor']))")
    assert done.returncode == 0, done.stderr
    assert why in done.stdout


def test_a_driver_that_is_too_old_is_told_with_its_version(tmp_path: Path) -> None:
    source, library = tmp_path / "driver.c", tmp_path / "libcuda.so.1"
    source.write_text(OLD_DRIVER)
    compiler = os.environ.get("CC", "cc").split()
    subprocess.run([*compiler, "-shared", "-fPIC", source, "-o", library], check=True)
    places = f"{tmp_path}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    done = run("raise SystemExit(cli.main(['doctor']))", LD_LIBRARY_PATH=places)
    assert done.returncode == 0, done.stderr
    says = "cannot run: cuda: the NVIDIA driver is for CUDA 11.0, expected CUDA 1"
    assert says in done.stdout


def test_cuda_is_refused_by_name(why: str) -> None:
    done = run("answer('cuda')")
    assert done.returncode == 1
    assert f"EngineError: {why}" in done.stderr


def test_auto_serves_on_the_cpu() -> None:
    done = run("print(*answer('auto'), answer('cpu') == answer('auto'))")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("cpu [") and done.stdout.endswith("] True\n")
