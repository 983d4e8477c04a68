"""What the tests, tools/test_gpu.py and the Makefile take for a GPU."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import devices

ROOT = Path(__file__).parents[2]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a machine without a GPU."""
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").touch()
    monkeypatch.setattr(devices, "ROOT", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


def test_each_device_file_is_a_gpu(root: Path) -> None:
    assert devices.gpu_count() == 0
    for n in range(12):
        (root / f"dev/nvidia{n}").touch()
        assert devices.gpu_count() == n + 1


@pytest.mark.parametrize(
    ("names", "n"), [("", 0), ("1", 1), ("0,1", 2), ("GPU-a, GPU-b,GPU-c", 2), ("0,-1,1", 1)]
)
def test_hidden_ones_do_not_count(
    root: Path, names: str, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(2):
        (root / f"dev/nvidia{i}").touch()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", names)
    assert devices.gpu_count() == n


@pytest.mark.parametrize("place", devices.DRIVERS)
def test_elsewhere_the_driver_is_asked(
    root: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "shown_by_driver", lambda: 2)
    assert devices.gpu_count() == 0
    path = root / place.replace("*", "x86_64-linux-gnu")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    assert devices.gpu_count() == 2


DRIVER = """
int cuInit(unsigned flags) { (void)flags; return STATUS; }
int cuDeviceGetCount(int *n) { *n = 3; return 0; }
"""


@pytest.mark.parametrize(("status", "n"), [(0, 3), (100, 0)])
def test_a_driver_without_a_device_shows_none(
    tmp_path: Path, status: int, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, library = tmp_path / "driver.c", tmp_path / "driver.so"
    source.write_text(DRIVER)
    compiler = os.environ.get("CC", "cc").split()
    command = [*compiler, f"-DSTATUS={status}", "-shared", "-fPIC", source, "-o", library]
    subprocess.run(command, check=True)
    opened = ctypes.CDLL(str(library))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: {"libcuda.so.1": opened}[name])
    assert devices.shown_by_driver() == n


def test_the_places_are_those_where_the_build_looks() -> None:
    (loop,) = re.findall(r"for path in (.*?); do", (ROOT / "tools/find_cuda.sh").read_text(), re.S)
    places = [f"/{place}" for place in (devices.DEVICES, *devices.DRIVERS)]
    assert loop.replace("\\\n", " ").split() == places


def test_make_is_told_the_number_or_nothing() -> None:
    command = [sys.executable, "tests/helpers/devices.py"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.strip() == str(devices.gpu_count() or "")
