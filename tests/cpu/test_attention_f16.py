"""attention and rope_write over pages of float16: as good as the plain formula in float16 rounded
where it must be, values that bfloat16 would lose, and bits that depend on the row alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cpu.test_attention import Sequence
from cpu.test_attention import run as run_attention
from cpu.test_rope import case, read_back, rotated, tables
from helpers.cpu_shim import Array, Shim, from_bf16, int32, isas
from kernels import judge

from milpy import ops
from milpy.errors import RequestError

EPS_F16 = 2.0**-11  # half a unit in the last place, 11 bits of significand

Part = tuple[Sequence, int, int]  # a sequence, its first query of the step, its length


def f16(x: Array) -> Array:
    return np.ascontiguousarray(x).astype(np.float16).view(np.uint16)


def from_f16(bits: Array) -> Array:
    return bits.view(np.float16).astype(np.float64)


def sequence(length: int, N: int, K: int, D: int, seed: int = 0) -> Sequence:
    """Bits of float16, with significands that bfloat16 has no room for."""
    rng = np.random.default_rng([seed, length])
    q, k, v = (rng.standard_normal((length, heads, D)).clip(-4, 4) for heads in (N, K, K))
    return Sequence(f16(2 * q), f16(k), f16(v))


def to_f16(x: Array) -> Array:
    """To float16, once."""
    return from_f16(f16(x))


def assert_no_worse(got: list[Array], parts: list[Part], is_f16: bool, **options: float) -> None:
    """The errors of all rows together, largest and mean square, are at most twice those of the
    plain formula with p and the result rounded. got: bits, of float16 or of bfloat16."""
    own, plain = [], []
    for bits, part in zip(got, parts, strict=True):
        seq, first, end = part
        q, k, v = (from_f16(x) for x in (seq.q[first:end], seq.k[:end], seq.v[:end]))
        exact, rounded = judge.attention(
            q, k, v, first, q.shape[2] ** -0.5, **options,
            round_weights=to_f16, round_result=to_f16 if is_f16 else judge.rounded,
        )  # fmt: skip
        own.append((from_f16(bits) if is_f16 else from_bf16(bits)) - exact)
        plain.append(rounded - exact)
    errors, bound = (np.concatenate([x.ravel() for x in xs]) for xs in (own, plain))
    assert np.isfinite(errors).all()
    assert np.abs(errors).max() <= 2 * np.abs(bound).max()
    assert np.square(errors).mean() <= 4 * np.square(bound).mean()


def run(
    isa: str, parts: list[Part], P: int = 16, n_threads: int = 1, seed: int = 0,
    is_f16: bool = True, captured: bool = False, **options: float,
) -> list[Array]:  # fmt: skip
    """Bits of each part's rows, [n, N, D]. is_f16: of the result."""
    return run_attention(
        isa, parts, P, n_threads, seed, captured, is_f16=True, out_is_f16=is_f16, **options
    )


# N, K, D, P: the head sizes of GPU instances, a tail, pages from 16 to 256.
HEADS = [
    (1, 1, 32, 16),
    (4, 2, 64, 16),
    (4, 1, 64, 64),
    (7, 1, 72, 64),
    (8, 2, 80, 64),
    (6, 1, 96, 256),
    (8, 1, 128, 64),
    (8, 4, 128, 256),
    (2, 2, 256, 16),
    (4, 1, 256, 256),
]


@pytest.mark.parametrize("is_f16", [True, False])
@pytest.mark.parametrize(("N", "K", "D", "P"), HEADS)
def test_mixed_batch_is_the_formula(isa: str, N: int, K: int, D: int, P: int, is_f16: bool) -> None:
    """One key, a decode row past a block, one in two splits, a chunk after a past, a prompt with
    an odd tail; NaN in every row of the pages that no query may see."""
    cases = [(1, 0), (65, 64), (1100, 1099), (130, 65), (77, 0)]
    parts = [(sequence(n, N, K, D), first, n) for n, first in cases]
    assert_no_worse(run(isa, parts, P, n_threads=2, is_f16=is_f16), parts, is_f16)


@pytest.mark.parametrize("options", [{"window": 1}, {"window": 100}, {"softcap": 3.0}])
def test_window_and_softcap(isa: str, options: dict[str, float]) -> None:
    parts = [(sequence(1300, 2, 1, 64), first, 1300) for first in (1230, 1299)]
    assert_no_worse(run(isa, parts, **options), parts, True, **options)


def any_values(length: int, N: int, K: int, D: int) -> Sequence:
    """V of any finite bits of float16: subnormals, zeros of both signs, the largest."""
    seq = sequence(length, N, K, D)
    seq.v[:] = np.random.default_rng(length).integers(0, 2**16, seq.v.shape)
    seq.v[seq.v & 0x7C00 == 0x7C00] ^= 0x4000
    return seq


