"""milpy doctor: what was found, what is missing, what will be used."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from milpy import __version__
from milpy.errors import MilpyError

if TYPE_CHECKING:
    from milpy._C import _GpuReport

PACKAGES = ("numpy", "tokenizers", "huggingface_hub", "jinja2", "tqdm")
CHECKOUT_PACKAGES = ("ml_dtypes", "pytest", "torch", "transformers", "peft")
OLDEST_PYTHON = (3, 10)
CUDA_BUILD = "; for one: nvcc 12.4 or newer and g++, then make, or pip install -e ."

# The core refuses other values, the CUDA ones where a GPU is opened.
SWITCHES = {
    "MILPY_CHECK": ("0", "1"),
    "MILPY_POISON": ("0", "1"),
    "MILPY_CUDA_PATH": ("portable",),
    "MILPY_CUDA_PDL": ("0", "1"),
    "MILPY_CUDA_SIDE": ("0", "1"),
}

Line = tuple[str, str]


def show_report() -> int:
    """Print the report. 1 where milpy cannot run here, else 0."""
    problems: list[str] = []
    for name, value in _lines(problems):
        print(f"{name:<16} {value}")
    for problem in problems:
        print(f"{'MISSING':<16} {problem}")
    return 1 if problems else 0


def _lines(problems: list[str]) -> Iterator[Line]:
    yield "milpy", f"{__version__} in {Path(__file__).parent}"
    yield from _python(problems)
    yield "platform", f"{platform.system()} {platform.release()}, {platform.machine()}"
    yield "cpu", _cpu_name()
    yield from _extension(problems)
    for package in PACKAGES:
        yield package, _version(package) or "not installed"
        if _version(package) is None:
            problems.append(f"{package}: pip install {package}")
    found = [f"{name} {_version(name)}" for name in CHECKOUT_PACKAGES if _version(name)]
    yield "for tests", ", ".join(found) or "none of " + ", ".join(CHECKOUT_PACKAGES)
    yield "gpu", _gpu()
    yield from _cuda()
    yield "demo model", _demo()
    yield "environment", _environment()


def _python(problems: list[str]) -> Iterator[Line]:
    yield "python", f"{platform.python_version()} in {sys.executable}"
    if sys.version_info < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        problems.append(f"python is {platform.python_version()}, expected {oldest} or newer")


def _extension(problems: list[str]) -> Iterator[Line]:
    """The C core, and what it says of this machine."""
    try:
        from milpy import _C  # noqa: PLC0415 - its absence is a finding here
    except ImportError as problem:
        yield "extension", f"cannot be imported: {problem}"
        problems.append("the extension milpy._C: run make, or pip install -e .")
        return
    yield "extension", str(_C.__file__)
    try:
        report = _C.machine_report()
    except MilpyError as problem:
        yield "isa", str(problem)
        problems.append(f"an instruction set that can be used: {problem}")
        return
    quota = report["cgroup_cpus"]
    yield "isa", f"{report['isa']} will be used, of {report['isa_available']}"
    yield "threads", f"{report['n_threads']} will be used"
    yield "cpus", f"{report['n_cpus_affinity']} by affinity, cgroup quota {quota or 'none'}"
    memory, free = report["memory_bytes"] / 2**30, report["memory_free_bytes"] / 2**30
    yield "memory", f"{memory:.1f} GiB for this process, {free:.1f} GiB free"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return "unknown"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    """WSL shows all of them as dxg."""
    patterns = ("nvidia[0-9]*", "dxg")
    return sorted(path.name for pattern in patterns for path in Path("/dev").glob(pattern))


def _gpu() -> str:
    devices = _devices()
    return ", ".join(devices) if devices else "found no /dev/nvidia0"


def _cuda() -> Iterator[Line]:
    """Whether the CUDA backend can run, with what, and why not."""
    try:
        from milpy import _C, wheels  # noqa: PLC0415 - its absence was told before
    except ImportError:
        yield "cuda", "cannot run: no extension"
        return
    wheels.add_library_dirs(_C.add_library_dir)
    try:
        gpus = _C.gpu_reports()
    except MilpyError as problem:
        advice = CUDA_BUILD if _devices() and not _C.HAS_CUDA else ""
        yield "cuda", f"cannot run: {problem}{advice}"
        yield "device auto", "cpu"
        return
    driver, build = (cuda_version(gpus[0][key]) for key in ("driver_cuda", "build_cuda"))
    yield "cuda", f"{build} in this build, {driver} in the driver"
    for ordinal, gpu in enumerate(gpus):
        for line in gpu_lines(gpu):
            yield f"cuda:{ordinal}", line
    yield "device auto", auto_device(gpus)


def auto_device(gpus: list[_GpuReport]) -> str:
    """What it is. A GPU that lacks a library or memory is an error there too: it could be used."""
    from milpy import _C  # noqa: PLC0415 - its absence was told before

    try:
        ordinal = _C.find_gpu()
    except MilpyError as problem:
        return f"cpu: {problem}"
    return f"cuda:{ordinal}" + (", which cannot run" if gpus[ordinal]["problem"] else "")


def gpu_lines(gpu: _GpuReport) -> Iterator[str]:
    """What _C.gpu_reports tells of one."""
    major, minor = divmod(gpu["compute_capability"], 10)
    yield f"{gpu['name']}, compute capability {major}.{minor}"
    total, free = gpu["total_bytes"] / 2**30, gpu["free_bytes"] / 2**30
    if gpu["problem"]:
        yield f"cannot run: {gpu['problem']}"
        return
    yield f"can be used; {free:.1f} GiB of {total:.1f} GiB are free"
    yield f"kernels: {gpu['kernels']}"
    version = gpu["cublaslt_version"]
    numbers = f"{version // 10_000}.{version // 100 % 100}.{version % 100}"
    yield f"cuBLASLt {numbers} in {gpu['cublaslt_path']}"


def cuda_version(number: int) -> str:
    """13020 is CUDA 13.2."""
    return f"CUDA {number // 1000}.{number % 1000 // 10}"


def _demo() -> str:
    from milpy import demo  # noqa: PLC0415 - only here

    return str(demo.BASE) if demo.BASE.is_dir() else f"not in this package ({demo.BASE})"


def _environment() -> str:
    """Variables that change what milpy does, and those whose value it does not know."""
    names = (
        "MILPY_CPU_ISA", *SWITCHES, "MILPY_CUBLASLT", "CUDA_HOME", "CUDA_VISIBLE_DEVICES",
        "HF_HOME", "HF_HUB_OFFLINE",
    )  # fmt: skip
    return ", ".join(map(_variable, (name for name in names if name in os.environ))) or "-"


def _variable(name: str) -> str:
    value = os.environ[name]
    known = SWITCHES.get(name, (value,))
    wrong = f" (expected {' or '.join(known)})" if value and value not in known else ""
    return f"{name}={value}{wrong}"
