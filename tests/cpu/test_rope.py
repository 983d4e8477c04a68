"""rope_write: q rotated; k rotated and v plain in the right rows of the right pages only."""

import functools

import numpy as np
import pytest
from cpu.tolerance import assert_close
from helpers.cpu_shim import Batch, Kv, Shim, bf16, from_bf16, isas

MAX_POSITION = 400
LONG = 131_072


@functools.cache
def tables(rotary_dim: int, n_positions: int = MAX_POSITION) -> tuple[np.ndarray, np.ndarray]:
    frequency = 10000.0 ** (-np.arange(0, rotary_dim, 2) / max(rotary_dim, 1))
    angle = np.arange(n_positions)[:, None] * frequency
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def rotated(
    x: np.ndarray,
    positions: np.ndarray,
    rotary_dim: int,
    pairs: bool,
    n_positions: int = MAX_POSITION,
) -> np.ndarray:
    """x: [T, heads, D]."""
    rows = (table[positions] for table in tables(rotary_dim, n_positions))
    cosines, sines = (row.astype(np.float64)[:, None] for row in rows)
    out = x.astype(np.float64).copy()
    half = rotary_dim // 2
    a = slice(0, rotary_dim, 2) if pairs else slice(0, half)
    b = slice(1, rotary_dim, 2) if pairs else slice(half, rotary_dim)
    out[..., a] = x[..., a] * cosines - x[..., b] * sines
    out[..., b] = x[..., b] * cosines + x[..., a] * sines
    return out


def case(N: int, K: int, D: int, P: int, seed: int = 0) -> tuple[np.ndarray, Batch, Kv]:
    """Three sequences and a padding one between; pages of layer 1 of 2, shuffled."""
    rng = np.random.default_rng(seed)
    query, lengths = [1, 5, 0, 70], [P + 1, 5, 0, 100]
    table = rng.permutation(48).reshape(4, 12)
    positions = np.concatenate([np.arange(n - q, n) for q, n in zip(query, lengths, strict=True)])
    batch = Batch(query, lengths, table, seq_slot=[2, 0, 1, 3], n_decode=1, positions=positions + 7)
    pages = np.full((2, 48, K, P, D), 0xFFFF, np.uint16)
    qkv = rng.uniform(-4, 4, (len(positions), (N + 2 * K) * D)).astype(np.float32)
    return qkv, batch, Kv(pages.copy(), pages.copy())


def long_case(P: int) -> tuple[np.ndarray, Batch, Kv]:
    """The last tokens of two contexts of 131,072, a decode row and 20 of a chunk; N, K, D are 4, 2,
    64. Every earlier index of the page table names page 0, which nobody writes."""
    rng = np.random.default_rng(P)
    table = np.zeros((3, LONG // P), int)
    table[2, -1], table[0, -2:] = 2, (3, 1)
    positions = np.array([LONG - 1, *range(LONG - 20, LONG)])
    batch = Batch([1, 20], [LONG] * 2, table, seq_slot=[2, 0], n_decode=1, positions=positions)
    pages = np.full((2, 4, 2, P, 64), 0xFFFF, np.uint16)
    qkv = from_bf16(bf16(rng.uniform(-4, 4, (len(positions), (4 + 2 * 2) * 64))))
    return qkv.astype(np.float32), batch, Kv(pages.copy(), pages.copy())


def written(batch: Batch, P: int) -> list[tuple[int, int]]:
    """The page of each of the batch's tokens, and its row there."""
    places = []
    for s, n in enumerate(batch.query_lengths):
        slot = batch.seq_slot[s] if batch.seq_slot else s
        for position in range(batch.kv_lengths[s] - n, batch.kv_lengths[s]):
            places.append((int(batch.page_table[slot, position // P]), position % P))
    return places


def read_back(pages: np.ndarray, batch: Batch, first_page: int = 0) -> np.ndarray:
    """What this batch's tokens wrote to layer 1, [T, K, D]; the rows are poisoned again."""
    rows = []
    for page, at in written(batch, pages.shape[3]):
        row = pages[1, page - first_page, :, at]
        rows.append(row.copy())
        row[:] = 0xFFFF
    return np.array(rows)


@pytest.mark.parametrize(
    ("N", "K", "D", "P", "rotary_dim", "pairs"),
    [
        (2, 2, 32, 16, 32, False),
        (4, 1, 40, 32, 40, False),
        (7, 1, 64, 64, 64, False),
        (2, 1, 256, 128, 256, True),
        (8, 2, 128, 256, 64, False),
        (4, 2, 72, 16, 24, True),
    ],
)
def test_rope_write(isa: str, N: int, K: int, D: int, P: int, rotary_dim: int, pairs: bool) -> None:
    qkv, batch, kv = case(N, K, D, P)
    with Shim(isa, n_threads=2) as shim:
        q = shim.rope_write(qkv, *tables(rotary_dim), batch, kv, N, rotary_dim, 1, pairs)
    check(q, qkv, batch, kv, rotary_dim, pairs)


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("P", [16, 256])
def test_the_end_of_a_context_of_128k(isa: str, P: int, pairs: bool) -> None:
    qkv, batch, kv = long_case(P)
    with Shim(isa, n_threads=2) as shim:
        q = shim.rope_write(qkv, *tables(64, LONG), batch, kv, 4, 64, 1, pairs)
    check(q, qkv, batch, kv, 64, pairs, LONG)


def check(
    q: np.ndarray,
    qkv: np.ndarray,
    batch: Batch,
    kv: Kv,
    rotary_dim: int,
    pairs: bool,
    n_positions: int = MAX_POSITION,
) -> None:
    _, _, K, _, D = kv.k.shape
    N = q.shape[1] // D
    heads = qkv.reshape(len(qkv), N + 2 * K, D)
    want = rotated(heads[:, : N + K], batch.positions, rotary_dim, pairs, n_positions)
    assert_close("rope", from_bf16(q).reshape(-1, N, D), want[:, :N])
    assert_close("rope", from_bf16(read_back(kv.k, batch)), want[:, N:])
    assert_close("rope", from_bf16(read_back(kv.v, batch)), heads[:, N + K :].astype(np.float64))
    assert (kv.k == 0xFFFF).all() and (kv.v == 0xFFFF).all(), "wrote outside its rows"


@pytest.mark.parametrize("pairs", [False, True])
def test_bits_depend_on_neither_set_nor_threads(pairs: bool) -> None:
    qkv, _, _ = case(4, 2, 72, 16)
    results = []
    for isa in isas():
        for n_threads in (1, 2):
            _, batch, kv = case(4, 2, 72, 16)
            with Shim(isa, n_threads) as shim:
                q = shim.rope_write(qkv, *tables(48), batch, kv, 4, 48, 1, pairs)
            results.append(b"".join(a.tobytes() for a in (q, kv.k, kv.v)))
    assert len(set(results)) == 1
