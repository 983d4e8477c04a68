"""Arrays in a GPU's memory without torch or CuPy: a DLPack producer over the driver's API."""

from __future__ import annotations

import ctypes as ct
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helpers.dlpack import CUDA, Producer

Array = NDArray[Any]
_NON_BLOCKING, _THREAD_LOCAL = 1, 1
_CHUNK = 2 << 20  # what the driver deals memory out by
# Bytes on each side of an array, and what they hold. None where a tool watches the very ends.
_GUARD, _KNOWN = 0 if os.environ.get("MILPY_SHIM_BARE") == "1" else 256, 0xA5


@functools.cache
def _driver() -> ct.CDLL:
    driver = ct.CDLL("libcuda.so.1")
    device, context = ct.c_int(), ct.c_void_p()
    assert driver.cuInit(0) == 0
    assert driver.cuDeviceGet(ct.byref(device), 0) == 0
    assert driver.cuDevicePrimaryCtxRetain(ct.byref(context), device) == 0
    driver.context = context
    return driver


def _call(name: str, *arguments: Any) -> None:
    driver = _driver()
    assert driver.cuCtxSetCurrent(driver.context) == 0
    status = getattr(driver, name)(*arguments)
    assert status == 0, f"{name}: {status}"


class DeviceArray(Producer):
    """A copy of a NumPy array on device 0, uint16 for bfloat16; freed with the process. The bytes
    around it are known, so that a write outside is seen; with MILPY_SHIM_BARE=1 there are none, and
    it is an allocation of exactly its size. Tells no stream: a type that does is made by adding
    __dlpack_c_exchange_api__."""

    def __init__(self, array: Array, *, offset: int = 0, flags: int = 0) -> None:
        array = np.ascontiguousarray(array)
        memory = ct.c_void_p()
        n_taken = max(1, _GUARD + offset + array.nbytes + _GUARD)
        _call("cuMemAlloc_v2", ct.byref(memory), ct.c_size_t(n_taken))
        start = int(memory.value or 0) + _GUARD + offset
        super().__init__(start, array.shape, array.dtype, device=(CUDA, 0), flags=flags)
        self._guards = [(start - _GUARD, _GUARD), (start + array.nbytes, _GUARD)]
        for address, n_bytes in self._guards:
            _put(address, np.full(n_bytes, _KNOWN, np.uint8))
        self.set(array)

    def set(self, array: Array) -> None:
        _put(self.address, np.ascontiguousarray(array))

    def get(self) -> Array:
        """The content, once all streams have run."""
        synchronize()
        for address, n_bytes in self._guards:
            assert (_get(address, (n_bytes,), np.dtype(np.uint8)) == _KNOWN).all(), "wrote outside"
        return _get(self.address, self.shape, self.dtype)


def _put(address: int, array: Array) -> None:
    if array.nbytes:
        pointer, n_bytes = ct.c_void_p(array.ctypes.data), ct.c_size_t(array.nbytes)
        _call("cuMemcpyHtoD_v2", ct.c_uint64(address), pointer, n_bytes)
        # The call may return before the bytes are there, and other streams do not wait for it.
        _call("cuStreamSynchronize", ct.c_void_p(0))


def _get(address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    array = np.empty(shape, dtype)
    if array.nbytes:
        pointer, n_bytes = ct.c_void_p(array.ctypes.data), ct.c_size_t(array.nbytes)
        _call("cuMemcpyDtoH_v2", pointer, ct.c_uint64(address), n_bytes)
    return array


def memory() -> tuple[int, int]:
    """Bytes of device 0's memory that are free, and all of them, as the driver counts."""
    free, total = ct.c_size_t(), ct.c_size_t()
    _call("cuMemGetInfo_v2", ct.byref(free), ct.byref(total))
    return free.value, total.value


@contextmanager
def ballast(n_left: int) -> Iterator[None]:
    """Device 0 with at most n_left bytes free: all else is taken meanwhile."""
    blocks: list[ct.c_uint64] = []
    n_bytes = memory()[0]
    try:
        while memory()[0] > n_left:
            assert n_bytes >= _CHUNK, f"{memory()[0]} bytes stay free, expected at most {n_left}"
            block = ct.c_uint64()
            if _driver().cuMemAlloc_v2(ct.byref(block), ct.c_size_t(n_bytes)) == 0:
                blocks.append(block)
            else:
                n_bytes //= 2
        yield
    finally:
        for block in blocks:
            _call("cuMemFree_v2", block)


def synchronize() -> None:
    _call("cuCtxSynchronize")


def make_stream() -> int:
    """A stream that does not wait for the legacy default one; lives with the process."""
    stream = ct.c_void_p()
    _call("cuStreamCreate", ct.byref(stream), ct.c_uint(_NON_BLOCKING))
    return int(stream.value or 0)


def capture(stream: int, body: Callable[[], object]) -> Callable[[], None]:
    """What body queues on the stream, as a launch of it."""
    graph, executable = ct.c_void_p(), ct.c_void_p()
    _call("cuStreamBeginCapture_v2", ct.c_void_p(stream), ct.c_int(_THREAD_LOCAL))
    try:
        body()
    finally:
        _call("cuStreamEndCapture", ct.c_void_p(stream), ct.byref(graph))
    _call("cuGraphInstantiateWithFlags", ct.byref(executable), graph, ct.c_ulonglong(0))
    return lambda: _call("cuGraphLaunch", executable, ct.c_void_p(stream))
