"""Arrays in a GPU's memory without torch or CuPy: a DLPack producer over the driver's API."""

from __future__ import annotations

import ctypes as ct
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
READ_ONLY = 1
_NON_BLOCKING, _THREAD_LOCAL = 1, 1


class _Tensor(ct.Structure):
    _fields_ = [
        ("data", ct.c_void_p), ("device_type", ct.c_int32), ("device_id", ct.c_int32),
        ("n_dims", ct.c_int32), ("code", ct.c_uint8), ("bits", ct.c_uint8),
        ("lanes", ct.c_uint16), ("shape", ct.c_void_p), ("strides", ct.c_void_p),
        ("byte_offset", ct.c_uint64),
    ]  # fmt: skip


class _Versioned(ct.Structure):
    _fields_ = [
        ("major", ct.c_uint32), ("minor", ct.c_uint32), ("context", ct.c_void_p),
        ("deleter", ct.c_void_p), ("flags", ct.c_uint64), ("tensor", _Tensor),
    ]  # fmt: skip


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


class DeviceArray:
    """A copy of a NumPy array on device 0, uint16 for bfloat16; freed with the process."""

    def __init__(self, array: Array, *, offset: int = 0, flags: int = 0) -> None:
        array = np.ascontiguousarray(array)
        self.shape, self.dtype, self.flags = array.shape, array.dtype, flags
        memory = ct.c_void_p()
        _call("cuMemAlloc_v2", ct.byref(memory), ct.c_size_t(array.nbytes + offset + 16))
        self.address = int(memory.value or 0) + offset
        self.n_deleted = 0
        self.set(array)

    def set(self, array: Array) -> None:
        array = np.ascontiguousarray(array)
        if array.nbytes:
            n_bytes = ct.c_size_t(array.nbytes)
            _call(
                "cuMemcpyHtoD_v2",
                ct.c_uint64(self.address),
                ct.c_void_p(array.ctypes.data),
                n_bytes,
            )

    def get(self) -> Array:
        """The content, once all streams have run."""
        array = np.empty(self.shape, self.dtype)
        synchronize()
        if array.nbytes:
            n_bytes = ct.c_size_t(array.nbytes)
            _call(
                "cuMemcpyDtoH_v2",
                ct.c_void_p(array.ctypes.data),
                ct.c_uint64(self.address),
                n_bytes,
            )
        return array

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(self, *, stream: int, max_version: tuple[int, int]) -> Any:
        self.sizes = (ct.c_int64 * len(self.shape))(*self.shape)
        code = {"f": 2, "i": 0, "u": 1}[self.dtype.kind]
        tensor = _Tensor(
            self.address, 2, 0, len(self.shape), code, 8 * self.dtype.itemsize, 1,
            ct.cast(self.sizes, ct.c_void_p), None, 0,
        )  # fmt: skip
        self.deleter = ct.CFUNCTYPE(None, ct.c_void_p)(self._delete)
        deleter = ct.cast(self.deleter, ct.c_void_p)
        self.managed = _Versioned(1, 0, None, deleter, self.flags, tensor)
        new = ct.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ct.py_object, [ct.c_void_p, ct.c_char_p, ct.c_void_p]
        return new(ct.addressof(self.managed), b"dltensor_versioned", None)

    def _delete(self, _: int) -> None:
        self.n_deleted += 1


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
