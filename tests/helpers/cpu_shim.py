"""The CPU backend's ops on NumPy arrays, by way of `make build/tests/libshim.so`.

bfloat16 crosses as uint16; `bf16` and `from_bf16` convert. A Shim is one backend (instruction set)
with its thread pool and workspace.
"""

from __future__ import annotations

import ctypes as ct
import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

LIBRARY = Path(os.environ.get("MILPY_SHIM", Path(__file__).parents[2] / "build/tests/libshim.so"))
MAX_LOGPROBS = 20
Array = NDArray[Any]


class Maxima(ct.Structure):
    _fields_ = [
        (name, ct.c_int32)
        for name in (
            "max_tokens max_seqs max_logit_rows max_position hidden ffn vocab "
            "n_heads n_kv_heads head_dim n_threads"
        ).split()
    ]


class BatchStruct(ct.Structure):
    _fields_ = [
        ("n_seqs", ct.c_int32),
        ("n_decode", ct.c_int32),
        ("n_tokens", ct.c_int32),
        ("seq_slot", ct.c_void_p),
        ("query_indptr", ct.c_void_p),
        ("kv_lengths", ct.c_void_p),
        ("tokens", ct.c_void_p),
        ("positions", ct.c_void_p),
        ("n_slots", ct.c_int32),
        ("max_pages", ct.c_int32),
        ("last_token", ct.c_void_p),
        ("page_table", ct.c_void_p),
    ]


class KvStruct(ct.Structure):
    _fields_ = [
        ("k", ct.c_void_p),
        ("v", ct.c_void_p),
        ("layer_elements", ct.c_int64),
        ("n_pages", ct.c_int32),
        ("page_size", ct.c_int32),
        ("n_kv_heads", ct.c_int32),
        ("head_dim", ct.c_int32),
    ]


class Sampling(ct.Structure):
    _fields_ = [
        ("temperature", ct.c_float),
        ("top_k", ct.c_int32),
        ("top_p", ct.c_float),
        ("n_logprobs", ct.c_int32),
        ("seed", ct.c_uint64),
    ]


class TokenLogprob(ct.Structure):
    _fields_ = [("token", ct.c_int32), ("logprob", ct.c_float)]


class Sample(ct.Structure):
    _fields_ = [
        ("token", ct.c_int32),
        ("n_top", ct.c_int32),
        ("logprob", ct.c_float),
        ("rank", ct.c_int32),
        ("top", TokenLogprob * MAX_LOGPROBS),
    ]


@functools.cache
def library() -> ct.CDLL:
    """The shim, built by `make test` before pytest runs."""
    lib = ct.CDLL(str(LIBRARY))
    lib.shim_message.restype = ct.c_char_p
    lib.shim_isas.restype = ct.c_char_p
    return lib


def isas() -> list[str]:
    """Instruction sets of this machine, best first."""
    return library().shim_isas().decode().split() if LIBRARY.exists() else ["scalar"]


def bf16(x: Array) -> Array:
    """Rounded to bfloat16, as the uint16 that C reads."""
    return np.ascontiguousarray(x).astype(ml_dtypes.bfloat16).view(np.uint16)


def from_bf16(x: Array) -> Array:
    return x.view(ml_dtypes.bfloat16).astype(np.float64)


def pointer(x: Array | None) -> ct.c_void_p:
    if x is None:
        return ct.c_void_p(None)
    assert x.flags.c_contiguous
    return ct.c_void_p(x.ctypes.data)


def int32(x: Any) -> Array:
    return np.ascontiguousarray(x, dtype=np.int32)


def float32(x: Any) -> Array:
    return np.ascontiguousarray(x, dtype=np.float32)


class ShimError(Exception):
    """A status other than MIL_OK, with its message."""


@dataclass
class Kv:
    """KV pages of some layers: k and v are [layers, n_pages, K, P, D] as bits of bfloat16."""

    k: Array
    v: Array

    def struct(self) -> KvStruct:
        _, n_pages, n_kv_heads, page_size, head_dim = self.k.shape
        elements = n_pages * n_kv_heads * page_size * head_dim
        return KvStruct(
            pointer(self.k), pointer(self.v), elements, n_pages, page_size, n_kv_heads, head_dim
        )


@dataclass
class Batch:
    """One sequence per entry of query_lengths; sequence s is in slot seq_slot[s]."""

    query_lengths: list[int]
    kv_lengths: list[int]
    page_table: Array  # [n_slots, max_pages]
    seq_slot: list[int] | None = None
    n_decode: int = 0
    positions: Array | None = None
    tokens: Array | None = None
    last_token: Array | None = None

    def struct(self) -> tuple[BatchStruct, list[Array]]:
        """The struct, and what must live as long as it is used."""
        n = len(self.query_lengths)
        indptr = int32(np.concatenate([[0], np.cumsum(self.query_lengths)]))
        slots = int32(range(n) if self.seq_slot is None else self.seq_slot)
        lengths = int32(self.kv_lengths)
        table = int32(self.page_table)
        total = int(indptr[-1])
        positions = int32(np.zeros(total) if self.positions is None else self.positions)
        tokens = int32(np.zeros(total) if self.tokens is None else self.tokens)
        last = int32(np.zeros(len(table)) if self.last_token is None else self.last_token)
        arrays = [slots, indptr, lengths, tokens, positions, last, table]
        p = [pointer(a) for a in arrays]
        struct = BatchStruct(n, self.n_decode, total, *p[:5], len(table), table.shape[1], *p[5:])
        return struct, arrays


