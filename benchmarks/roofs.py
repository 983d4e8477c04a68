"""The machine's roofs, measured in the same round as what they judge. See roofs.h."""

from __future__ import annotations

import ctypes
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
LIBRARY = HERE.parent / "build" / "bench" / "libroofs.so"
MIN_BUFFER_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Roofs:
    """One round's roofs, all threads together."""

    read_gbs: float
    bf16_gflops: float


def _library() -> ctypes.CDLL:
    source = HERE / "roofs.c"
    if not LIBRARY.exists() or LIBRARY.stat().st_mtime < source.stat().st_mtime:
        LIBRARY.parent.mkdir(parents=True, exist_ok=True)
        flags = ["-O2", "-std=c11", "-shared", "-fPIC", "-fvisibility=hidden", "-pthread"]
        compiler = os.environ.get("CC", "cc")
        subprocess.run([compiler, *flags, str(source), "-o", str(LIBRARY)], check=True)
    library = ctypes.CDLL(str(LIBRARY))
    pointer, size, integer = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    library.roof_buffer.restype = pointer
    library.roof_buffer.argtypes = [size]
    library.roof_read_gbs.restype = ctypes.c_double
    library.roof_read_gbs.argtypes = [pointer, size, integer, pointer]
    library.roof_copy_gbs.restype = ctypes.c_double
    library.roof_copy_gbs.argtypes = [pointer, pointer, size, integer, pointer]
    for name in ("roof_bf16_gflops", "roof_fp32_avx2_gflops"):
        getattr(library, name).restype = ctypes.c_double
        getattr(library, name).argtypes = [integer, pointer]
    return library


def last_level_cache_bytes() -> int:
    """The largest cache that the kernel reports for CPU 0; 32 MiB where it reports none."""
    largest = 32 << 20
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        factor = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1], 1)
        largest = max(largest, int(text.rstrip("KMG")) * factor)
    return largest


class Machine:
    """Measures the roofs of n_threads pinned threads, over a buffer past the cache."""

    def __init__(self, n_threads: int) -> None:
        self._library = _library()
        self.n_threads = n_threads
        allowed = sorted(os.sched_getaffinity(0))
        self._cpus = (ctypes.c_int * n_threads)(
            *(allowed[i % len(allowed)] for i in range(n_threads))
        )
        self.n_bytes = max(MIN_BUFFER_BYTES, 2 * last_level_cache_bytes())
        self._buffer = self._library.roof_buffer(self.n_bytes)
        if not self._buffer:
            raise MemoryError(f"no room for a buffer of {self.n_bytes} bytes")

    def measure(self) -> Roofs:
        return Roofs(self.read_gbs(), self.bf16_gflops())

    def read_gbs(self) -> float:
        return float(
            self._library.roof_read_gbs(self._buffer, self.n_bytes, self.n_threads, self._cpus)
        )

    def bf16_gflops(self) -> float:
        return float(self._library.roof_bf16_gflops(self.n_threads, self._cpus))

    def fp32_avx2_gflops(self) -> float:
        return float(self._library.roof_fp32_avx2_gflops(self.n_threads, self._cpus))

    def copy_gbs(self) -> float:
        """Bytes copied a second (each read and written) between the buffer's halves."""
        half = self.n_bytes // 2
        return float(
            self._library.roof_copy_gbs(
                self._buffer, self._buffer + half, half, self.n_threads, self._cpus
            )
        )
