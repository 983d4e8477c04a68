"""sample on a GPU against float64: greedy, filters, draws, logprobs; the same bits in any batch.

The oracle computes the very draw (the hash is exact): tokens must be equal wherever float32's error
cannot move the choice over an edge.
"""

from __future__ import annotations

import numpy as np
import pytest
from cpu.test_sample import (
    FILTERS,
    assert_follows,
    close_logprob,
    fields,
    kept_distribution,
    logits_of,
    options,
)
from helpers.cpu_shim import Array, Sample, Sampling, Shim, isas
from helpers.marks import small

pytestmark = pytest.mark.gpu

# One id, parts of a group of 64, edges of the list (2,048) and of segments (4,096); real models.
VOCABS = [1, 2, 17, 64, small(65), 1000, 2048, 2049, 4096, small(5003), 32000, 128256, 151936]
LARGEST = 262144
# Top-k and top-p where the list of the best serves, where it is too short, and its edges.
CHOICES = [
    *FILTERS,
    (1.0, 1, 1.0),
    (1.0, 50, 0.95),
    (1.0, 1024, 1.0),
    (0.7, 1025, 0.9),
    (3.0, 5000, 1.0),
    (1.0, 100_000, 0.5),
    (1.3, 0, 0.5),
    (1.0, 0, 0.9999),
    (0.05, 40, 1.0),
    (1e-30, 0, 0.5),
    (1e-3, 0, 1.0),
    (1e6, 0, 0.3),
]
# Top-k and top-p over equal logits: the kept ids are the lowest.
EQUALS = [(0, 1.0), (0, 0.3), (0, 0.7), (1, 1.0), (1000, 1.0), (1999, 0.3), (2**18, 1.0)]
MARGIN = 1e-5  # of the kept mass: weights and their sums are off by some 1e-7


def run(
    path: str,
    logits: Array,
    rows: list[Sampling],
    positions: Array | None = None,
    captured: bool = False,
) -> tuple[list[Sample], Array]:
    n, vocab = logits.shape
    with Shim(path, captured=captured, max_logit_rows=n, vocab=vocab) as shim:
        return shim.sample(logits, rows, positions=positions)


def tokens_of(samples: list[Sample]) -> list[int]:
    return [s.token for s in samples]


# ---- the oracle ----


