"""rope_write on a GPU: q rotated; k rotated and v plain, in the right rows of the right pages."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cpu.test_rope import LONG, MAX_POSITION, long_case, read_back, rotated, tables, written
from cpu.tolerance import assert_close
from helpers.cpu_shim import Array, Batch, Kv, Shim, bf16, from_bf16
from helpers.marks import small
from kernels.judge import judge_rounded

pytestmark = pytest.mark.gpu

N_PAGES = 64

# N, K, D, P, rotary_dim, pairs. Vectors of 8 columns: halves of whole vectors and not (any), heads
# of an odd number of vectors, part of a head rotated, more heads than a block takes at once.
SHAPES = [
    (2, 2, 32, 16, 32, False),
    (4, 1, 40, 32, 40, False),
    small(7, 1, 64, 64, 64, False),
    (8, 8, 80, 16, 80, False),
    (8, 2, 96, 64, 96, False),
    (32, 8, 128, 64, 128, False),
    (28, 4, 128, 256, 128, False),
    (2, 1, 256, 128, 256, False),
    (40, 8, 256, 64, 256, False),
    (8, 2, 128, 256, 64, False),
    (4, 2, 72, 16, 16, False),
    small(4, 2, 72, 16, 24, False),
    (4, 2, 64, 16, 0, False),
    (2, 1, 256, 128, 256, True),
    (32, 8, 128, 64, 128, True),
    small(4, 2, 72, 16, 24, True),
    (4, 2, 72, 16, 20, True),
    (3, 1, 40, 16, 40, True),
]


def assert_rope(bits: Array, want: Array) -> None:
    """Each element by itself, and all of them as the plain formula."""
    assert_close("rope", from_bf16(bits), want)
    judge_rounded("rope", bits, want)


def case(N: int, K: int, D: int, P: int) -> tuple[Array, Batch, Kv]:
    """Two decode rows, three chunks and two padding sequences between them, 20 rows of a larger
    bucket; pages of layer 1 of 2, shuffled, but the first token is written to the pool's last."""
    rng = np.random.default_rng([N, K, D, P])
    query, lengths = [1, 1, 5, 0, 70, 0, 3], [P + 1, 2 * P, 5, 0, 100, 0, P + 3]
    ids = rng.permutation(N_PAGES)
    first = 2 * 7 + 1  # slot 2's second page, which holds the first token
    last = int(np.argmax(ids))
    ids[[first, last]] = ids[[last, first]]
    table = ids[: 8 * 7].reshape(8, 7)
    positions = np.concatenate([np.arange(n - q, n) for q, n in zip(query, lengths, strict=True)])
    positions[5:40] = rng.integers(0, MAX_POSITION, 35)  # any position: they are RoPE's alone
    batch = Batch(
        query, lengths, table, seq_slot=[2, 7, 1, 0, 3, 6, 5], n_decode=2,
        positions=positions % MAX_POSITION, bucket_seqs=8, bucket_tokens=100,
    )  # fmt: skip
    pages = np.full((2, N_PAGES, K, P, D), 0xFFFF, np.uint16)
    qkv = from_bf16(bf16(rng.uniform(-4, 4, (len(positions), (N + 2 * K) * D))))
    return qkv.astype(np.float32), batch, Kv(pages.copy(), pages.copy())


@pytest.mark.parametrize(("N", "K", "D", "P", "rotary_dim", "pairs"), SHAPES)
@pytest.mark.parametrize("captured", [False, True])
def test_rope_write(
    path: str, N: int, K: int, D: int, P: int, rotary_dim: int, pairs: bool, captured: bool
) -> None:
    qkv, batch, kv = case(N, K, D, P)
    with Shim(path, captured=captured) as shim:
        q = shim.rope_write(qkv, *tables(rotary_dim), batch, kv, N, rotary_dim, 1, pairs)
    heads = qkv.reshape(len(qkv), N + 2 * K, D)
    want = rotated(heads[:, : N + K], batch.positions, rotary_dim, pairs)
    check(q, heads, want, batch, kv)


def check(q: Array, heads: Array, want: Array, batch: Batch, kv: Kv, first_page: int = 0) -> None:
    """heads: [T, N + 2 K, D] as given; want: its first N + K rotated; kv begins at first_page."""
    K, N = kv.k.shape[2], len(heads[0]) - 2 * kv.k.shape[2]
    assert_rope(q.reshape(want[:, :N].shape), want[:, :N])
    assert_rope(read_back(kv.k, batch, first_page), want[:, N:])
    assert np.array_equal(from_bf16(read_back(kv.v, batch, first_page)), heads[:, N + K :])
    assert (kv.k == 0xFFFF).all() and (kv.v == 0xFFFF).all(), "wrote outside its rows"


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("P", [16, 256])
@pytest.mark.parametrize("rotary_dim", [64, 24])
def test_the_end_of_a_context_of_128k(path: str, P: int, rotary_dim: int, pairs: bool) -> None:
    """By vectors, and column by column."""
    qkv, batch, kv = long_case(P)
    with Shim(path) as shim:
        angles = tables(rotary_dim, LONG)
        q = shim.rope_write(qkv, *angles, batch, kv, 4, rotary_dim, 1, pairs)
    heads = qkv.reshape(len(qkv), 4 + 2 * 2, 64)
    check(q, heads, rotated(heads[:, :6], batch.positions, rotary_dim, pairs, LONG), batch, kv)


