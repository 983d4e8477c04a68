"""The sdist holds all that a build of the extension reads, with CUDA and without.

It once left csrc/kernels' .cu files and tools/find_cuda.sh out: what was installed from it had no
CUDA backend, and said no more of it than "sh: cannot open tools/find_cuda.sh".
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILD = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"


@pytest.fixture(scope="module")
def tracked() -> set[str]:
    """The files of this tree that git knows: what is built beside them is nobody's source."""
    if shutil.which("git") is None:
        pytest.skip("needs git: found none on PATH")
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"needs git's list of files: {done.stderr.strip()}")
    return {name for name in done.stdout.split("\0") if (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def held(tracked: set[str], tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The files of an sdist of this tree, built offline in a copy: setuptools writes beside it."""
    folder = tmp_path_factory.mktemp("sdist")
    for name in tracked:
        copy = folder / "tree" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-c", BUILD, str(folder)]
    done = subprocess.run(command, cwd=folder / "tree", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (archive,) = folder.glob("milpy-*.tar.gz")
    with tarfile.open(archive) as file:
        return {member.name.partition("/")[2] for member in file if member.isfile()}


@pytest.mark.parametrize("folder", ["csrc/", "milpy/"])
def test_every_source_is_in_the_sdist(tracked: set[str], held: set[str], folder: str) -> None:
    assert sorted(name for name in tracked - held if name.startswith(folder)) == []


def test_what_make_needs_to_build_is_in_the_sdist(held: set[str]) -> None:
    scripts = re.findall(r"\bsh (tools/\w+\.sh)", (ROOT / "Makefile").read_text())
    assert "tools/find_cuda.sh" in scripts
    assert {"Makefile", "setup.py", "pyproject.toml", *scripts} - held == set()
