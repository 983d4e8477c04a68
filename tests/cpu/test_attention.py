"""attention over paged KV: the formula, NaN where nobody may look, and the same bits however a
sequence was cut, batched or paged."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from cpu.tolerance import assert_close
from helpers.cpu_shim import Batch, Kv, Shim, bf16, from_bf16, isas


@dataclass
class Sequence:
    """q: [L, N, D], k and v: [L, K, D], all bits of bfloat16."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray


def sequence(length: int, N: int, K: int, D: int, seed: int = 0) -> Sequence:
    rng = np.random.default_rng([seed, length])
    q, k, v = (rng.standard_normal((length, heads, D)).clip(-4, 4) for heads in (N, K, K))
    return Sequence(bf16(2 * q), bf16(k), bf16(v))


def reference(
    seq: Sequence, first: int, scale: float, window: int = 0, softcap: float = 0.0
) -> np.ndarray:
    """Queries first .. of the sequence, [n, N, D]."""
    q, k, v = (from_bf16(x) for x in (seq.q[first:], seq.k, seq.v))
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    scores = np.einsum("qnd,knd->nqk", q, k) * scale
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    own, key = np.arange(first, len(seq.k))[:, None], np.arange(len(seq.k))
    seen = (key <= own) & (key > own - window if window else key >= 0)
    scores = np.where(seen, scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("nqk,knd->qnd", p / p.sum(-1, keepdims=True), v)


def paged(
    seqs: list[tuple[Sequence, int, int]], P: int, seed: int = 0
) -> tuple[np.ndarray, Batch, Kv]:
    """(sequence, first query, end) each; keys from `end` on are not in the pages, which hold NaN
    wherever nothing was written. Pages are shuffled; an id that must not be used is -1."""
    rng = np.random.default_rng(seed)
    counts = [-(-end // P) for _, _, end in seqs]
    n_pages = sum(counts) + 3
    _, K, D = seqs[0][0].k.shape
    free = list(rng.permutation(n_pages))
    table = np.full((len(seqs), max(counts) + 1), -1)
    k = np.full((2, n_pages, K, P, D), 0xFFFF, np.uint16)
    v = k.copy()
    for s, (seq, _, end) in enumerate(seqs):
        for i in range(counts[s]):
            table[s, i] = page = free.pop()
            rows = slice(i * P, min((i + 1) * P, end))
            n = rows.stop - rows.start
            k[1, page, :, :n] = seq.k[rows].transpose(1, 0, 2)
            v[1, page, :, :n] = seq.v[rows].transpose(1, 0, 2)
    q = np.concatenate([seq.q[first:end].reshape(end - first, -1) for seq, first, end in seqs])
    batch = Batch([end - first for _, first, end in seqs], [end for *_, end in seqs], table)
    return np.ascontiguousarray(q), batch, Kv(k, v)


def run(
    isa: str,
    seqs: list[tuple[Sequence, int, int]],
    P: int = 16,
    n_threads: int = 1,
    seed: int = 0,
    captured: bool = False,
    is_f16: bool = False,
    out_is_f16: bool = False,
    **options: float,
) -> list[np.ndarray]:
    """Bits of each sequence's rows, [n, N, D]. is_f16: the sequences are float16's bits."""
    (_, N, D), K = seqs[0][0].q.shape, seqs[0][0].k.shape[1]
    q, batch, kv = paged(seqs, P, seed)
    kv = Kv(kv.k, kv.v, is_f16=is_f16, out_is_f16=out_is_f16)
    sizes = dict(n_heads=N, n_kv_heads=K, head_dim=D, max_seqs=len(seqs))
    sizes["max_position"] = max(batch.kv_lengths)
    with Shim(isa, n_threads, captured=captured, **sizes) as shim:
        out = shim.attention(q, batch, kv, N, D**-0.5, layer=1, **options)
    cuts = np.cumsum(batch.query_lengths)[:-1]
    return [part.reshape(-1, N, D) for part in np.split(out, cuts)]


# N, K, D, P: every group size of the known families, head sizes with and without tails.
HEADS = [
    (1, 1, 32, 16),
    (4, 2, 64, 16),
    (8, 2, 40, 32),
    (7, 1, 72, 64),
    (8, 1, 128, 128),
    (2, 2, 256, 256),
    (3, 1, 104, 16),
]


@pytest.mark.parametrize(("N", "K", "D", "P"), HEADS)
def test_mixed_batch_is_the_formula(isa: str, N: int, K: int, D: int, P: int) -> None:
    """One key, a decode row past a block, a chunk after a past, a whole prompt with an odd tail."""
    cases = [(1, 0), (65, 64), (130, 65), (77, 0)]
    seqs = [(sequence(n, N, K, D), first, n) for n, first in cases]
    for (seq, first, _), got in zip(seqs, run(isa, seqs, P, n_threads=2), strict=True):
        assert_close("attention", from_bf16(got), reference(seq, first, D**-0.5))


@pytest.mark.parametrize("length", [1023, 1024, 1025, 2100])
def test_long_kv_is_merged_from_splits(isa: str, length: int) -> None:
    seq = sequence(length, 2, 1, 32)
    (got,) = run(isa, [(seq, length - 3, length)])
    assert_close("attention", from_bf16(got), reference(seq, length - 3, 32**-0.5))


@pytest.mark.parametrize("window", [1, 15, 64, 100, 1500])
def test_window(isa: str, window: int) -> None:
    seq = sequence(1300, 2, 1, 32)
    (got,) = run(isa, [(seq, 1230, 1300)], window=window)
    assert_close("attention", from_bf16(got), reference(seq, 1230, 32**-0.5, window))


def test_pages_before_the_window_are_never_read(isa: str) -> None:
    """A window's past may have been given back: its page ids are not valid any more."""
    seq = sequence(1300, 2, 1, 32)
    q, batch, kv = paged([(seq, 1296, 1300)], 16)
    sizes = dict(n_heads=2, n_kv_heads=1, head_dim=32, max_position=1300)
    with Shim(isa, **sizes) as shim:
        whole = shim.attention(q, batch, kv, 2, 32**-0.5, layer=1, window=40)
        gone = (1296 + 1 - 40) // 16
        kv.v[1, batch.page_table[0, :gone]] = 0xFFFF
        kv.k[1, batch.page_table[0, :gone]] = 0xFFFF
        batch.page_table[0, :gone] = -(2**24)
        cut = shim.attention(q, batch, kv, 2, 32**-0.5, layer=1, window=40)
    assert np.array_equal(whole, cut)


def test_softcap(isa: str) -> None:
    seq = sequence(90, 4, 2, 64)
    (got,) = run(isa, [(seq, 0, 90)], softcap=3.0)
    assert_close("attention", from_bf16(got), reference(seq, 0, 64**-0.5, softcap=3.0))


def test_extreme_scores_stay_finite(isa: str) -> None:
    """Scores of some thousands, growing along the keys: each block sets a new maximum."""
    seq = sequence(200, 2, 1, 32)
    ramp = np.linspace(0, 400, 200)[:, None, None]
    seq.q[:] = bf16(np.ones((200, 2, 32)))
    seq.k[:] = bf16(np.broadcast_to(ramp, (200, 1, 32)))
    (got,) = run(isa, [(seq, 0, 200)])
    assert_close("attention", from_bf16(got), reference(seq, 0, 32**-0.5))


def test_a_nan_of_ones_own_is_not_hidden(isa: str) -> None:
    for name in ("q", "k", "v"):
        seq = sequence(70, 2, 1, 32)
        getattr(seq, name)[66] = 0x7FC0
        (got,) = run(isa, [(seq, 64, 70)])
        is_nan = np.isnan(from_bf16(got)).all((1, 2))
        assert is_nan[2]
        assert is_nan[3:].tolist() == [name != "q"] * 3, name


# ---- the same bits ----


@pytest.mark.parametrize("softcap", [0.0, 30.0])
def test_bits_are_the_same_on_every_set_and_thread_count(softcap: float) -> None:
    seqs = [(sequence(n, 4, 2, 40), first, n) for n, first in [(65, 64), (150, 90), (20, 0)]]
    results = [
        b"".join(part.tobytes() for part in run(isa, seqs, n_threads=n, softcap=softcap))
        for isa in isas()
        for n in (1, 2)
    ]
    assert len(set(results)) == 1


@pytest.mark.parametrize(("N", "K", "D"), [(4, 2, 64), (6, 1, 128)])
def test_order_of_sums_is_the_same_on_every_fast_set(N: int, K: int, D: int) -> None:
    """Rounding to bfloat16 hides a wrong order of a sum in all but one of thousands of results."""
    long = sequence(1500, N, K, D)
    long.q[:] = bf16(4 * from_bf16(long.q))
    rows = [(long, first, first + 1) for first in range(1400, 1500)]
    fast = [isa for isa in isas() if isa != "scalar"]
    results = [
        b"".join(part.tobytes() for seqs in (rows, [(long, 0, 700)]) for part in run(isa, seqs))
        for isa in fast
    ]
    assert len(set(results)) <= 1


def test_long_decode_bits_do_not_depend_on_threads(isa: str) -> None:
    """Two threads take the splits of one task apart, one thread does not."""
    seq = sequence(3000, 2, 1, 32)
    one, two, three = (run(isa, [(seq, 2999, 3000)], n_threads=n)[0] for n in (1, 2, 3))
    assert np.array_equal(one, two) and np.array_equal(one, three)
    assert_close("attention", from_bf16(one), reference(seq, 2999, 32**-0.5))


@pytest.mark.parametrize("P", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("window", [0, 50])
def test_bits_depend_on_neither_chunks_nor_pages_nor_mates(P: int, window: int) -> None:
    """The rows of one prompt: whole, in odd chunks, one by one as decode would; keys that a step
    has not written yet are NaN in its pages."""
    isa = isas()[0]
    seq, mate = sequence(1100, 4, 2, 64), sequence(333, 4, 2, 64, seed=5)
    (whole,) = run(isa, [(seq, 0, 1100)], window=window)
    cuts = [0, 1, 64, 65, 200, 777, 1024, 1025, 1099, 1100]
    for first, end in zip(cuts, cuts[1:], strict=False):
        mates = [(mate, 300, 333), (seq, first, end), (mate, 5, 6)]
        part = run(isa, mates, P, n_threads=2, seed=end, window=window)[1]
        assert np.array_equal(part, whole[first:end]), (first, end)
    for position in (0, 63, 64, 511, 1050):
        (row,) = run(isa, [(seq, position, position + 1)], P, window=window)
        assert np.array_equal(row[0], whole[position]), position


def test_padding_sequences_write_nothing(isa: str) -> None:
    seq = sequence(40, 2, 1, 32)
    q, batch, kv = paged([(seq, 30, 40)], 16)
    batch.query_lengths, batch.kv_lengths = [0, 10, 0], [0, 40, 0]
    batch.page_table = np.vstack([batch.page_table] * 3)
    with Shim(isa, n_threads=2, n_heads=2, n_kv_heads=1, head_dim=32) as shim:
        padded = shim.attention(q, batch, kv, 2, 32**-0.5, layer=1)
    assert np.array_equal(padded.reshape(10, 2, 32), run(isa, [(seq, 30, 40)])[0])