class Shim:
    """One backend: `Shim("avx2", n_threads=2, vocab=1000, ...)`."""

    def __init__(self, isa: str, n_threads: int = 1, **maxima: int) -> None:
        sizes = dict.fromkeys((name for name, _ in Maxima._fields_), 64) | maxima
        self.handle = ct.c_void_p()
        self.isa = isa
        self.check(
            library().shim_create(
                ct.byref(self.handle), isa.encode(), n_threads, ct.byref(Maxima(**sizes))
            )
        )

    def close(self) -> None:
        library().shim_free(self.handle)
        self.handle = ct.c_void_p()

    def __enter__(self) -> Shim:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @staticmethod
    def check(status: int) -> None:
        if status != 0:
            raise ShimError(library().shim_message().decode())

    def embed(
        self, tokens: Array, panels: Array, N: int, K: int, vocab_begin: int = 0, scale: float = 1.0
    ) -> Array:
        tokens = int32(tokens)
        out = np.full((len(tokens), K), np.nan, np.float32)
        self.check(
            library().shim_embed(
                self.handle, pointer(out), pointer(tokens), pointer(panels), N, K, len(tokens),
                vocab_begin, ct.c_float(scale),
            )
        )  # fmt: skip
        return out

    def norm(
        self,
        x: Array,
        weight: Array,
        residual: Array | None = None,
        rows: Array | None = None,
        eps: float = 1e-5,
        offset: float = 0.0,
        wants_out: bool = True,
    ) -> tuple[Array | None, Array]:
        """(out as bits, x after the residual)."""
        x = float32(x).copy()
        weight = float32(weight)
        residual = None if residual is None else float32(residual)
        rows = None if rows is None else int32(rows)
        n_rows = len(x) if rows is None else len(rows)
        out = np.full((n_rows, x.shape[1]), 0xFFFF, np.uint16) if wants_out else None
        self.check(
            library().shim_norm(
                self.handle, pointer(out), pointer(x), pointer(residual), pointer(weight),
                pointer(rows), n_rows, x.shape[1], ct.c_float(eps), ct.c_float(offset),
            )
        )  # fmt: skip
        return out, x

    def act(self, gate_up: Array, interleave: int, kind: int = 0) -> Array:
        gate_up = float32(gate_up)
        n, ffn = len(gate_up), gate_up.shape[1] // 2
        out = np.full((n, ffn), 0xFFFF, np.uint16)
        self.check(
            library().shim_act(
                self.handle, pointer(out), pointer(gate_up), n, ffn, interleave, kind
            )
        )
        return out

    def rope_write(
        self,
        qkv: Array,
        cosines: Array,
        sines: Array,
        batch: Batch,
        kv: Kv,
        n_heads: int,
        rotary_dim: int,
        layer: int = 0,
        is_interleaved: bool = False,
    ) -> Array:
        """q as bits; k and v go to kv's pages."""
        qkv, cosines, sines = float32(qkv), float32(cosines), float32(sines)
        out = np.full((len(qkv), n_heads * kv.k.shape[-1]), 0xFFFF, np.uint16)
        struct, keep = batch.struct()
        self.check(
            library().shim_rope_write(
                self.handle, pointer(out), pointer(qkv), pointer(cosines), pointer(sines),
                ct.byref(struct), ct.byref(kv.struct()), layer, n_heads, rotary_dim,
                ct.c_bool(is_interleaved),
            )
        )  # fmt: skip
        del keep
        return out

    def attention(
        self,
        q: Array,
        batch: Batch,
        kv: Kv,
        n_heads: int,
        scale: float,
        layer: int = 0,
        window: int = 0,
        softcap: float = 0.0,
        repeat: int = 1,
    ) -> Array:
        """q and the result: [T, N * D] as bits."""
        out = np.full_like(q, 0xFFFF)
        struct, keep = batch.struct()
        self.check(
            library().shim_attention(
                self.handle, pointer(out), pointer(q), ct.byref(struct), ct.byref(kv.struct()),
                layer, n_heads, ct.c_float(scale), window, ct.c_float(softcap), repeat,
            )
        )  # fmt: skip
        del keep
        return out

    def gather_tokens(self, batch: Batch) -> Array:
        struct, keep = batch.struct()
        out = np.full(struct.n_tokens, -7, np.int32)
        self.check(library().shim_gather_tokens(self.handle, pointer(out), ct.byref(struct)))
        del keep
        return out

    def sample(
        self,
        logits: Array,
        sampling: list[Sampling],
        positions: Array | None = None,
        feeds: Array | None = None,
    ) -> tuple[list[Sample], Array]:
        """(samples, last_token of each row's slot, -1 where not fed). Row i is slot i's."""
        logits = float32(logits)
        n, vocab = logits.shape
        params = (Sampling * n)(*sampling)
        out = (Sample * n)()
        at = int32(np.zeros(n) if positions is None else positions)
        fed = int32(np.ones(n) if feeds is None else feeds)
        slots = int32(np.arange(n))
        last = int32(np.full(n, -1))
        self.check(
            library().shim_sample(
                self.handle, out, pointer(logits), pointer(slots), pointer(at), pointer(fed),
                params, pointer(last), n, n, vocab, ct.c_int64(vocab),
            )
        )  # fmt: skip
        return list(out), last