@pytest.mark.parametrize(("N", "K", "D"), [(4, 2, 64), (2, 1, 72), (8, 1, 128)])
def test_a_row_that_sees_one_key_answers_with_its_value(isa: str, N: int, K: int, D: int) -> None:
    seq = any_values(200, N, K, D)
    want = np.repeat(from_f16(seq.v), N // K, 1)
    prompt, row = run(isa, [(seq, 0, 200), (seq, 199, 200)], window=1)
    assert np.array_equal(from_f16(prompt), want)
    assert np.array_equal(from_f16(row), want[199:])


def test_a_nan_of_ones_own_is_not_hidden(isa: str) -> None:
    for name, bits in (("q", 0x7E00), ("k", 0x7E00), ("v", 0x7E00), ("v", 0x7D01)):
        seq = sequence(70, 2, 1, 32)
        getattr(seq, name)[66] = bits
        (got,) = run(isa, [(seq, 64, 70)])
        is_nan = np.isnan(from_f16(got)).all((1, 2))
        assert is_nan[2:].tolist() == [True] + [name != "q"] * 3, name


# ---- the same bits ----


@pytest.mark.parametrize("softcap", [0.0, 30.0])
def test_bits_are_the_same_on_every_set_and_thread_count(softcap: float) -> None:
    parts = [(sequence(n, 4, 2, 40), first, n) for n, first in [(65, 64), (150, 90), (20, 0)]]
    results = [
        b"".join(part.tobytes() for part in run(isa, parts, n_threads=n, softcap=softcap))
        for isa in isas()
        for n in (1, 2)
    ]
    assert len(set(results)) == 1


@pytest.mark.parametrize(("N", "K", "D"), [(4, 2, 64), (6, 1, 128), (12, 1, 80)])
def test_order_of_sums_is_the_same_on_every_fast_set(N: int, K: int, D: int) -> None:
    """Rounding hides a wrong order of a sum in all but one of hundreds of results."""
    long = sequence(1500, N, K, D)
    rows = [(long, first, first + 1) for first in range(1400, 1500)]
    fast = [isa for isa in isas() if isa != "scalar"]
    results = [
        b"".join(part.tobytes() for parts in (rows, [(long, 0, 700)]) for part in run(isa, parts))
        for isa in fast
    ]
    assert len(set(results)) <= 1


@pytest.mark.parametrize(("P", "window"), [(16, 0), (64, 50), (256, 0)])
def test_bits_depend_on_neither_chunks_nor_pages_nor_mates(P: int, window: int) -> None:
    isa = isas()[0]
    seq, mate = sequence(1100, 4, 2, 64), sequence(333, 4, 2, 64, seed=5)
    (whole,) = run(isa, [(seq, 0, 1100)], window=window)
    cuts = [0, 1, 64, 65, 200, 777, 1024, 1025, 1099, 1100]
    for first, end in zip(cuts, cuts[1:], strict=False):
        mates = [(mate, 300, 333), (seq, first, end), (mate, 5, 6)]
        part = run(isa, mates, P, n_threads=2, seed=end, window=window)[1]
        assert np.array_equal(part, whole[first:end]), (first, end)


# ---- rope_write ----


@pytest.mark.parametrize(
    ("N", "K", "D", "P", "rotary_dim", "pairs"),
    [(2, 2, 32, 16, 32, False), (4, 1, 40, 32, 40, False), (4, 2, 72, 16, 24, True)],
)
def test_rope_write(isa: str, N: int, K: int, D: int, P: int, rotary_dim: int, pairs: bool) -> None:
    qkv, batch, kv = case(N, K, D, P)
    kv.is_f16 = True
    with Shim(isa, n_threads=2) as shim:
        q = shim.rope_write(qkv, *tables(rotary_dim), batch, kv, N, rotary_dim, 1, pairs)
    heads = qkv.reshape(len(qkv), N + 2 * K, D)
    want = rotated(heads[:, : N + K], batch.positions, rotary_dim, pairs)
    got = np.concatenate([q.reshape(-1, N, D), read_back(kv.k, batch)], axis=1)
    # float32's error where a cos - b sin cancels counts against |a| + |b|, <= 8 here.
    bound = 1.02 * EPS_F16 * np.abs(want) + 8 * 4 * 2.0**-24
    assert (np.abs(from_f16(got) - want) <= bound).all()
    assert np.array_equal(read_back(kv.v, batch), f16(heads[:, N + K :]))
    assert (kv.k == 0xFFFF).all() and (kv.v == 0xFFFF).all(), "wrote outside its rows"


def test_what_float16_cannot_hold_is_rounded_as_ieee_says(isa: str) -> None:
    """To nearest, halves to even; from 65520 on to infinity; below half the least to zero."""
    tiny = 2.0**-24
    values = [65504.0, 65519.9, 65520.0, -1e6, tiny, 0.5 * tiny, 0.51 * tiny, -1.5 * tiny]
    values += [1 + 2.0**-11, 1 + 3 * 2.0**-11, 1e-30, -0.0, np.inf, 0.1, -3.14159, 2.0**-14 - tiny]
    qkv, batch, kv = case(1, 1, 32, 16)
    kv.is_f16 = True
    qkv[:, 64:] = np.array(values * 2, np.float32)
    with Shim(isa) as shim:
        shim.rope_write(qkv, *tables(32), batch, kv, 1, 32, 1)
    with np.errstate(over="ignore"):
        assert np.array_equal(read_back(kv.v, batch)[:, 0], f16(qkv[:, 64:]))


# ---- milpy.ops ----


def same(x: Any) -> Any:
    return x


def write_and_attend(
    put: Callable[[Array], Any] = same, get: Callable[[Any], Array] = same, **options: Any
) -> None:
    """Three whole sequences, of one token, of more than a page and of less: what rope_and_cache
    leaves in float16 is judged, and attention over just that."""
    N, K, D, P = 4, 2, 64, 64
    lengths = [1, 70, 33]
    rng = np.random.default_rng(3)
    positions = np.concatenate([np.arange(n) for n in lengths]).astype(np.int32)
    qkv = ops.bfloat16(rng.uniform(-4, 4, (len(positions), (N + 2 * K) * D)))
    pages = int32([[3, 0], [5, 1], [2, 4]])
    k_cache, v_cache = (put(np.full((6, K, P, D), np.nan, np.float16)) for _ in range(2))
    batch = [put(x) for x in (pages, int32([0, 1, 71, 104]), int32(lengths))]
    outs = [None, None] if put is same else [put(np.zeros((104, N, D), np.float16)) for _ in "qo"]
    angles = [put(x) for x in (positions, *ops.rope_tables(400, D))]
    q = ops.rope_and_cache(put(qkv), *angles, k_cache, v_cache, *batch, out=outs[0], **options)
    out = ops.attention(q, k_cache, v_cache, *batch, out=outs[1], **options)

    q, out, k, v = (get(x) for x in (q, out, k_cache, v_cache))
    assert q.dtype == out.dtype == np.float16
    k, v = (
        np.concatenate(
            [x[page].transpose(0, 2, 1, 3).reshape(-1, K, D)[:n]
             for page, n in zip(pages, lengths, strict=True)]
        )
        for x in (k, v)
    )  # fmt: skip
    given = from_bf16(qkv).reshape(-1, N + 2 * K, D)
    want = rotated(given[:, : N + K], positions, D, False)
    bound = 1.02 * EPS_F16 * np.abs(want) + 8 * 4 * 2.0**-24
    assert (np.abs(np.concatenate([q, k], 1) - want) <= bound).all()
    assert np.array_equal(v, given[:, N + K :].astype(np.float16))
    cuts = np.cumsum(lengths)[:-1]
    q, k, v, out = (np.split(x.view(np.uint16), cuts) for x in (q, k, v, out))
    parts = [(Sequence(*x), 0, n) for *x, n in zip(q, k, v, lengths, strict=True)]
    assert_no_worse(out, parts, True)


def test_rope_and_cache_then_attention() -> None:
    write_and_attend()


@pytest.mark.ref
def test_host_tensors_of_torch() -> None:
    import torch  # noqa: PLC0415

    def put(x: Array) -> Any:
        is_bf16 = x.dtype == np.uint16
        return (
            torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) if is_bf16 else torch.tensor(x)
        )

    write_and_attend(put, lambda x: np.asarray(x.numpy()))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": np.uint16}, r"q is bfloat16 \[1, 2, 32\], expected float16 \[\?, \?, 32\]"),
        ({"v_cache": np.uint16}, r"v_cache is bfloat16 .*, expected float16 \[2, 1, 16, 32\]"),
        ({"out": np.uint16}, r"out is bfloat16 .*, expected float16 \[1, 2, 32\]"),
        ({"k_cache": np.uint16}, "v_cache is float16 .*, expected bfloat16"),
        ({"k_cache": np.uint16, "v_cache": np.uint16}, "q is float16 .*, expected bfloat16"),
    ],
)
def test_dtypes_that_differ_are_refused(changed: dict[str, Any], message: str) -> None:
    shapes = {
        "q": (1, 2, 32),
        "k_cache": (2, 1, 16, 32),
        "v_cache": (2, 1, 16, 32),
        "out": (1, 2, 32),
    }
    arrays = {name: np.zeros(n, changed.get(name, np.float16)) for name, n in shapes.items()}
    batch = {"page_table": int32([[0]]), "query_indptr": int32([0, 1]), "kv_lengths": int32([1])}
    with pytest.raises(RequestError, match="attention: " + message):
        ops.attention(**arrays, **batch)


def test_rope_and_cache_writes_q_as_the_caches_are() -> None:
    cos, sin = ops.rope_tables(4, 32)
    caches = [np.zeros((2, 1, 16, 32), np.float16) for _ in "kv"]
    batch = [int32([[0]]), int32([0, 1]), int32([1])]
    qkv, out = np.zeros((1, 4 * 32), np.uint16), np.zeros((1, 2, 32), np.uint16)
    with pytest.raises(RequestError, match=r"out is bfloat16 \[1, 2, 32\], expected float16"):
        ops.rope_and_cache(qkv, int32([0]), cos, sin, *caches, *batch, out=out)
