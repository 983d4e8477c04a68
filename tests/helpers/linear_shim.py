"""Products and LoRA of the CPU backend on NumPy arrays: the other half of `cpu_shim`."""

from __future__ import annotations

import ctypes as ct
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helpers.cpu_shim import Shim, bf16, from_bf16, int32, library, pointer

Array = NDArray[Any]
MAX_PARTS = 3
DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}


class WeightStruct(ct.Structure):
    _fields_ = [
        ("N", ct.c_int32),
        ("K", ct.c_int32),
        ("n_parts", ct.c_int32),
        ("part_rows", ct.c_int32 * MAX_PARTS),
        ("interleave", ct.c_int32),
        ("panels", ct.c_void_p),
        ("bias", ct.c_void_p),
    ]


class AdapterStruct(ct.Structure):
    _fields_ = [
        ("rank", ct.c_int32 * MAX_PARTS),
        ("scale", ct.c_float * MAX_PARTS),
        ("a", ct.c_void_p * MAX_PARTS),
        ("b", ct.c_void_p * MAX_PARTS),
    ]


class SegmentsStruct(ct.Structure):
    _fields_ = [
        ("n_tokens", ct.c_int32),
        ("n_segments", ct.c_int32),
        ("n_adapters", ct.c_int32),
        ("indptr", ct.c_void_p),
        ("adapter", ct.c_void_p),
        ("rows", ct.c_void_p),
        ("adapters", ct.c_void_p),
        ("v", ct.c_void_p),
        ("part_stride", ct.c_int32),
    ]


def zeros(n_bytes: int) -> Array:
    """A zeroed buffer of uint8 on a 64-byte boundary, as slabs are."""
    memory = np.zeros(n_bytes + 64, np.uint8)
    return memory[-memory.ctypes.data % 64 :][:n_bytes]


@dataclass
class Weight:
    """Parts stacked into one packed weight. parts: [rows, K] each, any float dtype or bf16 bits."""

    shim: Shim
    parts: list[Array]
    interleave: int = 0
    bias: Array | None = None  # [N] in packed order
    panels: Array = field(init=False)

    def __post_init__(self) -> None:
        lib = library()
        lib.shim_packed_bytes.restype = ct.c_int64
        self.N, self.K = sum(map(len, self.parts)), self.parts[0].shape[1]
        self.panels = zeros(lib.shim_packed_bytes(self.shim.handle, self.N, self.K))
        struct = self.struct()
        for part, rows in enumerate(self.parts):
            name = "bfloat16" if rows.dtype == np.uint16 else rows.dtype.name
            lib.shim_pack(
                self.shim.handle, ct.byref(struct), part, 0, len(rows), pointer(rows),
                DTYPES[name], ct.c_int64(self.K),
            )  # fmt: skip

    def struct(self) -> WeightStruct:
        sizes = [len(part) for part in self.parts]
        return WeightStruct(
            self.N,
            self.K,
            len(sizes),
            (ct.c_int32 * MAX_PARTS)(*sizes),
            self.interleave,
            pointer(self.panels),
            pointer(self.bias),
        )

    def order(self) -> Array:
        """The stacked row that lies at each packed row."""
        stacked = np.arange(self.N)
        if self.interleave == 0:
            return stacked
        return stacked.reshape(len(self.parts), -1, self.interleave).swapaxes(0, 1).ravel()

    def linear(self, x: Array, ldx: int = 0, ldy: int = 0) -> Array:
        """y [M, ldy] of x [M, K] bits; columns past N keep a mark."""
        ldx, ldy = ldx or self.K, ldy or self.N
        wide = np.full((len(x), ldx), 0x7FC0, np.uint16)
        wide[:, : self.K] = x
        y = np.full((len(x), ldy), 12345.0, np.float32)
        self.shim.check(
            library().shim_linear(
                self.shim.handle, pointer(y), pointer(wide), ct.byref(self.struct()), len(x),
                ct.c_int64(ldy), ct.c_int64(ldx),
            )
        )  # fmt: skip
        return y


