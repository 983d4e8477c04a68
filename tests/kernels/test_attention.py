"""attention on a GPU: the formula over pages of NaN, and the same bits alone, in a batch, in a
larger bucket and, between chunks of several tokens, however the prompt was cut.

Head sizes 64 and 128 with pages of 64 or more have a kernel of their own on the Hopper path."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from cpu.test_attention import Sequence, paged, sequence
from helpers.cpu_shim import Array, Batch, Kv, Shim, bf16, from_bf16
from kernels.judge import attention, judge_rows

pytestmark = pytest.mark.gpu

Part = tuple[Sequence, int, int]  # a sequence, its first query of the step, its length

# N, K, D, P: groups 1, 2, 4, 7, 8 and 20 (a decode row of two tiles), every instance of head_dim
# and sizes below one, every page size.
HEADS = [
    (1, 1, 32, 16),
    (4, 2, 64, 16),
    (4, 4, 64, 64),
    (8, 1, 64, 128),
    (8, 4, 128, 256),
    (7, 1, 128, 64),
    (20, 1, 128, 64),
    (8, 2, 40, 32),
    (7, 1, 72, 64),
    (4, 1, 80, 64),
    (20, 1, 96, 16),
    (8, 1, 128, 128),
    (32, 8, 128, 64),
    (3, 1, 104, 16),
    (2, 2, 256, 256),
    (8, 4, 256, 64),
]
# Every page size at every head size that has an instance of its own, groups in turn.
SQUARE = [
    (2 * group, 2, D, P)
    for i, D in enumerate((64, 80, 96, 128, 256))
    for P, group in zip((16, 32, 64, 128, 256), np.roll((1, 2, 4, 7, 8), i).tolist(), strict=True)
]


def run(
    path: str, seqs: list[Part], P: int = 64, seed: int = 0, captured: bool = False,
    bucket: tuple[int, int] = (0, 0), **options: Any,
) -> list[Array]:  # fmt: skip
    """Bits of each sequence's rows, [n, N, D]. bucket: rows and sequences beyond the batch's."""
    _, N, D = seqs[0][0].q.shape
    q, batch, kv = paged(seqs, P, seed)
    if bucket != (0, 0):
        batch.bucket_seqs = len(seqs) + bucket[0]
        batch.bucket_tokens = len(q) + bucket[1]
    sizes = dict(n_heads=N, n_kv_heads=seqs[0][0].k.shape[1], head_dim=D)
    with Shim(path, captured=captured, **sizes) as shim:
        out = shim.attention(q, batch, kv, N, D**-0.5, layer=1, **options)
    assert len(out) == len(q)
    return [part.reshape(-1, N, D) for part in np.split(out, np.cumsum(batch.query_lengths)[:-1])]


def assert_formula(part: Part, rows: Array, window: int = 0, softcap: float = 0.0) -> None:
    seq, first, end = part
    q, k, v = (from_bf16(x) for x in (seq.q[first:end], seq.k[:end], seq.v[:end]))
    exact, plain = attention(q, k, v, first, q.shape[2] ** -0.5, window, softcap)
    judge_rows(f"queries {first} to {end}", from_bf16(rows), exact, plain)


def check(path: str, seqs: list[Part], P: int = 64, **options: Any) -> list[Array]:
    got = run(path, seqs, P, **options)
    formula = {name: options[name] for name in ("window", "softcap") if name in options}
    for part, rows in zip(seqs, got, strict=True):
        assert_formula(part, rows, **formula)
    return got


def same(a: Array, b: Array) -> bool:
    return np.array_equal(a, b)


# ---- the formula ----


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize(("N", "K", "D", "P"), HEADS)
def test_mixed_batch_is_the_formula(
    path: str, N: int, K: int, D: int, P: int, captured: bool
) -> None:
    """One key, decode rows about a block's end, a split one, chunks with and without a past, a
    chunk as small as a decode row."""
    cases = [(1, 0), (63, 62), (64, 63), (65, 64), (1000, 999), (130, 65), (300, 0), (90, 88)]
    check(path, [(sequence(n, N, K, D), first, n) for n, first in cases], P, captured=captured)


@pytest.mark.parametrize(("N", "K", "D", "P"), SQUARE)
def test_page_sizes_at_head_sizes(path: str, N: int, K: int, D: int, P: int) -> None:
    cases = [(1, 0), (65, 64), (700, 699), (300, 200), (90, 0)]
    check(path, [(sequence(n, N, K, D), first, n) for n, first in cases], P)


@pytest.mark.parametrize("length", [256, 511, 512, 513, 1023, 4096, 4097, 20000])
@pytest.mark.parametrize(("N", "K", "D"), [(4, 1, 128), (8, 2, 64), (2, 1, 256)])
def test_long_decode_rows_are_merged_from_splits(
    path: str, length: int, N: int, K: int, D: int
) -> None:
    check(path, [(sequence(length, N, K, D), length - 1, length)])


@pytest.mark.parametrize(("N", "K", "D"), [(4, 1, 128), (1, 1, 64)])
def test_a_chunk_after_a_long_past(path: str, N: int, K: int, D: int) -> None:
    check(path, [(sequence(5000, N, K, D), 4800, 5000)])


def test_many_decode_rows_of_all_lengths(path: str) -> None:
    rng = np.random.default_rng(1)
    lengths = [1, 63, 64, 65, 1000, 4097, *rng.integers(1, 1500, 150).tolist()]
    check(path, [(sequence(n, 4, 2, 64, seed=i), n - 1, n) for i, n in enumerate(lengths)], 16)


@pytest.mark.parametrize(("N", "K", "D"), [(8, 2, 128), (4, 2, 64)])
def test_rows_leave_alone_what_their_block_still_reads_of_the_row_before(
    path: str, N: int, K: int, D: int
) -> None:
    """More rows than a GPU has blocks for at once. The Hopper path once sent the next row's keys
    over values that ldmatrix was still reading: now and then, and only where a block went on to a
    row of so few keys that its last ones, NaN behind them, followed at once."""
    lengths = [512] * 140 + np.random.default_rng(2).integers(100, 200, 300).tolist()
    seqs: list[Part] = [(sequence(n, N, K, D, seed=i), n - 1, n) for i, n in enumerate(lengths)]
    first = check(path, seqs, repeat=4)
    for _ in range(8):
        assert all(map(same, run(path, seqs, repeat=4), first))


def flat(seq: Sequence) -> Sequence:
    """With weights so even that each page of 128k keys counts for more than the rounding."""
    return Sequence(bf16(from_bf16(seq.q) / 4), seq.k, seq.v)


@pytest.mark.parametrize(("N", "D", "P"), [(4, 64, 64), (4, 128, 64), (7, 128, 16), (1, 96, 256)])
def test_context_of_128k(path: str, N: int, D: int, P: int) -> None:
    n = 131072
    seq = flat(sequence(n, N, 1, D))
    check(path, [(seq, n - 1, n), (seq, n - 16, n)], P)


@pytest.mark.parametrize(("D", "P"), [(64, 64), (96, 16)])
def test_more_sequences_than_the_plan_has_threads(path: str, D: int, P: int) -> None:
    """1,024 of them at once; after those too there are split rows and chunks."""
    rng = np.random.default_rng(3)
    keys = rng.integers(1, 9, 1100).tolist()
    seqs: list[Part] = [(sequence(n, 2, 1, D, seed=i), n - 1, n) for i, n in enumerate(keys)]
    long = sequence(1300, 2, 1, D)
    for at in (1090, 1030, 1024, 1023, 500, 0):
        seqs[at] = (long, 1299, 1300)
    seqs[1060] = (long, 0, 70)
    check(path, seqs, P)


@pytest.mark.parametrize("D", [64, 80, 128])
def test_a_bucket_without_a_sequence_is_no_fault(path: str, D: int) -> None:
    _, batch, kv = paged([(sequence(40, 2, 1, D), 30, 40)], 64)
    batch.query_lengths, batch.kv_lengths = [], []
    batch.bucket_seqs, batch.bucket_tokens = 4, 16
    with Shim(path) as shim:
        assert shim.attention(np.empty((0, 2 * D), np.uint16), batch, kv, 2, 1.0).size == 0


@pytest.mark.parametrize("D", [32, 64, 128])
@pytest.mark.parametrize("window", [1, 15, 64, 100, 1500])
def test_window(path: str, window: int, D: int) -> None:
    seq = sequence(1300, 2, 1, D)
    check(path, [(seq, 1100, 1300), (seq, 1299, 1300), (seq, 1296, 1300)], window=window)


@pytest.mark.parametrize(("D", "P"), [(32, 16), (64, 64), (128, 64)])
def test_pages_before_the_window_are_never_read(path: str, D: int, P: int) -> None:
    """A window's past may have been given back: its page ids are not valid any more."""
    seq = sequence(1300, 2, 1, D)
    for first in (1230, 1296, 1299):
        q, batch, kv = paged([(seq, first, 1300)], P)
        with Shim(path) as shim:
            whole = shim.attention(q, batch, kv, 2, D**-0.5, layer=1, window=40)
            gone = (first + 1 - 40) // P
            kv.v[1, batch.page_table[0, :gone]] = 0xFFFF
            kv.k[1, batch.page_table[0, :gone]] = 0xFFFF
            batch.page_table[0, :gone] = -(2**24)
            part = shim.attention(q, batch, kv, 2, D**-0.5, layer=1, window=40)
        assert same(whole, part)