@pytest.mark.parametrize("pairs", [False, True])
def test_bits_do_not_depend_on_the_batch(path: str, pairs: bool) -> None:
    qkv, batch, kv = case(8, 2, 128, 64)
    _, _, alone_kv = case(8, 2, 128, 64)
    first, last = 7, 77  # the fifth sequence
    alone = replace(
        batch, query_lengths=[70], kv_lengths=[100], seq_slot=[3], n_decode=0, bucket_seqs=0,
        bucket_tokens=0, positions=batch.positions[first:last],
    )  # fmt: skip
    with Shim(path) as shim:
        q = shim.rope_write(qkv, *tables(128), batch, kv, 8, 128, 1, pairs)
        one = shim.rope_write(qkv[first:last], *tables(128), alone, alone_kv, 8, 128, 1, pairs)
    assert np.array_equal(q[first:last], one)
    assert np.array_equal(read_back(kv.k, alone), read_back(alone_kv.k, alone))


@pytest.mark.sanitize
def test_many_sequences_are_told_apart(path: str) -> None:
    """Chunks of every small length, empty ones among them: the search for a token's sequence."""
    rng = np.random.default_rng(8)
    query = [1] * 33 + rng.integers(0, 4, 200).tolist()
    lengths = [n + int(rng.integers(0, 28)) if n > 0 else 0 for n in query]
    table = rng.permutation(2 * len(query)).reshape(-1, 2)
    positions = rng.integers(0, MAX_POSITION, sum(query))
    batch = Batch(query, lengths, table, n_decode=33, positions=positions)
    pages = np.full((2, 2 * len(query), 1, 16, 32), 0xFFFF, np.uint16)
    kv = Kv(pages.copy(), pages.copy())
    qkv = from_bf16(bf16(rng.uniform(-4, 4, (len(positions), 96)))).astype(np.float32)
    with Shim(path) as shim:
        shim.rope_write(qkv, *tables(32), batch, kv, 1, 32, 1)
    assert np.array_equal(from_bf16(read_back(kv.v, batch)), qkv[:, None, 64:])
    assert (kv.v == 0xFFFF).all(), "wrote outside its rows"


@pytest.mark.parametrize("buckets", [(0, 0), (4, 16)])
@pytest.mark.parametrize("D", [64, 80])
def test_no_tokens_write_nothing(path: str, D: int, buckets: tuple[int, int]) -> None:
    _, batch, kv = case(2, 1, D, 16)
    batch = Batch([], [], batch.page_table, bucket_seqs=buckets[0], bucket_tokens=buckets[1])
    with Shim(path) as shim:
        q = shim.rope_write(np.empty((0, 4 * D)), *tables(D), batch, kv, 2, D, 1)
    assert q.shape == (0, 2 * D)
    assert (kv.k == 0xFFFF).all() and (kv.v == 0xFFFF).all()


@pytest.mark.parametrize("page", [-1, N_PAGES, 2**31 - 1])
def test_a_page_that_is_not_there_is_not_written(path: str, page: int) -> None:
    qkv, batch, kv = case(2, 1, 64, 16)
    batch.page_table[:] = page
    with Shim(path) as shim:
        shim.rope_write(qkv, *tables(64), batch, kv, 2, 64, 1)
    assert (kv.k == 0xFFFF).all() and (kv.v == 0xFFFF).all()


def test_last_page_of_a_pool_beyond_4_gi_elements(path: str) -> None:
    N, K, D, P, pool_pages = 2, 8, 128, 64, 32800
    assert 2 * pool_pages * K * D * P > 2**32
    qkv, batch, kv = case(N, K, D, P)
    kv.pool_pages = pool_pages
    first_page = pool_pages - N_PAGES
    batch.page_table = batch.page_table + first_page
    assert pool_pages - 1 in {page for page, _ in written(batch, P)}
    with Shim(path) as shim:
        q = shim.rope_write(qkv, *tables(D), batch, kv, N, D, 1)
    heads = qkv.reshape(len(qkv), N + 2 * K, D)
    want = rotated(heads[:, : N + K], batch.positions, D, False)
    check(q, heads, want, batch, kv, first_page)
