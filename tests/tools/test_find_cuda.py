"""tools/find_cuda.sh on machines made of a few files: what it finds, what it says is missing, and
what make does with either. Nothing here is of cuBLAS: no build needs it.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NVCC = """#!/bin/sh
case $1 in
--version) echo "Cuda compilation tools, release {version}, V{version}.88" ;;
--dryrun) echo '#$ TOP={home}/{top}' >&2 ;;
esac
"""
DRIVERS = ["dev/nvidia0", "dev/dxg", "usr/lib/x86_64-linux-gnu/libcuda.so.1"]
MULTIARCH = f"lib/{platform.machine()}-linux-gnu"
TARGET = f"targets/{'sbsa' if platform.machine() == 'aarch64' else platform.machine()}-linux"


def write(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


class Machine:
    """Has g++ and a Python without wheels. Every absolute path in the script is below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        bare = root / "bin"
        bare.mkdir()
        for name in ("sh", "sed", "grep", "uname"):
            (bare / name).symlink_to(str(shutil.which(name)))
        write(bare / "g++", "#!/bin/sh\n")
        self.env = {k: v for k, v in os.environ.items() if k == "LD_LIBRARY_PATH"}
        self.env["PATH"] = str(bare)
        venv.create(root / "venv", symlinks=True)
        self.python = root / "venv/bin/python"
        (self.site,) = (root / "venv").glob("lib/python*/site-packages")
        text = (ROOT / "tools/find_cuda.sh").read_text()
        text = re.sub(r"(?<= )/(?=dev/nvidia|dev/dxg|usr\b)", f"{root}/", text)
        write(root / "tree/tools/find_cuda.sh", text)

    def toolkit(
        self, folder: str, version: str = "13.0", lib: str = "lib64", top: str = "bin/.."
    ) -> Path:
        """As NVIDIA lays one out, but for `lib`, and for what its nvcc takes for its `top`."""
        home = self.root / folder
        write(home / "bin/nvcc", NVCC.format(version=version, home=home, top=top))
        self.headers(folder, version)
        write(home / lib / "libcudart_static.a")
        write(home / "include/cccl/nv/target")
        return home

    def headers(self, folder: str, version: str) -> None:
        major, minor = version.split(".")
        number = int(major) * 1000 + int(minor) * 10
        header = self.root / folder / "include/cuda_runtime_api.h"
        write(header, f"#define CUDART_VERSION  {number}\n")

    def put_on_path(self, folder: Path) -> None:
        self.env["PATH"] += f":{folder}"

    def find(self, *mode: str) -> tuple[str, str]:
        """What it prints, and what it says."""
        script = self.root / "tree/tools/find_cuda.sh"
        command = ["sh", str(script), *(mode and [*mode, str(self.python)])]
        done = subprocess.run(command, env=self.env, capture_output=True, text=True)
        assert done.returncode == 0
        return done.stdout, done.stderr

    def run_make(
        self, *arguments: str, python: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        shutil.copy(ROOT / "Makefile", self.root / "tree")
        write(self.root / "tree/csrc/base/file.c")
        return subprocess.run(
            [str(shutil.which("make")), *arguments, f"PYTHON={python or self.python}"],
            cwd=self.root / "tree",
            env=self.env,
            capture_output=True,
            text=True,
        )

    def make(self, *variables: str) -> tuple[int, str, str]:
        """Its status, what it takes for CUDA, and what it says."""
        show = "--eval=show-cuda: ; $(info $(FOUND_CUDA)) @:"
        done = self.run_make(show, "show-cuda", *variables)
        return done.returncode, done.stdout.strip(), done.stderr

    def links(self, *variables: str) -> list[str]:
        """What it would say of what it links for `make ext chaos` and the shim."""
        for folder in ("csrc", "tests/chaos", "tests/shim"):
            shutil.copytree(ROOT / folder, self.root / "tree" / folder)
        wanted = ["ext", "chaos", "build/tests/libshim.so", "NUMPY_INCLUDE=none"]
        done = self.run_make("-n", *wanted, *variables)
        assert done.returncode == 0, done.stderr
        return re.findall(r'echo "  link (.*)"', done.stdout)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def answer(home: Path, lib: str = "lib64", root: str = "bin/..") -> str:
    return f"{home}/bin/nvcc {home}/{root}/include {home}/{root}/{lib}\n"


# ---- modes ----


def test_0_builds_none_whatever_there_is(machine: Machine) -> None:
    machine.toolkit("usr/local/cuda")
    write(machine.root / "dev/nvidia0")
    assert machine.find("0") == ("", "")


@pytest.mark.parametrize("mode", [[], ["auto"], [""]])
def test_auto_without_a_gpu_builds_none_and_is_silent(machine: Machine, mode: list[str]) -> None:
    machine.toolkit("usr/local/cuda")
    assert machine.find(*mode) == ("", "")


@pytest.mark.parametrize("driver", DRIVERS)
def test_auto_takes_the_toolkit_where_there_is_a_gpu_or_driver(
    machine: Machine, driver: str
) -> None:
    home = machine.toolkit("usr/local/cuda")
    write(machine.root / driver)
    assert machine.find("auto") == (answer(home), "")


def test_1_takes_the_toolkit_without_a_gpu(machine: Machine) -> None:
    home = machine.toolkit("usr/local/cuda")
    assert machine.find("1") == (answer(home), "")


def test_a_gpu_without_a_toolkit_is_told_what_is_missing(machine: Machine) -> None:
    """Under auto the build goes on without CUDA; under 1 it ends."""
    write(machine.root / "dev/nvidia0")
    printed, says = machine.find("auto")
    assert printed == ""
    assert says.startswith("milpy: CUDA: found no nvcc on PATH, in ")
    assert f"among the wheels of {machine.python}, and CUDA_HOME is not set; expected " in says
    for package in ("cuda-nvcc", "cuda-cudart-dev", "nvidia-{cuda-nvcc,cuda-cccl,"):
        assert f" {package}" in says
    assert machine.find("1") == ("error\n", says)


def test_another_mode_is_refused_by_name(machine: Machine) -> None:
    expected = 'milpy: MILPY_CUDA is "yes", expected auto, 0 or 1\n'
    assert machine.find("yes") == ("error\n", expected)


# ---- where it looks ----


@pytest.mark.parametrize("lib", ["lib64", "lib", MULTIARCH, f"{TARGET}/lib"])
def test_the_runtime_is_found_in_every_layout(machine: Machine, lib: str) -> None:
    home = machine.toolkit("usr/local/cuda", lib=lib)
    assert machine.find("1") == (answer(home, lib), "")


def test_the_first_nvcc_is_taken(machine: Machine) -> None:
    """CUDA_HOME's, PATH's, the system's, the wheels': each brings its own headers and runtime."""
    wheels = machine.site.relative_to(machine.root) / "nvidia/cu13"
    folders = ["home", "opt", "usr/local/cuda"]
    homes = [machine.toolkit(folder) for folder in folders]
    homes += [machine.toolkit(str(wheels), lib="lib")]
    machine.env["CUDA_HOME"] = str(homes[0])
    machine.put_on_path(homes[1] / "bin")
    for home in homes:
        assert machine.find("1") == (answer(home, "lib" if home == homes[3] else "lib64"), "")
        shutil.rmtree(home)
        machine.env.pop("CUDA_HOME", "")
    assert machine.find("1")[0] == "error\n"


@pytest.mark.parametrize(("mode", "printed"), [("1", "error\n"), ("auto", "")])
def test_a_cuda_home_without_nvcc_is_told_and_no_other_taken(
    machine: Machine, mode: str, printed: str
) -> None:
    """PATH's was taken without a word."""
    write(machine.root / "dev/nvidia0")
    machine.put_on_path(machine.toolkit("opt") / "bin")
    machine.env["CUDA_HOME"] = "/nope"
    says = "milpy: CUDA: found no bin/nvcc in CUDA_HOME (/nope), expected a toolkit of CUDA there, "
    assert machine.find(mode) == (printed, says + "or CUDA_HOME unset\n")
    machine.env["CUDA_HOME"] = ""
    assert machine.find(mode)[0] == answer(machine.root / "opt")


def test_condas_toolkit_is_found(machine: Machine) -> None:
    """Its nvcc takes a folder below targets/ for its toolkit; the headers are there alone."""
    home = machine.toolkit("conda", top=f"bin/../{TARGET}")
    for name in ("include", "lib64"):
        target = home / TARGET / name.replace("64", "")
        target.parent.mkdir(parents=True, exist_ok=True)
        (home / name).rename(target)
    machine.put_on_path(home / "bin")
    assert machine.find("1") == (answer(home, "lib", f"bin/../{TARGET}"), "")


def test_debians_toolkit_is_found(machine: Machine) -> None:
    home = machine.toolkit("usr", "12.4", MULTIARCH, top="lib/nvidia-cuda-toolkit")
    (home / "include/cccl/nv").rename(home / "include/nv")
    machine.put_on_path(home / "bin")
    found = f"{home}/bin/nvcc {home}/include {home}/{MULTIARCH}\n"
    assert machine.find("1") == (found, "")


def test_headers_may_come_from_the_wheels_alone(machine: Machine) -> None:
    """Where nvcc is, there are none of its version."""
    nvcc = machine.toolkit("usr/local/cuda", lib="elsewhere") / "bin/nvcc"
    machine.headers("usr/local/cuda", "12.8")
    wheels = machine.toolkit(str(machine.site.relative_to(machine.root) / "nvidia/cu13"), lib="lib")
    (wheels / "bin/nvcc").unlink()
    assert machine.find("1") == (f"{nvcc} {wheels}/include {wheels}/lib\n", "")


# ---- what does not fit ----


@pytest.mark.parametrize("version", ["11.8", "12.3"])
def test_an_old_nvcc_is_told_with_its_version(machine: Machine, version: str) -> None:
    home = machine.toolkit("usr/local/cuda", version)
    expected = f"milpy: CUDA: found nvcc {version} ({home}/bin/nvcc), expected 12.4 or newer\n"
    assert machine.find("1") == ("error\n", expected)


@pytest.mark.parametrize("version", ["12.4", "12.10", "13.0", "14.1"])
def test_a_newer_nvcc_is_taken(machine: Machine, version: str) -> None:
    home = machine.toolkit("usr/local/cuda", version)
    assert machine.find("1") == (answer(home), "")


def test_an_nvcc_that_does_not_run_is_told(machine: Machine) -> None:
    home = machine.toolkit("usr/local/cuda")
    write(home / "bin/nvcc", "#!/bin/sh\nexit 1\n")
    printed, says = machine.find("1")
    assert printed == "error\n"
    assert f"found nvcc ?.? ({home}/bin/nvcc), expected 12.4 or newer" in says


MISSING = {
    "bin/g++": ["found no g++", "expected g++"],
    "cuda/include/cuda_runtime_api.h": [
        "found no cuda_runtime_api.h of CUDA 13 for ", "/cuda/bin/nvcc; expected",
        "cuda-cudart-dev", "nvidia-cuda-runtime",
    ],
    "cuda/lib64/libcudart_static.a": [
        "found no libcudart_static.a below ", "cuda-cudart-dev", "nvidia-cuda-runtime",
    ],
    "cuda/include/cccl/nv/target": ["found no nv/target in ", "cuda-cccl", "nvidia-cuda-cccl"],
}  # fmt: skip


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_piece_is_named_with_its_packages(machine: Machine, name: str) -> None:
    machine.env["CUDA_HOME"] = str(machine.toolkit("cuda"))
    (machine.root / name).unlink()
    printed, says = machine.find("1")
    assert printed == "error\n"
    assert says.startswith("milpy: CUDA: ") and says.count("\n") == 1
    assert [text for text in MISSING[name] if text not in says] == []


def test_headers_of_another_major_version_are_none(machine: Machine) -> None:
    machine.toolkit("usr/local/cuda")
    machine.headers("usr/local/cuda", "12.8")
    printed, says = machine.find("1")
    assert printed == "error\n"
    assert "found no cuda_runtime_api.h of CUDA 13 for " in says


# ---- what make does with it ----


def test_make_takes_what_is_found(machine: Machine) -> None:
    home = machine.toolkit("usr/local/cuda")
    assert machine.make("MILPY_CUDA=1") == (0, answer(home).strip(), "")


@pytest.mark.parametrize("mode", ["0", "auto", ""])
def test_make_builds_without_where_none_is_asked_for(machine: Machine, mode: str) -> None:
    """An empty MILPY_CUDA is as none."""
    machine.toolkit("usr/local/cuda")
    assert machine.make(f"MILPY_CUDA={mode}") == (0, "", "")


@pytest.mark.parametrize("mode", ["0", "auto", "1"])
def test_makes_own_variables_are_not_the_callers(machine: Machine, mode: str) -> None:
    """One was called CUDA: CUDA=0 took its place, and an error said that nothing was found."""
    home = machine.toolkit("usr/local/cuda")
    found = answer(home).strip() if mode == "1" else ""
    assert machine.make(f"MILPY_CUDA={mode}", "CUDA=0") == (0, found, "")
    machine.env["FOUND_CUDA"] = "/opt/cuda"
    assert machine.make(f"MILPY_CUDA={mode}") == (0, found, "")


@pytest.mark.parametrize(("mode", "says"), [("0", "no CUDA"), ("auto", "no CUDA"), ("1", "CUDA")])
def test_make_says_whether_cuda_is_in_what_it_links(machine: Machine, mode: str, says: str) -> None:
    """A plain `make` without a GPU took it out again, and said as little as the one before."""
    machine.toolkit("usr/local/cuda")
    links = machine.links(f"MILPY_CUDA={mode}")
    assert len(links) == 5
    assert all(re.fullmatch(rf"\S+\.so \({says}\)", link) for link in links), links


def test_make_ends_where_cuda_must_be_and_is_not(machine: Machine) -> None:
    status, _, says = machine.make("MILPY_CUDA=1")
    assert status == 2
    assert "milpy: CUDA: found no nvcc on PATH, in " in says
    assert "MILPY_CUDA=1: CUDA cannot be built here, see above" in says


def test_make_ends_where_the_script_is_missing(machine: Machine) -> None:
    """An sdist once had none, and MILPY_CUDA=1 built for the CPU alone."""
    machine.toolkit("usr/local/cuda")
    (machine.root / "tree/tools/find_cuda.sh").unlink()
    status, _, says = machine.make("MILPY_CUDA=1")
    assert status == 2
    assert "MILPY_CUDA=1: CUDA cannot be built here, see above" in says


@pytest.mark.parametrize(
    ("python", "says"),
    [
        ("/nope/python", "found no Python at /nope/python, expected 3.10 or newer"),
        ("", "found no NumPy 2 or newer in {python}"),
    ],
)
def test_a_python_that_cannot_be_built_for_is_told(
    machine: Machine, python: str, says: str
) -> None:
    """The compiler named a header, after a traceback. What needs neither goes on."""
    write(machine.root / "tree/csrc/python/module.c")
    (machine.site / "numpy").mkdir()
    write(machine.site / "numpy/__init__.py")  # NumPy 1: no _core/include
    python = python or str(machine.python)
    done = machine.run_make("-n", "ext", "MILPY_CUDA=0", python=python)
    assert done.returncode == 2
    assert says.format(python=python) in done.stderr and done.stderr.count("\n") == 1
    assert machine.run_make("-n", "lib", "MILPY_CUDA=0", python=python).returncode == 0
    write(machine.site / "numpy/_core/include/numpy/arrayobject.h")
    assert machine.run_make("-n", "ext", "MILPY_CUDA=0").returncode == 0


def test_make_cuda_looks_for_nvcc_before_pip_installs(machine: Machine) -> None:
    done = machine.run_make("-n", "cuda")
    commands = done.stdout.splitlines()
    (looks,) = (i for i, line in enumerate(commands) if "find_cuda.sh 1" in line)
    (installs,) = (i for i, line in enumerate(commands) if "pip install" in line)
    assert looks < installs


@pytest.mark.parametrize("script", ["find_cuda.sh", "sanitize.sh"])
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_a_script_tells_what_it_is_for(script: str, option: str) -> None:
    command = ["sh", str(ROOT / "tools" / script), option]
    done = subprocess.run(command, capture_output=True, text=True)
    text = (ROOT / "tools" / script).read_text()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0] in text.splitlines()[1]
    assert "case" not in done.stdout and not done.stdout.startswith("#")


def test_the_check_of_rooms_tells_what_it_wants() -> None:
    """It was a traceback."""
    command = [sys.executable, str(ROOT / "tools/check_rooms.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "library" in done.stdout and "extension" in done.stdout


def test_the_readme_installs_what_ci_compiles_with() -> None:
    """The newest ptxas is not it: CI says why."""
    pins = [
        re.findall(r"nvidia-\{[\w,-]+\}'==[\d.*]+'", (ROOT / name).read_text())
        for name in (".ci/run", "README.md", "tools/find_cuda.sh")
    ]
    assert len(pins[0]) == 1
    assert pins[0] == pins[1] == pins[2]