@pytest.mark.parametrize("D", [64, 128])
def test_softcap(path: str, D: int) -> None:
    seq = sequence(300, 4, 2, D)
    check(path, [(seq, 0, 300), (seq, 299, 300)], softcap=3.0)


@pytest.mark.parametrize("D", [32, 64, 128])
def test_extreme_scores_stay_finite(path: str, D: int) -> None:
    """Scores of some thousands, growing along the keys: each block sets a new maximum."""
    seq = sequence(400, 2, 1, D)
    seq.q[:] = 0x3F80
    ramp = np.linspace(0, 400, 400)[:, None, None].astype(np.float32)
    seq.k[:] = np.broadcast_to(ramp.view(np.uint32) >> 16, seq.k.shape)
    check(path, [(seq, 0, 400), (seq, 399, 400)])


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize(("N", "D"), [(2, 32), (16, 32), (2, 64), (16, 128)])
def test_a_nan_of_ones_own_is_not_hidden(path: str, name: str, N: int, D: int) -> None:
    seq = sequence(70, N, 1, D)
    getattr(seq, name)[66] = 0x7FC0
    (got,) = run(path, [(seq, 64, 70)])
    is_nan = np.isnan(from_bf16(got)).all((1, 2))
    assert is_nan[2]
    assert is_nan[3:].tolist() == [name != "q"] * 3


