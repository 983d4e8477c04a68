"""attention and rope_write over pages of float16: as good as the plain formula in float16 rounded
where it must be, values that bfloat16 would lose, and bits that depend on the row alone."""

from __future__ import annotations

import numpy as np
import pytest
from cpu.test_attention import Sequence, paged
from cpu.test_rope import case, read_back, rotated, tables
from helpers.cpu_shim import Array, Kv, Shim, bf16, from_bf16, isas

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


def formula(part: Part, window: int = 0, softcap: float = 0.0) -> tuple[Array, Array]:
    """([n, N, D] of the part's queries in float64, the same with p rounded to float16)."""
    seq, first, end = part
    q, k, v = from_f16(seq.q[first:end]), from_f16(seq.k[:end]), from_f16(seq.v[:end])
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    scores = np.einsum("qnd,knd->nqk", q, k) * q.shape[2] ** -0.5
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    own, key = np.arange(first, end)[:, None], np.arange(end)
    seen = (key <= own) & (key > own - window if window else key >= 0)
    scores = np.where(seen, scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    exact, plain = (
        np.einsum("nqk,knd->qnd", x / x.sum(-1, keepdims=True), v)
        for x in (p, from_f16(f16(p)).reshape(p.shape))
    )
    return exact, plain


def assert_no_worse(got: list[Array], parts: list[Part], is_f16: bool, **options: float) -> None:
    """The errors of all rows together, largest and mean square, are at most twice those of the
    plain formula with p and the result rounded. got: bits, of float16 or of bfloat16."""
    own, plain = [], []
    for bits, part in zip(got, parts, strict=True):
        exact, rounded_p = formula(part, **options)
        rounded = from_f16(f16(rounded_p)) if is_f16 else from_bf16(bf16(rounded_p))
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
    (_, N, D), K = parts[0][0].q.shape, parts[0][0].k.shape[1]
    q, batch, kv = paged(parts, P, seed)
    kv = Kv(kv.k, kv.v, is_f16=True, out_is_f16=is_f16)
    sizes = dict(n_heads=N, n_kv_heads=K, head_dim=D, max_seqs=len(parts))
    sizes["max_position"] = max(batch.kv_lengths)
    with Shim(isa, n_threads, captured=captured, **sizes) as shim:
        out = shim.attention(q, batch, kv, N, D**-0.5, layer=1, **options)
    cuts = np.cumsum(batch.query_lengths)[:-1]
    return [part.reshape(-1, N, D) for part in np.split(out, cuts)]


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


def one_key(values: Array) -> Part:
    """One query of one head that sees one key: the answer is that key's value."""
    seq = sequence(1, 1, 1, len(values))
    seq.v[0, 0] = f16(values)
    return seq, 0, 1


def test_every_kind_of_value_comes_through(isa: str) -> None:
    """The smallest subnormal, the border to normal numbers, the largest, -0 (which becomes +0)."""
    tiny, small, large = 2.0**-24, 2.0**-14, 65504.0
    values = np.array([tiny, -tiny, 3 * tiny, small - tiny, small, -large, large, -0.0] * 4)
    (got,) = run(isa, [one_key(values)])
    assert got.ravel().tolist() == f16(np.where(values == 0, 0.0, values)).tolist()


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
