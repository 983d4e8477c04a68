"""What the compiler cannot see of the house's rules. Run by `make lint`.

    python tools/check_rooms.py build/cpu/libmilpy.a milpy/_C*.so

Includes point down the list of rooms only; headers compile alone; every symbol starts mil_; the
extension exports its init function only; nothing in milpy/ can run code from a file.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Top to bottom. The backends stand outside: they implement ops/backend.h, and nobody includes them.
ROOMS = ["python", "engine", "scheduler", "model", "layers", "loader", "comm", "ops", "base"]
BACKENDS = ["cpu", "kernels"]
SOURCES = ["*.[ch]", "*.cu", "*.cuh"]
CODE_RUNNING_MODULES = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
CODE_RUNNING_CALLS = {"eval", "exec", "torch.load"}


def may_include(room: str, other: str) -> bool:
    """Whether a file of `room` may include a header of `other`."""
    if room == other or other == "milpy.h":
        # base knows no model, and milpy.h is about models; milpy.h itself needs base's status only.
        return room != "base" or other == "base"
    if other in BACKENDS:
        return False
    if room == "milpy.h":
        return other == "base"
    if room in BACKENDS:
        return other in ("ops", "base")
    return ROOMS.index(room) < ROOMS.index(other)


def room_of(path: str) -> str:
    return path.split("/")[0]


def check_includes() -> Iterator[str]:
    csrc = ROOT / "csrc"
    for path in sorted(path for kind in SOURCES for path in csrc.rglob(kind)):
        room = room_of(str(path.relative_to(csrc)))
        if room not in [*ROOMS, *BACKENDS, "milpy.h"]:
            yield f"{path}: found room {room!r}, expected one of {ROOMS + BACKENDS}"
            continue
        for found in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.M):
            if not (csrc / found).exists():
                yield f'{path}: found "{found}", expected a path below csrc/'
            elif not may_include(room, room_of(found)):
                yield f"{path}: {room} includes {found}, expected includes downwards only"


def cuda_include() -> str:
    """The toolkit's headers, "" where there is none."""
    found = subprocess.run(
        ["sh", str(ROOT / "tools/find_cuda.sh"), "1", sys.executable],
        capture_output=True,
        text=True,
    ).stdout.split()
    return found[1] if len(found) == 3 else ""


def check_headers_alone() -> Iterator[str]:
    """As C11, and as C++17 where there is a C++ compiler: nvcc reads them so. The CUDA backend's
    only where CUDA's own headers are."""
    cuda = cuda_include()
    languages = [[os.environ.get("CC", "cc"), "-x", "c", "-std=c11"]]
    if shutil.which("c++"):
        languages.append(["c++", "-x", "c++", "-std=c++17"])
    for path in sorted((ROOT / "csrc").rglob("*.h")):
        room = room_of(str(path.relative_to(ROOT / "csrc")))
        if room in ("python", "cpu") or (room == "kernels" and not cuda):
            continue
        include = ["-isystem", cuda] if room == "kernels" else []
        for language in languages:
            # Through an include, since `#pragma once` warns in a main file.
            done = subprocess.run(
                [
                    *language,
                    "-Wall",
                    "-Wextra",
                    "-Werror",
                    "-fsyntax-only",
                    f"-I{ROOT}/csrc",
                    *include,
                    "-",
                ],
                input=f'#include "{path}"\n',
                capture_output=True,
                text=True,
            )
            if done.returncode != 0:
                yield f"{path}: does not compile alone as {language[-1]}:\n{done.stderr}"


def symbols(path: str, *options: str) -> list[str]:
    out = subprocess.run(
        ["nm", "--defined-only", *options, path], check=True, capture_output=True, text=True
    ).stdout
    return [fields[2] for fields in map(str.split, out.splitlines()) if len(fields) == 3]


def check_symbols(library: str, extension: str) -> Iterator[str]:
    for name in symbols(library, "-g"):
        if not name.startswith("mil_"):
            yield f"{library}: found symbol {name}, expected names that start mil_"
    exported = symbols(extension, "-D")
    if exported != ["PyInit__C"]:
        yield f"{extension}: exports {exported}, expected PyInit__C alone"


def imported(node: ast.AST) -> list[str]:
    """Top-level names of the modules that an import statement names."""
    if isinstance(node, ast.Import):
        return [alias.name.split(".")[0] for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
        return [node.module.split(".")[0]]
    return []


def check_python() -> Iterator[str]:
    jinja2 = []
    for path in sorted((ROOT / "milpy").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            if not isinstance(node, (ast.Import, ast.ImportFrom, ast.Call)):
                continue
            names = imported(node)
            jinja2 += [f"{path}:{node.lineno}" for name in names if name == "jinja2"]
            for name in CODE_RUNNING_MODULES.intersection(names):
                yield f"{path}:{node.lineno}: imports {name}, which runs code from files"
            if isinstance(node, ast.Call) and ast.unparse(node.func) in CODE_RUNNING_CALLS:
                yield f"{path}:{node.lineno}: calls {ast.unparse(node.func)}"
    # One template function in the code base: a second one is how a sandbox is forgotten.
    if len(jinja2) != 1:
        yield f"found {len(jinja2)} imports of jinja2 ({', '.join(jinja2)}), expected exactly one"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("library", help="libmilpy.a, every symbol of which is looked at")
    parser.add_argument("extension", help="milpy._C's file")
    arguments = parser.parse_args()
    faults = [
        *check_includes(),
        *check_headers_alone(),
        *check_symbols(arguments.library, arguments.extension),
        *check_python(),
    ]
    for fault in faults:
        print(fault, file=sys.stderr)
    print(f"rooms: {len(faults)} faults")
    return len(faults) > 0


if __name__ == "__main__":
    sys.exit(main())
