"""begin on a GPU: a plan's commands in array order, then the tokens of its batch."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.cpu_shim import Array, Batch, LoraModule, Sampling, Shim
from helpers.marks import small

pytestmark = pytest.mark.gpu
N_SLOTS = 300
MAX_PAGES = 40


def batch_of(query: list[int], n_decode: int, **more: int) -> Batch:
    rng = np.random.default_rng(len(query))
    total = sum(query)
    return Batch(
        query,
        [n + 3 if n else 0 for n in query],
        rng.integers(0, 99, (N_SLOTS, MAX_PAGES)),
        seq_slot=rng.permutation(N_SLOTS)[: len(query)].tolist(),
        n_decode=n_decode,
        tokens=rng.integers(0, 30000, total),
        last_token=rng.integers(0, 30000, N_SLOTS),
        **more,  # type: ignore[arg-type]
    )


def wanted_tokens(batch: Batch, last_token: Array) -> Array:
    assert batch.tokens is not None and batch.seq_slot is not None
    want = np.zeros(max(sum(batch.query_lengths), batch.bucket_tokens), np.int32)
    want[: len(batch.tokens)] = batch.tokens
    want[: batch.n_decode] = last_token[batch.seq_slot[: batch.n_decode]]
    return want


def sampling(i: int) -> Sampling:
    return Sampling(0.5 + i, i, 0.25, i % 5, 2**40 + i)


def modules(n: int, first: int = 1) -> list[LoraModule]:
    return [
        LoraModule(i, i + 1, i + 2, i + 3, i / 4, 2**40 + i, i) for i in range(first, first + n)
    ]


def values(items: list[LoraModule]) -> list[tuple[object, ...]]:
    # A pointer that is NULL reads as None.
    return [tuple(getattr(x, name) or 0 for name, _ in LoraModule._fields_) for x in items]


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize(
    ("query", "n_decode", "bucket_seqs", "bucket_tokens"),
    [
        ([1], 1, 0, 0),
        ([1], 1, 4, 8),
        ([7], 0, 0, 0),
        ([1] * 256, 256, 256, 256),
        ([1] * 200, 200, 256, 257),
        small([1, 1, 3, 0, 2], 2, 16, 100),
        ([1] * 30 + [769, 0, 1536, 3], 30, 64, 8192),
    ],
)
def test_tokens_of_slots_and_of_the_plan(
    path: str, query: list[int], n_decode: int, bucket_seqs: int, bucket_tokens: int, captured: bool
) -> None:
    batch = batch_of(query, n_decode, bucket_seqs=bucket_seqs, bucket_tokens=bucket_tokens)
    with Shim(path, captured=captured) as shim:
        begun = shim.begin(batch)
    assert batch.last_token is not None
    assert np.array_equal(begun.tokens, wanted_tokens(batch, batch.last_token))
    assert np.array_equal(begun.last_token, batch.last_token)
    assert np.array_equal(begun.page_table, batch.page_table)
    assert (begun.adapter_slot == -7).all()


@pytest.mark.parametrize("n", [1, 95, 96, small(97), 250])
def test_slot_sets_come_before_tokens_are_gathered(path: str, n: int) -> None:
    batch = batch_of([1] * 100 + [5], 100)
    rng = np.random.default_rng(n)
    slots = rng.permutation(N_SLOTS)[:n].tolist()
    sets = [(slot, i - 1, sampling(i)) for i, slot in enumerate(slots)]
    with Shim(path) as shim:
        begun = shim.begin(batch, slot_sets=sets)
    assert batch.last_token is not None
    last = batch.last_token.copy()
    last[slots] = 0
    assert np.array_equal(begun.last_token, last)
    assert np.array_equal(begun.tokens, wanted_tokens(batch, last))
    adapters = np.full(N_SLOTS, -7)
    adapters[slots] = np.arange(n) - 1
    assert np.array_equal(begun.adapter_slot, adapters)
    for i, slot in enumerate(slots):
        assert bytes(begun.sampling[slot]) == bytes(sampling(i))


@pytest.mark.parametrize("n", [1, 255, 256, small(257), 5000])
def test_page_sets_write_their_entries_only(path: str, n: int) -> None:
    batch = batch_of([1], 1)
    rng = np.random.default_rng(n)
    entries = rng.permutation(N_SLOTS * MAX_PAGES)[:n]
    pages = rng.integers(0, 2**30, n)
    sets = [(int(e) // MAX_PAGES, int(e) % MAX_PAGES, int(p)) for e, p in zip(entries, pages)]  # noqa: B905
    with Shim(path) as shim:
        begun = shim.begin(batch, page_sets=sets)
    want = batch.page_table.reshape(-1).copy()
    want[entries] = pages
    assert np.array_equal(begun.page_table.reshape(-1), want)


@pytest.mark.sanitize
def test_of_two_commands_the_later_one_holds(path: str) -> None:
    batch = batch_of([1] * 8, 8)
    rng = np.random.default_rng(1)
    n = 4000
    slots, indices, pages = rng.integers(0, 5, n), rng.integers(0, 9, n), rng.integers(0, 99, n)
    page_sets = [(int(s), int(i), int(p)) for s, i, p in zip(slots, indices, pages)]  # noqa: B905
    slot_sets = [(int(s), i, sampling(i)) for i, s in enumerate(slots[:290])]
    adapter_sets = [(i * 7 % 5, i * 3 % 4 - 1) for i in range(60)]
    contents = modules(3 * 14, 100)
    with Shim(path) as shim:
        begun = shim.begin(batch, slot_sets, page_sets, adapter_sets, contents, modules(70), 2)
    want = batch.page_table.copy()
    for slot, index, page in page_sets:
        want[slot, index] = page
    assert np.array_equal(begun.page_table, want)
    last_set = {slot: i for i, (slot, _, _) in enumerate(slot_sets)}
    for slot, i in last_set.items():
        assert begun.adapter_slot[slot] == i and begun.last_token[slot] == 0
        assert bytes(begun.sampling[slot]) == bytes(sampling(i))
    of_slot = dict(adapter_sets)
    wanted: list[LoraModule] = []
    for slot in range(5):
        content = of_slot[slot]
        wanted += contents[content * 14 :][:14] if content >= 0 else [LoraModule()] * 14
    assert values(begun.modules) == values(wanted)


@pytest.mark.parametrize("n_layers", [1, small(3), 32])
def test_adapter_slots_take_their_contents_descriptors(path: str, n_layers: int) -> None:
    batch, width = batch_of([1], 1), 7 * n_layers
    before, contents = modules(5 * width), modules(2 * width, 10000)
    with Shim(path) as shim:
        sets = [(3, 1), (0, 0), (4, -1)]
        begun = shim.begin(batch, (), (), sets, contents, before, n_layers)
    want = values(before)
    want[3 * width : 4 * width] = values(contents[width:])
    want[:width] = values(contents[:width])
    want[4 * width :] = values([LoraModule()] * width)
    assert values(begun.modules) == want
