"""csrc/kernels/library.c over folders of small shared libraries: which one opens, and what is said
where none does."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CC = os.environ.get("CC", "cc").split()
NAMES = ["libmilpytest.so.2", "libmilpytest.so.1"]
PROGRAM = """
#include "kernels/library.h"
#include <dlfcn.h>
#include <stdio.h>
int main(int n, char **arguments)
{
    static const char *const names[] = {"libmilpytest.so.2", "libmilpytest.so.1", NULL};
    void *handle;
    for (int i = 1; i < n; i++)
        mil_cuda_add_library_dir(arguments[i]);
    if (mil_cuda_library_open(&handle, "MILPY_TEST_LIBRARY", names) != MIL_OK)
        return printf("%s", mil_status_message()) < 0;
    printf("%d", ((int (*)(void))dlsym(handle, "which"))());
    return 0;
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program") / "open"
    sources = [str(ROOT / f"csrc/{name}.c") for name in ("kernels/library", "base/status")]
    flags = ["-std=c11", "-D_GNU_SOURCE=", f"-I{ROOT}/csrc", "-pthread", "-o", str(path)]
    command = [*CC, *flags, "-x", "c", "-", *sources, "-ldl"]
    subprocess.run(command, input=PROGRAM, text=True, check=True)
    return path


def make(folder: Path, name: str, which: int) -> Path:
    folder.mkdir(exist_ok=True)
    source = f"int which(void);\nint which(void) {{ return {which}; }}\n"
    command = [*CC, "-shared", "-fPIC", "-x", "c", "-", "-o", str(folder / name)]
    subprocess.run(command, input=source, text=True, check=True)
    return folder


def spoil(folder: Path, name: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("no library")
    return folder


def opened(program: Path, *folders: Path, **variables: str) -> str:
    done = subprocess.run(
        [program, *folders], env=os.environ | variables, check=True, stdout=subprocess.PIPE
    )
    return done.stdout.decode()


def test_the_first_name_is_taken_wherever_it_lies(program: Path, tmp_path: Path) -> None:
    old, new = make(tmp_path / "a", NAMES[1], 1), make(tmp_path / "b", NAMES[0], 2)
    assert opened(program, old, new) == "2"
    assert opened(program, old) == "1"
    # On the system's own search path too.
    assert opened(program, old, LD_LIBRARY_PATH=str(new)) == "2"
    assert opened(program, new, LD_LIBRARY_PATH=str(old)) == "2"


def test_a_file_that_does_not_load_gives_way_to_the_next(program: Path, tmp_path: Path) -> None:
    spoilt, old = spoil(tmp_path / "a", NAMES[0]), make(tmp_path / "b", NAMES[1], 1)
    assert opened(program, spoilt, old) == "1"


def test_where_none_opens_every_place_and_every_files_answer_is_named(
    program: Path, tmp_path: Path
) -> None:
    a, b = spoil(tmp_path / "a", NAMES[0]), spoil(tmp_path / "b", NAMES[1])
    text = opened(program, a, b, LD_LIBRARY_PATH=str(spoil(tmp_path / "c", NAMES[0])))
    assert text.startswith(f"cuda: found no {NAMES[0]} or {NAMES[1]}; tried the system's places")
    assert f", {a}, {b}; " in text
    for file in (a / NAMES[0], b / NAMES[1], tmp_path / "c" / NAMES[0]):
        assert f"; {file}: " in text


def test_the_variable_names_the_file_and_nothing_else(program: Path, tmp_path: Path) -> None:
    folder = make(tmp_path / "a", NAMES[0], 2)
    other = make(tmp_path / "b", "other.so", 7) / "other.so"
    assert opened(program, folder, MILPY_TEST_LIBRARY=str(other)) == "7"
    text = opened(program, folder, MILPY_TEST_LIBRARY=str(tmp_path / "none.so"))
    assert text.startswith(f'cuda: MILPY_TEST_LIBRARY is "{tmp_path / "none.so"}": ')
