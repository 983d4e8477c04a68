"""csrc/kernels/cublaslt.h against NVIDIA's cublasLt.h, where a toolkit or wheel brings that."""

import importlib.util
import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = ROOT / "csrc/kernels/cublaslt.h"


def wheel_includes() -> list[Path]:
    spec = importlib.util.find_spec("nvidia")
    roots = [] if spec is None else list(spec.submodule_search_locations or [])
    return [path for root in roots for path in Path(root).glob("*/include")]


def include_dirs() -> list[Path]:
    """CUDA's headers first."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    named = os.environ.get("MILPY_TEST_CUBLAS_INCLUDE")
    return [Path(home, "include"), *([Path(named)] if named else []), *wheel_includes()]


def found_dirs() -> list[Path]:
    dirs = [path for path in include_dirs() if path.is_dir()]
    if not any((path / "library_types.h").exists() for path in dirs):
        pytest.skip("found no CUDA headers (library_types.h)")
    if not any((path / "cublasLt.h").exists() for path in dirs):
        pytest.skip(f"found no cublasLt.h in {', '.join(map(str, dirs))}")
    return dirs


def compiled(source: str, *options: str) -> str:
    """What the compiler answers on stdout."""
    flags = [flag for path in found_dirs() for flag in ("-isystem", str(path))]
    compiler = os.environ.get("CC", "cc").split()
    command = [*compiler, "-x", "c", "-std=c11", "-D_GNU_SOURCE=", f"-I{ROOT}/csrc", *flags]
    done = subprocess.run(
        [*command, *options, "-"], input=source, text=True, check=True, stdout=subprocess.PIPE
    )
    return done.stdout


def values(tmp_path: Path, include: str) -> str:
    """What a program prints of every constant and struct that our header declares."""
    text = re.sub(r"/\*.*?\*/", "", OURS.read_text(), flags=re.S)
    names = re.findall(r"\b(CUBLAS\w+)\s*=", text)
    assert len(names) > 10
    lines = [f'printf("{name} %d\\n", (int){name});' for name in names]
    for member in ("workspaceSize", "state", "wavesCount", "reserved"):
        lines.append(
            f'printf("{member} %zu\\n", offsetof(cublasLtMatmulHeuristicResult_t, {member}));'
        )
    lines.append('printf("%zu\\n", sizeof(cublasLtMatmulHeuristicResult_t));')
    source = f"#include {include}\n#include <stdio.h>\nint main(void) {{ {' '.join(lines)} }}\n"
    program = tmp_path / re.sub(r"\W", "", include)
    compiled(source, "-o", str(program))
    return subprocess.run([program], check=True, capture_output=True, text=True).stdout


def test_our_constants_are_the_librarys(tmp_path: Path) -> None:
    assert values(tmp_path, '"kernels/cublaslt.h"') == values(tmp_path, "<cublasLt.h>")


def test_calls_compile_to_the_same_code_with_either_header() -> None:
    """Argument types included: a 32-bit integer for a 64-bit one would show."""
    ours = (ROOT / "csrc/kernels/cublas.c").read_text()
    theirs = ours.replace('#include "kernels/cublaslt.h"', "#include <cublasLt.h>")
    assert theirs != ours
    options = ("-S", "-O1", "-Werror", "-o", "-")
    # Labels are numbered by what the headers declare.
    code = [re.sub(r"\.L[A-Z]*\d+", ".L", compiled(x, *options)) for x in (ours, theirs)]
    assert code[0] == code[1]
