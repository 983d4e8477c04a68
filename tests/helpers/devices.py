"""How many NVIDIA GPUs this machine has, as far as its driver tells without the CUDA runtime.

Run as a script it prints the number, or nothing for none: the Makefile asks so before a Python of
its own is there, hence nothing beside the standard library.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

ROOT = Path("/")
DEVICES = "dev/nvidia[0-9]*"
# Where a driver may be without those: WSL's device, and its library. As in tools/find_cuda.sh.
DRIVERS = (
    "dev/dxg",
    "usr/lib/*/libcuda.so.1",
    "usr/lib64/libcuda.so.1",
    "usr/local/nvidia/lib64/libcuda.so.1",
)


def shown_by_driver() -> int:
    """A library without a GPU is common: images hold it."""
    n = ctypes.c_int(0)
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        ok = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(n)) == 0
    except OSError:
        return 0
    return n.value if ok else 0


def shown_to_processes() -> int | None:
    """What CUDA_VISIBLE_DEVICES leaves of them; None: it is not set. -1 hides what follows."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    if names is None:
        return None
    shown = [name.strip() for name in names.split(",")] if names.strip() else []
    return shown.index("-1") if "-1" in shown else len(shown)


def gpu_count() -> int:
    n_files = sum(1 for _ in ROOT.glob(DEVICES))
    if n_files == 0 and any(any(ROOT.glob(place)) for place in DRIVERS):
        return shown_by_driver()
    n_shown = shown_to_processes()
    return n_files if n_shown is None else min(n_files, n_shown)


if __name__ == "__main__":
    print(gpu_count() or "")