def mix64(z: int) -> int:
    mask = 2**64 - 1
    z = (z + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def uniform(seed: int, position: int) -> float:
    purpose = int.from_bytes(b"sample", "big")
    return (mix64(mix64(mix64(seed) ^ purpose) ^ position) >> 11) / 2**53


def first_over(sums: Array, target: float) -> tuple[int, float]:
    """The first sum that exceeds target, and how near target is to an edge, of the last sum."""
    i = min(int(np.searchsorted(sums, target, side="right")), len(sums) - 1)
    return i, float(np.abs(sums[max(i - 1, 0) : i + 1] - target).min() / sums[-1])


def choice(x: Array, sampling: Sampling, position: int) -> tuple[int, float]:
    """The token, and the least distance of a choice on the way from its edge."""
    x = np.where(np.abs(x) < np.finfo(np.float32).tiny, 0, x).astype(np.float64)
    has_k = 0 < sampling.top_k < len(x)
    ids = np.argsort(-x, kind="stable")
    if not (has_k or sampling.top_p < 1):
        ids = np.arange(len(x))
    sums = np.cumsum(np.exp((x[ids] - x.max()) / sampling.temperature))
    sums = sums[: sampling.top_k] if has_k else sums
    margin = 1.0
    if sampling.top_p < 1:
        last, margin = first_over(sums, sums[-1] * sampling.top_p)
        sums = sums[: last + 1]
    i, of_draw = first_over(sums, sums[-1] * uniform(sampling.seed, position))
    return int(ids[i]), min(margin, of_draw)


def awkward_rows(vocab: int, seed: int = 0) -> Array:
    """Ties, equals throughout, flat, ascending, clustered, half minus infinity, huge, tiny."""
    x = logits_of(10, vocab, seed)
    x[1] = np.round(x[1])
    x[2] = 1.5
    x[3] *= 0.003
    x[4].sort()
    x[5] = -1e9
    x[5, : vocab // 3 + 1] = x[0, : vocab // 3 + 1]
    x[6, np.arange(vocab) % 2 == 1] = -np.inf
    x[7] *= 1e30
    x[8] = np.where(np.arange(vocab) % 3 == 1, -0.0, 0.0)
    x[9] = np.float32(1e-40)  # reads as zero, so equal to the ids that are
    x[9, ::2] = 0
    return x


# ---- greedy ----


@pytest.mark.parametrize("vocab", [*VOCABS, LARGEST])
def test_greedy_takes_the_largest_and_of_equals_the_lowest_id(path: str, vocab: int) -> None:
    logits = awkward_rows(vocab)[:9]
    logits[3] = -np.inf
    logits[3, vocab // 2] = -1000
    samples, last = run(path, logits, [options()] * 9)
    assert tokens_of(samples) == logits.argmax(1).tolist()
    assert last.tolist() == tokens_of(samples)


def test_denormals_are_zeros(path: str) -> None:
    logits = np.full((1, 70), -1, np.float32)
    logits[0, 3], logits[0, 66] = -0.0, 1e-40
    samples, _ = run(path, logits, [options(0.0, 0, 1.0, 2)])
    assert [samples[0].token, *(t.token for t in samples[0].top[:2])] == [3, 3, 66]


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("ld", [0, small(5003), 5011, 5056])
def test_a_launch_may_be_larger_than_its_rows(path: str, captured: bool, ld: int) -> None:
    """Rows of a bucket past the batch's write nothing; first_row counts in the batch; rows of any
    alignment."""
    logits = logits_of(5, 5000)
    feeds = np.array([1, 0, 1, 1, 0])
    rows = [options(0.0, 0, 1.0, 3), *([options(1.0, 40, 0.9, 1, 5)] * 2), *([options(1.0)] * 2)]
    at = np.arange(5)
    with Shim(path, captured=captured) as shim:
        got, last = shim.sample(logits, rows, at, feeds, first_row=3, bucket=16, ld=ld)
    want, _ = run(path, logits, rows, at)
    assert [fields(s) for s in got] == [fields(s) for s in want]
    assert last.tolist() == np.where(feeds, tokens_of(got), -1).tolist()


@pytest.mark.parametrize("bucket", [0, 8])
def test_no_rows_is_no_work(path: str, bucket: int) -> None:
    with Shim(path) as shim:
        samples, last = shim.sample(np.empty((0, 5000)), [], bucket=bucket)
    assert (samples, last.size) == ([], 0)


@pytest.mark.slow
def test_logits_beyond_two_to_the_31_elements(path: str) -> None:
    n = 2**31 // LARGEST + 2
    logits = np.zeros((n, LARGEST), np.float32)
    logits[-2, LARGEST - 1] = logits[-1, 12345] = 1
    samples, _ = run(path, logits, [options()] * n)
    assert tokens_of(samples) == [0] * (n - 2) + [LARGEST - 1, 12345]


# ---- logprobs ----


@pytest.mark.parametrize("vocab", [*VOCABS, LARGEST])
@pytest.mark.parametrize(("temperature", "top_k"), [(0.0, 0), (1.0, 0), (2.0, 30), (2.0, 3000)])
def test_logprobs_rank_and_the_best(path: str, vocab: int, temperature: float, top_k: int) -> None:
    """Of the raw logits, whatever the temperature; best first, equals by lowest id."""
    logits = awkward_rows(vocab, seed=1)[:9]
    counts = [20, 20, 20, 1, 20, 7, 20, 20, 0]
    rows = [options(temperature, top_k, 1.0, n, 7) for n in counts]
    samples, _ = run(path, logits, rows)
    for x, sample, count in zip(logits.astype(np.float64), samples, counts, strict=True):
        want = x - x.max() - np.log(np.exp(x - x.max()).sum())
        order = np.argsort(-x, kind="stable")
        assert order[sample.rank - 1] == sample.token
        assert close_logprob(sample.logprob, want[sample.token])
        n_top = min(count, vocab)
        assert [t.token for t in sample.top[: sample.n_top]] == order[:n_top].tolist()
        for t in sample.top[: sample.n_top]:
            assert t.logprob == want[t.token] or close_logprob(t.logprob, want[t.token])


def test_without_logprobs_none_are_reported(path: str) -> None:
    (sample,), _ = run(path, logits_of(1, 30), [options()])
    assert (sample.n_top, sample.logprob, sample.rank) == (0, 0.0, 0)
    assert all((t.token, t.logprob) == (0, 0.0) for t in sample.top)


# ---- draws ----


@pytest.mark.parametrize("vocab", VOCABS)
def test_draws_are_the_oracles(path: str, vocab: int) -> None:
    x = awkward_rows(vocab, seed=2)
    cases = [(i, c) for i in range(len(x)) for c in range(len(CHOICES))]
    rows = [options(*CHOICES[c], -1, 100 * i + c) for i, c in cases]
    positions = np.random.default_rng(vocab).integers(0, 2**31 - 1, len(cases))
    samples, _ = run(path, x[[i for i, _ in cases]], rows, positions)
    far = 0
    for (i, c), row, position, token in zip(
        cases, rows, positions.tolist(), tokens_of(samples), strict=True
    ):
        want, margin = choice(x[i], row, position)
        far += margin > MARGIN
        assert token == want or margin <= MARGIN, (i, CHOICES[c], token, want, margin)
    assert far > len(cases) / 4, "most cases must be told apart"


def test_draws_are_the_cpus(path: str) -> None:
    """But where sums of float32 and of integers fall on two sides of an edge."""
    n, vocab = 320, 32000
    logits = logits_of(n, vocab, seed=3)
    rows = [options(*CHOICES[i % len(CHOICES)], -1, i) for i in range(n)]
    got, _ = run(path, logits, rows, np.arange(n))
    want, _ = run(isas()[0], logits, rows, np.arange(n))
    assert np.mean(np.array(tokens_of(got)) != tokens_of(want)) <= 0.01


@pytest.mark.parametrize("top_p", [1.0, 0.5, 0.99])
@pytest.mark.parametrize("top_k", [0, 7, 600, 1500])
def test_ids_of_minus_infinity_change_no_choice(path: str, top_k: int, top_p: float) -> None:
    """A row of 2,000 ids is sorted whole. Padded, it goes by way of groups and histograms."""
    n = 64
    logits = np.concatenate([logits_of(n // 2, 2000), logits_of(n // 2, 2000, scale=0.02)])
    padded = np.full((n, 70_000), -np.inf, np.float32)
    padded[:, :2000] = logits
    rows = [options(1.0, top_k, top_p, -1, i) for i in range(n)]
    got, want = (tokens_of(run(path, x, rows)[0]) for x in (padded, logits))
    assert got == want


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), FILTERS)
@pytest.mark.parametrize("vocab", [30, 300])
def test_draws_follow_the_filtered_distribution(
    path: str, temperature: float, top_k: int, top_p: float, vocab: int
) -> None:
    """Chi-square over 6,000 positions, ids expected less than 5 times put together; 5 sigma."""
    n = 6000
    (logits,) = logits_of(1, vocab, scale=1.5)
    logits[3] = logits[7] = np.sort(logits)[-3]  # equals at the edge of a filter
    row = options(temperature, top_k, top_p, -1, 11)
    samples, _ = run(path, np.tile(logits, (n, 1)), [row] * n, np.arange(n))
    seen = np.bincount(tokens_of(samples), minlength=vocab)
    assert_follows(seen, kept_distribution(logits, temperature, top_k, top_p) * n)


def test_draws_of_a_large_flat_row_are_uniform(path: str) -> None:
    n, vocab = 2000, 128_000
    row = options(1.0, 0, 0.9999999, -1, 4)
    tokens = []
    with Shim(path) as shim:
        for first in range(0, n, 250):
            at = np.arange(first, first + 250)
            samples, _ = shim.sample(np.zeros((250, vocab)), [row] * 250, at)
            tokens += tokens_of(samples)
    seen = np.bincount(np.array(tokens) // (vocab // 100), minlength=100)
    assert_follows(seen, np.full(100, n / 100))


def test_equal_logits_of_the_largest_vocabulary(path: str) -> None:
    """2^19 ids of the largest mass, 2^44: their sum is 2^63, the most that there can be."""
    vocab, n = 2**19, 4 * len(EQUALS)
    logits = np.full((n, vocab), 3.5, np.float32)
    rows = [options(1.0, *EQUALS[i % len(EQUALS)], 2, i) for i in range(n)]
    samples, _ = run(path, logits, rows, np.arange(n))
    for i, (row, sample) in enumerate(zip(rows, samples, strict=True)):
        kept = np.ceil((row.top_k or vocab) * np.float64(row.top_p))
        assert sample.token == int(uniform(row.seed, i) * kept), (i, kept)
        assert sample.rank == sample.token + 1
        assert close_logprob(sample.logprob, -np.log(vocab))
        assert [t.token for t in sample.top[:2]] == [0, 1]
    greedy, _ = run(path, logits[:1], [options()])
    assert greedy[0].token == 0


def test_top_p_keeps_the_smallest_set_and_at_least_one(path: str) -> None:
    """Of all, and of what top-k left: 0.4 of 0.9 is under a half, of 0.7 it is over."""
    logits = np.log(np.array([0.1, 0.4, 0.3, 0.2])).astype(np.float32)
    for top_k, top_p, kept in [
        (0, 0.05, {1}),
        (0, 0.39, {1}),
        (0, 0.41, {1, 2}),
        (0, 0.69, {1, 2}),
        (0, 0.95, {0, 1, 2, 3}),
        (2, 0.5, {1}),
        (3, 0.5, {1, 2}),
    ]:
        rows = [options(1.0, top_k, top_p, -1, 1)] * 200
        samples, _ = run(path, np.tile(logits, (200, 1)), rows, np.arange(200))
        assert set(tokens_of(samples)) == kept, (top_k, top_p)


# ---- bad numbers ----


@pytest.mark.parametrize("vocab", [small(300), 128256])
def test_a_bad_row_is_marked_and_harms_no_other(path: str, vocab: int) -> None:
    """NaN first, in the middle and last, infinity, nothing finite."""
    logits = logits_of(12, vocab)
    rows = [options(*FILTERS[i % len(FILTERS)], i % 4 - 1, 17) for i in range(12)]
    clean, _ = run(path, logits, rows)
    for row, place in [(1, 0), (3, vocab // 2), (10, vocab - 1)]:
        logits[row, place] = np.nan
    logits[4, 7] = np.inf
    logits[8] = -np.inf
    marked, last = run(path, logits, rows)
    for row in range(12):
        if row in (1, 3, 4, 8, 10):
            assert fields(marked[row])[:2] == (-1, 0)
            assert (marked[row].n_top, last[row]) == (0, -1)
        else:
            assert fields(marked[row]) == fields(clean[row])


def test_minus_infinity_is_never_drawn(path: str) -> None:
    """A head padded to whole shards: ids past the vocabulary are -inf."""
    logits = np.full((100, 9000), -np.inf, np.float32)
    logits[:, :3] = logits_of(1, 3, scale=0.1)
    for top_k, top_p in [(0, 1.0), (50, 1.0), (3000, 1.0), (0, 0.99)]:
        rows = [options(1.0, top_k, top_p, -1, 5)] * 100
        samples, _ = run(path, logits, rows, np.arange(100))
        assert set(tokens_of(samples)) == {0, 1, 2}


# ---- the same bits ----


@pytest.mark.parametrize("vocab", [65, 9001, 128256])
def test_bits_depend_on_neither_mates_nor_replay(path: str, vocab: int) -> None:
    logits = np.concatenate([awkward_rows(vocab, seed) for seed in range(2)])
    n = len(logits)
    rows = [options(*CHOICES[i % len(CHOICES)], i % 6 - 1, i) for i in range(n)]
    positions = np.arange(n) + 1000
    together, again, captured = (
        [fields(s) for s in run(path, logits, rows, positions, c)[0]] for c in (False, False, True)
    )
    assert together == again == captured
    with Shim(path) as shim:
        for i in range(n):
            (alone,), _ = shim.sample(logits[i : i + 1], rows[i : i + 1], positions[i : i + 1])
            assert fields(alone) == together[i]


def test_a_draw_is_a_function_of_seed_and_position(path: str) -> None:
    logits = np.tile(logits_of(1, 2000, scale=1.0), (200, 1))
    first, again, other = (
        np.array(tokens_of(run(path, logits, [options(1.0, seed=s)] * 200, np.arange(200))[0]))
        for s in (1, 1, 2)
    )
    assert np.array_equal(first, again)
    assert (first == other).mean() < 0.2
    assert len(set(first.tolist())) > 100, "positions must give draws of their own"
