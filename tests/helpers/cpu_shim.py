"""A backend's ops on NumPy arrays, by way of `make build/tests/libshim.so`.

bfloat16 crosses as uint16; `bf16` and `from_bf16` convert. A Shim is one backend with its
workspace: an instruction set of the CPU with its thread pool, "cuda" (the best kernels for the GPU)
or "cuda-portable". Arrays are NumPy's either way: for a GPU the C side copies them there and back.

What one product hands to the next op (residual, qkv, gate_up, y) is given and returned as floats,
and is rounded to bfloat16 on its way where the backend holds it so.
"""

from __future__ import annotations

import ctypes as ct
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from milpy.wheels import add_library_dirs

LIBRARY = Path(os.environ.get("MILPY_SHIM", Path(__file__).parents[2] / "build/tests/libshim.so"))
MAX_LOGPROBS = 20
BF16, F16 = 1, 2  # of mil_dtype
Array = NDArray[Any]


class Maxima(ct.Structure):
    _fields_ = [
        (name, ct.c_int32)
        for name in (
            "max_tokens max_seqs max_logit_rows max_position hidden ffn vocab "
            "n_heads n_kv_heads head_dim page_size max_pages_per_seq max_adapter_slots n_threads"
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
        ("bucket_seqs", ct.c_int32),
        ("bucket_tokens", ct.c_int32),
    ]


class KvStruct(ct.Structure):
    _fields_ = [
        ("k", ct.c_void_p),
        ("v", ct.c_void_p),
        ("n_layers", ct.c_int32),
        ("n_pages", ct.c_int32),
        ("pool_pages", ct.c_int32),
        ("page_size", ct.c_int32),
        ("n_kv_heads", ct.c_int32),
        ("head_dim", ct.c_int32),
        ("dtype", ct.c_int32),
        ("out_dtype", ct.c_int32),
    ]


class Sampling(ct.Structure):
    _fields_ = [
        ("temperature", ct.c_float),
        ("top_k", ct.c_int32),
        ("top_p", ct.c_float),
        ("n_logprobs", ct.c_int32),
        ("seed", ct.c_uint64),
    ]


class SlotSet(ct.Structure):
    _fields_ = [("slot", ct.c_int32), ("adapter_slot", ct.c_int32), ("sampling", Sampling)]


class PageSet(ct.Structure):
    _fields_ = [("slot", ct.c_int32), ("index", ct.c_int32), ("page", ct.c_int32)]


class AdapterSet(ct.Structure):
    _fields_ = [("adapter_slot", ct.c_int32), ("content", ct.c_int32)]


class LoraModule(ct.Structure):
    """A mil_lora_module; a and b are any numbers to `begin`, which only copies them."""

    _fields_ = [
        ("rank", ct.c_int32),
        ("padded_rank", ct.c_int32),
        ("n_in", ct.c_int32),
        ("n_out", ct.c_int32),
        ("scale", ct.c_float),
        ("a", ct.c_void_p),
        ("b", ct.c_void_p),
    ]


class ExtrasStruct(ct.Structure):
    _fields_ = [
        ("n_logit_rows", ct.c_int32),
        ("bucket_logit_rows", ct.c_int32),
        ("logit_slots", ct.c_void_p),
        ("logit_feeds", ct.c_void_p),
        ("logit_positions", ct.c_void_p),
        ("n_segments", ct.c_int32),
        ("n_adapters", ct.c_int32),
        ("segment_indptr", ct.c_void_p),
        ("segment_adapter", ct.c_void_p),
        ("lora_rows", ct.c_void_p),
        ("n_slot_sets", ct.c_int32),
        ("n_page_sets", ct.c_int32),
        ("n_adapter_sets", ct.c_int32),
        ("slot_sets", ct.c_void_p),
        ("page_sets", ct.c_void_p),
        ("adapter_sets", ct.c_void_p),
    ]


class StateStruct(ct.Structure):
    _fields_ = [
        ("adapter_slot", ct.c_void_p),
        ("sampling", ct.c_void_p),
        ("modules", ct.c_void_p),
        ("contents", ct.c_void_p),
        ("n_adapters", ct.c_int32),
        ("n_layers", ct.c_int32),
        ("n_contents", ct.c_int32),
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
    lib.shim_cuda_paths.restype = ct.c_char_p
    add_library_dirs(lambda directory: lib.shim_add_library_dir(directory.encode()))
    return lib


def isas() -> list[str]:
    """Instruction sets of this machine, best first."""
    return library().shim_isas().decode().split() if LIBRARY.exists() else ["scalar"]


@functools.cache
def cuda_paths() -> list[str]:
    """cuda and cuda-portable where this build and this machine have a GPU for them, else []."""
    return library().shim_cuda_paths().decode().split() if LIBRARY.exists() else []


def why_no_cuda() -> str:
    if not LIBRARY.exists():
        return f"found no {LIBRARY}: make it with MILPY_CUDA=1"
    library().shim_cuda_paths()
    return str(library().shim_message().decode())


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
    """KV pages of some layers: k and v are [layers, n_pages, K, P, D] as bits of bfloat16.

    is_f16: k, v and q are bits of float16. out_is_f16: so is what attention over them returns.
    pool_pages: pages of a larger pool on the device, of which these are the last; page ids then
    count from the pool's first: ours are pool_pages - n_pages and up."""

    k: Array
    v: Array
    pool_pages: int = 0
    is_f16: bool = False
    out_is_f16: bool = False

    def struct(self) -> KvStruct:
        n_layers, n_pages, n_kv_heads, page_size, head_dim = self.k.shape
        return KvStruct(
            pointer(self.k), pointer(self.v), n_layers, n_pages, self.pool_pages, page_size,
            n_kv_heads, head_dim, F16 if self.is_f16 else BF16, F16 if self.out_is_f16 else BF16,
        )  # fmt: skip


@dataclass
class Batch:
    """One sequence per entry of query_lengths; sequence s is in slot seq_slot[s].

    Buckets larger than the counts are what a captured launch of them would have: the arrays that go
    with them are padded with NaN rows."""

    query_lengths: list[int]
    kv_lengths: list[int]
    page_table: Array  # [n_slots, max_pages]
    seq_slot: list[int] | None = None
    n_decode: int = 0
    positions: Array | None = None
    tokens: Array | None = None
    last_token: Array | None = None
    bucket_seqs: int = 0
    bucket_tokens: int = 0

    def struct(self) -> tuple[BatchStruct, list[Array]]:
        """The struct, and what must live as long as it is used."""
        n = len(self.query_lengths)
        indptr = int32(np.concatenate([[0], np.cumsum(self.query_lengths)]))
        slots = int32(range(n) if self.seq_slot is None else self.seq_slot)
        lengths = int32(self.kv_lengths)
        table = int32(self.page_table).copy()
        total = int(indptr[-1])
        positions = int32(np.zeros(total) if self.positions is None else self.positions)
        tokens = int32(np.zeros(total) if self.tokens is None else self.tokens)
        last = int32(np.zeros(len(table)) if self.last_token is None else self.last_token).copy()
        arrays = [slots, indptr, lengths, tokens, positions, last, table]
        p = [pointer(a) for a in arrays]
        struct = BatchStruct(
            n, self.n_decode, total, *p[:5], len(table), table.shape[1], *p[5:],
            self.bucket_seqs, self.bucket_tokens,
        )  # fmt: skip
        return struct, arrays


@dataclass
class Begun:
    """What a step's begin left. modules: [adapter slots * layers * 7]."""

    tokens: Array
    last_token: Array
    page_table: Array
    adapter_slot: Array
    sampling: list[Sampling]
    modules: list[LoraModule]


class Shim:
    """One backend: `Shim("avx2", n_threads=2, vocab=1000, ...)` or `Shim("cuda")`.

    deterministic: the context's flag. captured: each op is captured in a graph, which then runs.
    The sizes are maxima as the workspace is made for; on a GPU they grow with what ops are given.
    """

    def __init__(
        self,
        isa: str,
        n_threads: int = 1,
        deterministic: bool = False,
        captured: bool = False,
        **maxima: int,
    ) -> None:
        sizes = dict.fromkeys((name for name, _ in Maxima._fields_), 64) | maxima
        self.handle = ct.c_void_p()
        self.isa = isa
        self.check(
            library().shim_create(
                ct.byref(self.handle), isa.encode(), n_threads, ct.byref(Maxima(**sizes))
            )
        )
        lib = library()
        lib.shim_set_mode(self.handle, ct.c_bool(deterministic), ct.c_bool(captured))
        lib.shim_is_host.restype = ct.c_bool
        self.is_host = bool(lib.shim_is_host(self.handle))
        self.product_dtype = int(lib.shim_product_dtype(self.handle))
        self.rank_multiple = int(lib.shim_rank_multiple(self.handle))
        self.v_rank = int(lib.shim_v_rank(self.handle))

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

    def need(self, **maxima: int) -> None:
        """Make the workspace of a GPU large enough for these too."""
        sizes = dict.fromkeys((name for name, _ in Maxima._fields_), 0) | maxima
        self.check(library().shim_need(self.handle, ct.byref(Maxima(**sizes))))

    def need_batch(self, batch: Batch, kv: Kv, n_heads: int) -> None:
        n, total = len(batch.query_lengths), sum(batch.query_lengths)
        _, _, n_kv_heads, page_size, head_dim = kv.k.shape
        self.need(
            max_tokens=max(total, batch.bucket_tokens), max_seqs=max(n, batch.bucket_seqs),
            max_position=max([1, *batch.kv_lengths]), n_heads=n_heads, n_kv_heads=n_kv_heads,
            head_dim=head_dim, page_size=page_size, max_pages_per_seq=batch.page_table.shape[1],
        )  # fmt: skip

    def product(self, x: Array) -> Array:
        """x as this backend's products hold it."""
        return bf16(x) if self.product_dtype == 1 else float32(x)

    def embed(
        self, tokens: Array, panels: Array, N: int, K: int, vocab_begin: int = 0, scale: float = 1.0
    ) -> Array:
        tokens = int32(tokens)
        out = np.full((len(tokens), K), np.nan, np.float32)
        self.check(
            library().shim_embed(
                self.handle, pointer(out), pointer(tokens), pointer(panels),
                ct.c_int64(panels.nbytes), N, K, len(tokens), vocab_begin, ct.c_float(scale),
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
        residual = None if residual is None else self.product(residual)
        rows = None if rows is None else int32(rows)
        n_rows = len(x) if rows is None else len(rows)
        out = np.full((n_rows, x.shape[1]), 0xFFFF, np.uint16) if wants_out else None
        self.check(
            library().shim_norm(
                self.handle, pointer(out), pointer(x), pointer(residual), pointer(weight),
                pointer(rows), len(x), n_rows, x.shape[1], ct.c_float(eps), ct.c_float(offset),
            )
        )  # fmt: skip
        return out, x

    def act(self, gate_up: Array, interleave: int, kind: int = 0) -> Array:
        gate_up = self.product(gate_up)
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
        self.need_batch(batch, kv, n_heads)
        qkv, cosines, sines = self.product(qkv), float32(cosines), float32(sines)
        out = np.full((len(qkv), n_heads * kv.k.shape[-1]), 0xFFFF, np.uint16)
        struct, keep = batch.struct()
        self.check(
            library().shim_rope_write(
                self.handle, pointer(out), pointer(qkv), pointer(cosines), pointer(sines),
                len(cosines), ct.byref(struct), ct.byref(kv.struct()), layer, n_heads, rotary_dim,
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
        self.need_batch(batch, kv, n_heads)
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

    def attention_replays(
        self,
        cases: Sequence[tuple[Array, Batch]],
        kv: Kv,
        n_heads: int,
        scale: float,
        layer: int = 0,
        window: int = 0,
        softcap: float = 0.0,
    ) -> list[Array]:
        """One graph of attention, captured with the first (q, batch), launched over each of them.
        All have the same buckets (both given) and shape of page table. Rows of the batch only."""
        bucket, width = cases[0][1].bucket_tokens, cases[0][0].shape[1]
        q = np.full((len(cases), bucket, width), 0xFFFF, np.uint16)
        for at, (rows, batch) in zip(q, cases, strict=True):
            at[: len(rows)] = rows
            self.need_batch(batch, kv, n_heads)
        out = np.full_like(q, 0xFFFF)
        made = [batch.struct() for _, batch in cases]
        structs = (BatchStruct * len(made))(*(struct for struct, _ in made))
        self.check(
            library().shim_attention_replays(
                self.handle, len(cases), pointer(out), pointer(q), structs, ct.byref(kv.struct()),
                layer, n_heads, ct.c_float(scale), window, ct.c_float(softcap),
            )
        )  # fmt: skip
        return [at[: len(rows)] for at, (rows, _) in zip(out, cases, strict=True)]

    def gather_tokens(self, batch: Batch) -> Array:
        return self.begin(batch).tokens

    def begin(
        self,
        batch: Batch,
        slot_sets: Sequence[tuple[int, int, Sampling]] = (),
        page_sets: Sequence[tuple[int, int, int]] = (),
        adapter_sets: Sequence[tuple[int, int]] = (),
        contents: Sequence[LoraModule] = (),
        modules: Sequence[LoraModule] = (),
        n_layers: int = 1,
    ) -> Begun:
        """slot_sets: (slot, adapter slot, sampling); page_sets: (slot, index, page); adapter_sets:
        (adapter slot, content or -1). contents and modules: [n * n_layers * 7]."""
        struct, keep = batch.struct()
        n_slots, width = len(batch.page_table), 7 * n_layers
        n_adapters = max([1, len(modules) // width, *(slot + 1 for slot, _ in adapter_sets)])
        commands: list[Any] = [
            (SlotSet * (len(slot_sets) + 1))(*(SlotSet(*x) for x in slot_sets)),
            (PageSet * (len(page_sets) + 1))(*(PageSet(*x) for x in page_sets)),
            (AdapterSet * (len(adapter_sets) + 1))(*(AdapterSet(*x) for x in adapter_sets)),
        ]
        extras = ExtrasStruct(n_adapters=n_adapters)
        extras.n_slot_sets, extras.n_page_sets = len(slot_sets), len(page_sets)
        extras.n_adapter_sets = len(adapter_sets)
        extras.slot_sets, extras.page_sets, extras.adapter_sets = map(ct.addressof, commands)
        adapter_slot, sampling = int32(np.full(n_slots, -7)), (Sampling * n_slots)()
        table = (LoraModule * (n_adapters * width))(*modules)
        given = (LoraModule * max(1, len(contents)))(*contents)
        state = StateStruct(
            pointer(adapter_slot), ct.addressof(sampling), ct.addressof(table),
            ct.addressof(given), n_adapters, n_layers, len(contents) // width,
        )  # fmt: skip
        tokens = np.full(max(struct.n_tokens, struct.bucket_tokens), -7, np.int32)
        self.need(max_tokens=len(tokens), max_seqs=max(struct.n_seqs, struct.bucket_seqs))
        self.check(
            library().shim_begin(
                self.handle, pointer(tokens), ct.byref(struct), ct.byref(extras), ct.byref(state)
            )
        )
        last, pages = keep[-2:]
        return Begun(tokens, last, pages, adapter_slot, list(sampling), list(table))

    def sample(
        self,
        logits: Array,
        sampling: list[Sampling],
        positions: Array | None = None,
        feeds: Array | None = None,
        first_row: int = 0,
        bucket: int = 0,
        ld: int = 0,
    ) -> tuple[list[Sample], Array]:
        """(samples, last_token of each row's slot, -1 where not fed). Row i is slot i's, and logit
        row first_row + i of the batch. bucket: rows of the launch, those past ours NaN. ld: floats
        from a row to the next on the device."""
        logits = float32(logits)
        n, vocab = logits.shape
        params = (Sampling * (first_row + n))(*([Sampling()] * first_row), *sampling)
        out = (Sample * n)()
        at = int32(np.zeros(n) if positions is None else positions)
        fed = int32(np.ones(n) if feeds is None else feeds)
        before = np.zeros(first_row, np.int32)
        at, fed = np.concatenate([before, at]), np.concatenate([before, fed])
        slots, last = int32(np.arange(first_row + n)), int32(np.full(first_row + n, -1))
        n_rows = max(n, bucket)
        self.need(max_logit_rows=n_rows, vocab=vocab)
        extras = ExtrasStruct(
            first_row + n, first_row + n_rows, pointer(slots), pointer(fed), pointer(at)
        )
        self.check(
            library().shim_sample(
                self.handle, out, pointer(logits), ct.byref(extras), params, pointer(last),
                first_row + n, first_row, n_rows, vocab, ct.c_int64(ld or vocab),
            )
        )  # fmt: skip
        return list(out), last[first_row:]

    def send_out(self, sent: Array, host: Array) -> Array:
        """host after the bytes of `sent`, on the device, were sent to it."""
        host = host.copy()
        self.check(
            library().shim_send_out(
                self.handle, pointer(host), pointer(sent), ct.c_int64(host.nbytes),
                ct.c_int64(sent.nbytes),
            )
        )  # fmt: skip
        return host