@dataclass
class Adapter:
    """a[part]: [rank, K], b[part]: [rows, rank] as float64 values of bfloat16; None: untouched."""

    a: list[Array | None]
    b: list[Array | None]
    scale: list[float]

    def delta(self, x: Array, part: int) -> Array | float:
        a, b = self.a[part], self.b[part]
        if a is None or b is None:
            return 0.0
        return float(self.scale[part]) * (x @ a.T) @ b.T


def random_adapter(
    rng: np.random.Generator, ranks: list[int], K: int, part_rows: list[int]
) -> Adapter:
    a: list[Array | None] = []
    b: list[Array | None] = []
    for rank, rows in zip(ranks, part_rows, strict=True):
        a.append(from_bf16(bf16(rng.standard_normal((rank, K)) / K**0.5)) if rank else None)
        b.append(from_bf16(bf16(rng.standard_normal((rows, rank)))) if rank else None)
    return Adapter(a, b, [float(np.float32(s)) for s in rng.uniform(0.5, 2.0, len(ranks))])


class Segments:
    """Rows of a batch by adapter: rows_of[i] are the rows of adapters[i]; others are base rows."""

    def __init__(
        self, weight: Weight, adapters: list[Adapter], rows_of: list[list[int]], n_tokens: int
    ) -> None:
        shim, n_parts = weight.shim, len(weight.parts)
        self.keep: list[Array] = []
        packed = (AdapterStruct * max(1, len(adapters)))()
        for struct, adapter in zip(packed, adapters, strict=False):
            for part in range(n_parts):
                a, b = adapter.a[part], adapter.b[part]
                if a is None or b is None:
                    continue
                struct.rank[part] = len(a)
                struct.scale[part] = adapter.scale[part]
                struct.a[part] = self._pack(shim, False, a, len(a), weight.K)
                struct.b[part] = self._pack(shim, True, b, len(a), len(b))
        stride = max([16, *(-(-s.rank[p] // 16) * 16 for s in packed for p in range(n_parts))])
        used = [i for i, rows in enumerate(rows_of) if rows]
        indptr = int32(np.cumsum([0, *(len(rows_of[i]) for i in used)]))
        rows = int32([row for i in used for row in rows_of[i]])
        self.v = np.full((max(1, len(rows)), stride * n_parts), np.nan, np.float32)
        slots = int32(used)
        self.keep += [indptr, rows, slots]
        self.packed = packed
        self.struct = SegmentsStruct(
            n_tokens, len(used), len(adapters), pointer(indptr), pointer(slots), pointer(rows),
            ct.addressof(packed), pointer(self.v), stride,
        )  # fmt: skip

    def _pack(self, shim: Shim, is_b: bool, values: Array, rank: int, size: int) -> int:
        lib = library()
        lib.shim_lora_bytes.restype = ct.c_int64
        out = zeros(lib.shim_lora_bytes(shim.handle, ct.c_bool(is_b), rank, size))
        bits = bf16(values)
        lib.shim_lora_pack(shim.handle, ct.c_bool(is_b), pointer(out), pointer(bits), rank, size)
        self.keep.append(out)
        return int(out.ctypes.data)


def linear_lora(weight: Weight, x: Array, segments: Segments, is_fused: bool) -> Array:
    y = np.full((len(x), weight.N), np.nan, np.float32)
    weight.shim.check(
        library().shim_linear_lora(
            weight.shim.handle, pointer(y), pointer(x), ct.byref(weight.struct()),
            ct.byref(segments.struct), ct.c_bool(is_fused),
        )
    )  # fmt: skip
    return y


def gate_up_act(weight: Weight, x: Array, segments: Segments) -> Array:
    """The activation's bits, [M, N / 2]."""
    y = np.full((len(x), weight.N), np.nan, np.float32)
    out = np.full((len(x), weight.N // 2), 0xFFFF, np.uint16)
    weight.shim.check(
        library().shim_gate_up_act(
            weight.shim.handle, pointer(out), pointer(y), pointer(x), ct.byref(weight.struct()),
            ct.byref(segments.struct),
        )
    )  # fmt: skip
    return out
