"""One captured launch of attention serves every batch of its bucket: any lengths, page tables and
mixes of decode rows and chunks, with the bits of the same batch run op by op."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.cpu_shim import Array, Batch, Kv, Shim, bf16

pytestmark = pytest.mark.gpu

N_SLOTS, BUCKET_SEQS, BUCKET_TOKENS = 12, 8, 160
MOST_KEYS = 2500  # five splits of a decode row
# Keys and queries of each sequence: the smallest batch first, with which the graph is captured;
# decode rows alone; split ones; chunks alone, one of them the whole bucket; none at all.
BATCHES: list[list[tuple[int, int]]] = [
    [(1, 1)],
    [(n, 1) for n in (1, 63, 64, 65, 511, 512, 513, 2500)],
    [(2500, 1)] * 8,
    [(2400, 160)],
    [],
    [(n, 20) for n in (20, 83, 84, 1000, 2500, 21, 150, 600)],
    [(700, 1), (90, 90), (2049, 1), (1100, 3), (0, 0), (2, 2)],
]


def random_batch(rng: np.random.Generator) -> list[tuple[int, int]]:
    """Decode rows and chunks in any order, of any length."""
    sequences = []
    for _ in range(int(rng.integers(1, BUCKET_SEQS + 1))):
        n = int(rng.integers(1, MOST_KEYS + 1))
        sequences.append((n, 1 if rng.random() < 0.5 else min(n, int(rng.integers(2, 21)))))
    return sequences


def case(
    rng: np.random.Generator, sequences: list[tuple[int, int]], width: int, P: int, n_pages: int
) -> tuple[Array, Batch]:
    """Slots and pages at random, a page perhaps in several tables; ids that nobody needs are -1."""
    queries, keys = [q for _, q in sequences], [n for n, _ in sequences]
    slots = rng.permutation(N_SLOTS)[: len(sequences)]
    table = np.full((N_SLOTS, -(-MOST_KEYS // P)), -1)
    for slot, n in zip(slots, keys, strict=True):
        table[slot, : -(-n // P)] = rng.integers(0, n_pages, -(-n // P))
    batch = Batch(
        queries, keys, table, seq_slot=slots.tolist(), bucket_seqs=BUCKET_SEQS,
        bucket_tokens=BUCKET_TOKENS,
    )  # fmt: skip
    return bf16(2 * rng.standard_normal((sum(queries), width))), batch


@pytest.mark.parametrize("P", [16, 64])
@pytest.mark.parametrize(
    ("N", "K", "D", "window"),
    [(4, 2, 64, 0), (7, 1, 80, 300), (8, 2, 128, 0), (8, 2, 128, 300), (2, 1, 256, 0)],
)
def test_one_graph_serves_every_batch_of_its_bucket(
    path: str, N: int, K: int, D: int, P: int, window: int
) -> None:
    rng = np.random.default_rng([N, D, P, window])
    n_pages = 4096 // P
    kv = Kv(*(bf16(rng.standard_normal((1, n_pages, K, P, D))) for _ in range(2)))
    batches = [*BATCHES, *(random_batch(rng) for _ in range(5)), BATCHES[0]]
    cases = [case(rng, sequences, N * D, P, n_pages) for sequences in batches]
    with Shim(path) as shim:
        replayed = shim.attention_replays(cases, kv, N, D**-0.5, window=window)
        for (q, batch), rows, sequences in zip(cases, replayed, batches, strict=True):
            eager = shim.attention(q, batch, kv, N, D**-0.5, window=window)
            assert np.array_equal(rows, eager), sequences
            assert (rows != 0xFFFF).all(), sequences
