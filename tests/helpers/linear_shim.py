"""Products and LoRA of a backend on NumPy arrays: the other half of `cpu_shim`."""

from __future__ import annotations

import ctypes as ct
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helpers.cpu_shim import Shim, bf16, from_bf16, int32, library, pointer

Array = NDArray[Any]
MAX_PARTS = 3
MAX_ADAPTERS = 128
MARK, MARK_BF16 = 12345.0, 12352.0  # what columns past N hold, and the same in bfloat16
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


def widened(y: Array) -> Array:
    """A product's result as float32."""
    return from_bf16(y).astype(np.float32) if y.dtype == np.uint16 else y


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
        if not self.shim.is_host:
            self._pack_rows()
            return
        struct = self.struct()
        for part, rows in enumerate(self.parts):
            name = "bfloat16" if rows.dtype == np.uint16 else rows.dtype.name
            lib.shim_pack(
                self.shim.handle, ct.byref(struct), part, 0, len(rows), pointer(rows),
                DTYPES[name], ct.c_int64(self.K),
            )  # fmt: skip

    def _pack_rows(self) -> None:
        """A GPU's weights are rows of bfloat16, [N][K], in packed order."""
        rows = [part if part.dtype == np.uint16 else bf16(part) for part in self.parts]
        packed = np.concatenate(rows)[self.order()]
        self.panels.view(np.uint16)[: packed.size] = packed.ravel()

    def rows(self) -> Array:
        """A GPU's, as bits of bfloat16, [N, K] in packed order."""
        return self.panels.view(np.uint16)[: self.N * self.K].reshape(self.N, self.K)

    def pack_dummy(
        self, part: int, row: int, n_rows: int, stream: int, begin: int, stride: int
    ) -> None:
        """Rows row .. of a part become dummy weights; on a GPU."""
        self.shim.check(
            library().shim_pack_dummy(
                self.shim.handle, ct.byref(self.struct()), part, row, n_rows, ct.c_uint64(stream),
                ct.c_uint64(begin), ct.c_int64(stride),
            )
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

    def linear(
        self, x: Array, ldx: int = 0, ldy: int = 0, is_logits: bool = False, last: int | None = None
    ) -> Array:
        """y [M, ldy] of x [M, K] bits; columns past N keep a mark. is_logits: in float32 even where
        the backend's products are bfloat16. last: only so many of y's last rows are copied back and
        returned."""
        ldx, ldy = ldx or self.K, ldy or self.N
        wide = np.full((len(x), ldx), 0x7FC0, np.uint16)
        wide[:, : self.K] = x
        y = np.full((len(x) if last is None else last, ldy), MARK, np.float32)
        held = y if is_logits else self.shim.product(y)
        self.shim.need(max_tokens=len(x), hidden=self.K, ffn=self.N)
        self.shim.check(
            library().shim_linear(
                self.shim.handle, pointer(held), pointer(wide), ct.byref(self.struct()),
                0 if held.dtype == np.float32 else 1, len(x), len(held), ct.c_int64(ldy),
                ct.c_int64(ldx),
            )
        )  # fmt: skip
        result = widened(held)
        result[:, self.N :][result[:, self.N :] == MARK_BF16] = MARK
        return result


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
        m = shim.rank_multiple
        stride = max([m, *(-(-s.rank[p] // m) * m for s in packed for p in range(n_parts))])
        stride = max(stride, shim.v_rank)
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


def run_lora(weight: Weight, x: Array, segments: Segments, what: int, y: Array | None) -> Array:
    shim = weight.shim
    held = shim.product(np.full((len(x), weight.N), np.nan, np.float32) if y is None else y)
    shim.need(max_tokens=len(x), hidden=weight.K, ffn=weight.N, max_adapter_slots=MAX_ADAPTERS)
    shim.check(
        library().shim_linear_lora(
            shim.handle, pointer(held), pointer(x), ct.byref(weight.struct()),
            ct.byref(segments.struct), what,
        )
    )  # fmt: skip
    return widened(held)


def linear_lora(weight: Weight, x: Array, segments: Segments, is_fused: bool) -> Array:
    """is_fused: as layers call it, by way of the backend's composed slot where it has one; else
    shrink, linear and expand, one after another."""
    return run_lora(weight, x, segments, int(is_fused), None)


def linear_lora_late(weight: Weight, word: int, n_rows: int, segments: Segments) -> Array:
    """linear_lora over rows that the queue itself writes before it, late: every element is the bits
    `word`."""
    shim = weight.shim
    held = shim.product(np.full((n_rows, weight.N), np.nan, np.float32))
    shim.need(max_tokens=n_rows, hidden=weight.K, ffn=weight.N, max_adapter_slots=MAX_ADAPTERS)
    shim.check(
        library().shim_linear_lora_late(
            shim.handle, pointer(held), ct.c_uint16(word), ct.byref(weight.struct()),
            ct.byref(segments.struct),
        )
    )  # fmt: skip
    return widened(held)


def lora_shrink(weight: Weight, x: Array, segments: Segments) -> Array:
    """v, [n_lora_rows, n_parts, part_stride]; NaN where nothing was written."""
    run_lora(weight, x, segments, 2, None)
    return segments.v.reshape(len(segments.v), len(weight.parts), -1).copy()


def lora_expand(weight: Weight, x: Array, segments: Segments, y: Array) -> Array:
    """y + v B^T with v as segments hold it; x gives the number of rows."""
    return run_lora(weight, x, segments, 3, y)


def gate_up_act(weight: Weight, x: Array, segments: Segments) -> Array:
    """The activation's bits, [M, N / 2]."""
    shim = weight.shim
    y = shim.product(np.full((len(x), weight.N), np.nan, np.float32))
    out = np.full((len(x), weight.N // 2), 0xFFFF, np.uint16)
    shim.need(max_tokens=len(x), hidden=weight.K, ffn=weight.N, max_adapter_slots=MAX_ADAPTERS)
    shim.check(
        library().shim_gate_up_act(
            shim.handle, pointer(out), pointer(y), pointer(x), ct.byref(weight.struct()),
            ct.byref(segments.struct),
        )
    )  # fmt: skip
    return out
