"""Where NVIDIA's libraries are looked for (csrc/kernels/library.c), and what is said of those that
are not there. Needs no GPU: the file is compiled by itself and looks for libraries made here."""

from __future__ import annotations

import ctypes as ct
import os
import platform
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VARIABLE = "MILPY_TEST_LIBRARY"
NEW, OLD = "libmilpytest.so.2", "libmilpytest.so.1"
TARGET = "sbsa-linux" if platform.machine() == "aarch64" else "x86_64-linux"
# Of a toolkit, as tools/find_cuda.sh accepts them to build with.
LAYOUTS = ["lib64", "lib", f"targets/{TARGET}/lib"]


class Finder:
    def __init__(self, path: Path) -> None:
        self._core = ct.CDLL(str(path))
        self._core.mil_status_message.restype = ct.c_char_p

    def add(self, folder: Path) -> None:
        self._core.mil_cuda_add_library_dir(str(folder).encode())

    def problem(self) -> str:
        """ "" where it opened one."""
        handle = ct.c_void_p()
        names = (ct.c_char_p * 3)(NEW.encode(), OLD.encode(), None)
        status = self._core.mil_cuda_library_open(ct.byref(handle), VARIABLE.encode(), names)
        assert (status == 0) == (handle.value is not None)
        return "" if status == 0 else str(self._core.mil_status_message().decode())


@pytest.fixture
def finder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Finder:
    """One that nothing was added to."""
    path = tmp_path / "finder.so"
    sources = [str(ROOT / "csrc" / name) for name in ("kernels/library.c", "base/status.c")]
    compiler = os.environ.get("CC", "cc").split()
    flags = ["-std=c11", "-D_GNU_SOURCE=", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*compiler, *flags, *sources, "-o", str(path)], check=True)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    monkeypatch.delenv(VARIABLE, raising=False)
    return Finder(path)


def test_a_missing_library_is_told_with_every_place_tried(finder: Finder, tmp_path: Path) -> None:
    finder.add(tmp_path / "wheel")
    layouts = f"{{{','.join(LAYOUTS)}}}"
    tried = f"{tmp_path}/toolkit/{layouts}, /usr/local/cuda/{layouts}, {tmp_path}/wheel"
    assert finder.problem() == f"cuda: found no {NEW} or {OLD}; tried the system's places, {tried}"


@pytest.mark.parametrize("folder", [*(f"toolkit/{layout}" for layout in LAYOUTS), "wheel"])
@pytest.mark.parametrize("name", [NEW, OLD])
def test_a_library_is_found_where_it_is(
    finder: Finder, tmp_path: Path, folder: str, name: str
) -> None:
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "finder.so").rename(tmp_path / folder / name)
    finder.add(tmp_path / "wheel")
    assert finder.problem() == ""


def test_a_toolkit_is_looked_through_in_order(finder: Finder, tmp_path: Path) -> None:
    """Up to the first file that is there. One that does not load is told once: the folders are
    links to one another as a rule."""
    folders = [tmp_path / "toolkit" / layout for layout in LAYOUTS]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / NEW).write_text("no library")
    for folder in folders:
        assert finder.problem().count("; ") == 2
        assert f"; {folder}/{NEW}: " in finder.problem()
        (folder / NEW).unlink()
    assert finder.problem().count("; ") == 1


def test_a_file_that_does_not_load_is_told_with_the_reason(finder: Finder, tmp_path: Path) -> None:
    (tmp_path / "wheel").mkdir()
    (tmp_path / "wheel" / NEW).write_text("no library")
    finder.add(tmp_path / "wheel")
    assert f"; {tmp_path}/wheel/{NEW}: " in finder.problem()


def test_files_that_do_not_load_give_way_and_each_is_told(finder: Finder, tmp_path: Path) -> None:
    """With a reason of its own for each, whatever folder and name."""
    files = [tmp_path / "toolkit/lib64" / NEW, tmp_path / "wheel" / OLD]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("no library")
    finder.add(tmp_path / "wheel")
    problem = finder.problem()
    assert all(f"; {file}: " in problem for file in files)
    (tmp_path / "finder.so").rename(tmp_path / "toolkit/lib64" / OLD)
    assert finder.problem() == ""


def test_a_named_file_is_the_only_one_tried(
    finder: Finder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wheel").mkdir()
    (tmp_path / "finder.so").rename(tmp_path / "wheel" / NEW)
    finder.add(tmp_path / "wheel")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "other.so"))
    assert finder.problem().startswith(f'cuda: {VARIABLE} is "{tmp_path}/other.so": ')
    monkeypatch.setenv(VARIABLE, str(tmp_path / "wheel" / NEW))
    assert finder.problem() == ""