# ---- the same bits ----


@pytest.mark.parametrize(("N", "K", "D"), [(4, 2, 64), (7, 1, 128), (2, 1, 256)])
def test_batch_mates_and_buckets_change_no_bits(path: str, N: int, K: int, D: int) -> None:
    own = sequence(1500, N, K, D)
    parts: list[Part] = [(own, 1499, 1500), (own, 1400, 1500), (own, 0, 333), (own, 255, 256)]
    mates: list[Part] = [
        (sequence(n, N, K, D, seed=7 + i), first, n)
        for i, (n, first) in enumerate([(700, 699), (3, 2), (900, 200), (2100, 2099)])
    ]
    for own_part in parts:
        (alone,) = run(path, [own_part])
        for seqs in ([*mates, own_part], [own_part, *mates], [mates[0], own_part, *mates[1:]]):
            at = next(i for i, part in enumerate(seqs) if part is own_part)
            assert same(run(path, seqs, seed=at)[at], alone)
        assert same(run(path, [own_part], captured=True, bucket=(9, 500))[0], alone)


@pytest.mark.parametrize(("N", "K", "D"), [(4, 1, 128), (4, 2, 64), (2, 2, 96), (2, 1, 256)])
@pytest.mark.parametrize("window", [0, 50])
@pytest.mark.parametrize("P", [16, 64])
def test_chunks_of_several_tokens_change_no_bits(
    path: str, N: int, K: int, D: int, window: int, P: int
) -> None:
    """Keys that a step has not written yet are NaN in its pages. Chunks of 2 to 4 tokens and tails
    are worked on as decode rows are, by another division of labour: the same sums."""
    seq = sequence(1100, N, K, D)
    (whole,) = run(path, [(seq, 0, 1100)], P, window=window)
    cuts = [0, 2, 5, 64, 66, 200, 777, 1024, 1026, 1100]
    for first, end in zip(cuts, cuts[1:], strict=False):
        (part,) = run(path, [(seq, first, end)], P, seed=end, window=window)
        assert same(part, whole[first:end]), (first, end)


def test_unsplit_decode_rows_have_the_bits_of_the_prompt(path: str) -> None:
    """Where one kernel serves both: not with the Hopper path's chunks."""
    seq = sequence(256, 4, 1, 128)
    (whole,) = run(path, [(seq, 0, 256)], 32)
    for position in (0, 1, 62, 63, 64, 100, 255):
        (row,) = run(path, [(seq, position, position + 1)], 32)
        assert same(row[0], whole[position]), position


def test_padding_sequences_write_nothing(path: str) -> None:
    seq = sequence(40, 2, 1, 32)
    q, batch, kv = paged([(seq, 30, 40)], 16)
    batch.query_lengths, batch.kv_lengths = [0, 10, 0], [0, 40, 0]
    batch.page_table = np.vstack([batch.page_table] * 3)
    with Shim(path) as shim:
        padded = shim.attention(q, batch, kv, 2, 32**-0.5, layer=1)
    assert same(padded.reshape(10, 2, 32), run(path, [(seq, 30, 40)])[0])


def last_pages(path: str) -> Iterator[tuple[Array, Batch, Kv]]:
    """The same batch in its own pool, and in the last pages of one of more than 4 Gi elements."""
    seq = sequence(300, 4, 1, 128)
    for pool_pages in (0, 2**32 // (64 * 128) + 100):
        q, batch, kv = paged([(seq, 299, 300), (seq, 200, 300)], 64)
        first = max(pool_pages - kv.k.shape[1], 0)
        batch.page_table = np.where(batch.page_table >= 0, batch.page_table + first, -1)
        # Every key of both is read, so every page of the table.
        assert first + kv.k.shape[1] - 1 in batch.page_table
        yield q, batch, Kv(kv.k[1:], kv.v[1:], pool_pages)


def test_a_pool_of_more_than_4_gi_elements(path: str) -> None:
    results = []
    for q, batch, kv in last_pages(path):
        with Shim(path) as shim:
            results.append(shim.attention(q, batch, kv, 4, 128**-0.5, layer=0))
    assert same(*results)
