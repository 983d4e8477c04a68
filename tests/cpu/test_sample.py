"""sample: greedy, filters, draws and logprobs against float64; a row with NaN harms no other."""

from __future__ import annotations

import numpy as np
import pytest
from cpu.tolerance import TOLERANCE
from helpers.cpu_shim import Sample, Sampling, Shim, isas

VOCABS = [1, 2, 15, 64, 65, 1000, 4096, 5003]


def options(
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    n_logprobs: int = -1,
    seed: int = 0,
) -> Sampling:
    return Sampling(temperature, top_k, top_p, n_logprobs, seed)


def logits_of(n: int, vocab: int, seed: int = 0, scale: float = 3.0) -> np.ndarray:
    rng = np.random.default_rng([seed, vocab])
    return (rng.standard_normal((n, vocab)) * scale).astype(np.float32)


def shim_for(isa: str, rows: int, vocab: int, n_threads: int = 1) -> Shim:
    return Shim(isa, n_threads, max_logit_rows=rows, vocab=vocab)


def kept_distribution(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float
) -> np.ndarray:
    """Probability of each id: temperature, then top-k, then top-p, ties by lowest id."""
    p = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    order = np.argsort(-logits, kind="stable")
    if top_k:
        p[order[top_k:]] = 0
    p /= p.sum()
    if top_p < 1:
        n_kept = int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1
        p[order[n_kept:]] = 0
    return p / p.sum()


@pytest.mark.parametrize("vocab", VOCABS)
def test_greedy_takes_the_largest_and_of_equals_the_lowest_id(isa: str, vocab: int) -> None:
    logits = logits_of(8, vocab)
    logits[1] = np.round(logits[1])
    logits[2] = 0
    logits[3] = -np.inf
    logits[3, vocab // 2] = -1000
    with shim_for(isa, 8, vocab, n_threads=2) as shim:
        samples, last = shim.sample(logits, [options()] * 8)
    tokens = [s.token for s in samples]
    assert tokens == logits.argmax(1).tolist()
    assert last.tolist() == tokens


def test_only_rows_that_feed_write_their_slot(isa: str) -> None:
    with shim_for(isa, 3, 50) as shim:
        samples, last = shim.sample(logits_of(3, 50), [options()] * 3, feeds=np.array([1, 0, 1]))
    assert last.tolist() == [samples[0].token, -1, samples[2].token]


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("chosen", [0.0, 1.0])
def test_logprobs_rank_and_the_best(isa: str, vocab: int, chosen: float) -> None:
    """Of the raw logits, whatever the temperature; best first, equals by lowest id."""
    logits = logits_of(4, vocab)
    logits[1] = np.round(logits[1])
    logits[2] = 1.5
    rows = [options(chosen, 0, 1.0, n, 7) for n in (20, 20, 20, 0)]
    with shim_for(isa, 4, vocab) as shim:
        samples, _ = shim.sample(logits, rows)
    for row, sample in zip(logits.astype(np.float64), samples, strict=True):
        want = row - row.max() - np.log(np.exp(row - row.max()).sum())
        order = np.argsort(-row, kind="stable")
        assert order[sample.rank - 1] == sample.token
        assert close_logprob(sample.logprob, want[sample.token])
        n_top = 0 if sample is samples[3] else min(20, vocab)
        assert [t.token for t in sample.top[: sample.n_top]] == order[:n_top].tolist()
        assert all(close_logprob(t.logprob, want[t.token]) for t in sample.top[: sample.n_top])


def close_logprob(got: float, want: float) -> bool:
    relative, absolute = TOLERANCE["logprob"]
    return abs(got - want) <= absolute + relative * abs(want)


def test_without_logprobs_none_are_reported(isa: str) -> None:
    with shim_for(isa, 1, 30) as shim:
        (sample,), _ = shim.sample(logits_of(1, 30), [options()])
    assert (sample.n_top, sample.logprob, sample.rank) == (0, 0.0, 0)


# ---- draws ----

FILTERS = [
    (1.0, 0, 1.0),
    (0.5, 0, 1.0),
    (2.0, 5, 1.0),
    (1.0, 0, 0.7),
    (0.8, 10, 0.9),
    (1.5, 1, 1.0),
    (1.0, 0, 1e-6),
    (5.0, 0, 0.999),
]


def draw(isa: str, logits: np.ndarray, rows: Sampling, n: int, n_threads: int = 1) -> np.ndarray:
    """n draws from one row, at positions 0 .. n - 1."""
    with shim_for(isa, n, len(logits), n_threads) as shim:
        samples, _ = shim.sample(np.tile(logits, (n, 1)), [rows] * n, positions=np.arange(n))
    return np.array([s.token for s in samples])


def assert_follows(seen: np.ndarray, want: np.ndarray) -> None:
    """Chi-square, ids expected less than 5 times put together; 5 sigma."""
    assert (seen[want == 0] == 0).all(), "drew what the filters cut"
    rare = (want < 5) & (want > 0)
    got = np.append(seen[want >= 5], seen[rare].sum())
    expected = np.append(want[want >= 5], want[rare].sum())
    got, expected = got[expected > 0], expected[expected > 0]
    chi_square = ((got - expected) ** 2 / expected).sum()
    freedom = max(len(got) - 1, 1)
    assert chi_square <= freedom + 5 * np.sqrt(2 * freedom), (chi_square, freedom)


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), FILTERS)
@pytest.mark.parametrize("vocab", [30, 300])
def test_draws_follow_the_filtered_distribution(
    temperature: float, top_k: int, top_p: float, vocab: int
) -> None:
    """Chi-square over 6,000 draws, ids expected less than 5 times put together; 5 sigma."""
    n = 6000
    (logits,) = logits_of(1, vocab, scale=1.5)
    logits[3] = logits[7] = np.sort(logits)[-3]  # equals at the edge of a filter
    tokens = draw(isas()[0], logits, options(temperature, top_k, top_p, -1, 11), n)
    want = kept_distribution(logits, temperature, top_k, top_p) * n
    assert_follows(np.bincount(tokens, minlength=vocab), want)


def test_top_p_keeps_the_smallest_set_and_at_least_one(isa: str) -> None:
    logits = np.log(np.array([0.1, 0.4, 0.3, 0.2])).astype(np.float32)
    for top_p, kept in [
        (0.05, {1}),
        (0.39, {1}),
        (0.41, {1, 2}),
        (0.69, {1, 2}),
        (0.95, {0, 1, 2, 3}),
    ]:
        assert set(draw(isa, logits, options(1.0, 0, top_p, -1, 1), 200)) == kept, top_p


def test_top_p_is_of_what_top_k_left(isa: str) -> None:
    """0.4 of 0.9 is under a half, of 0.7 it is over."""
    logits = np.log(np.array([0.1, 0.4, 0.3, 0.2])).astype(np.float32)
    assert set(draw(isa, logits, options(1.0, 2, 0.5, -1, 1), 200)) == {1}
    assert set(draw(isa, logits, options(1.0, 3, 0.5, -1, 1), 200)) == {1, 2}


@pytest.mark.parametrize("top_k", [0, 1, 64, 65, 700, 5003, 9999])
@pytest.mark.parametrize("top_p", [0.9, 0.9999, 1.0])
def test_flat_distributions_need_many_candidates(top_k: int, top_p: float) -> None:
    """Top-p over nearly equal logits keeps thousands; every token drawn is one that is kept."""
    (logits,) = logits_of(1, 5003, scale=0.01)
    tokens = draw(isas()[0], logits, options(1.0, top_k, top_p, -1, 3), 300)
    kept = kept_distribution(logits, 1.0, top_k, top_p) > 0
    # Sums of thousands of float32 weights put the edge off by an id or two.
    edge = np.argsort(-logits, kind="stable")[: kept.sum() + 2]
    assert np.isin(tokens, edge).all()
    assert len(set(tokens)) > min(kept.sum(), 300) / 3


@pytest.mark.parametrize("temperature", [1e-30, 1e-3])
def test_a_tiny_temperature_is_greedy(isa: str, temperature: float) -> None:
    (logits,) = logits_of(1, 500)
    assert set(draw(isa, logits, options(temperature, 0, 1.0, -1, 2), 20)) == {logits.argmax()}


def test_a_draw_is_a_function_of_seed_and_position(isa: str) -> None:
    (logits,) = logits_of(1, 2000, scale=1.0)
    first, again, other = (draw(isa, logits, options(1.0, seed=s), 200) for s in (1, 1, 2))
    assert np.array_equal(first, again)
    assert (first == other).mean() < 0.2
    assert len(set(first)) > 100, "positions must give draws of their own"


# ---- bad numbers ----


def test_a_row_with_nan_is_marked_and_harms_no_other(isa: str) -> None:
    logits = logits_of(6, 300)
    clean, _ = sample_all(isa, logits)
    for row, place in [(1, 0), (3, 299)]:
        logits[row, place] = np.nan
    logits[4, 7] = np.inf
    marked, last = sample_all(isa, logits)
    for row in range(6):
        if row in (1, 3, 4):
            assert (marked[row].token, last[row]) == (-1, -1)
        else:
            assert fields(marked[row]) == fields(clean[row])


def test_a_row_of_minus_infinity_is_marked(isa: str) -> None:
    with shim_for(isa, 1, 40) as shim:
        (sample,), _ = shim.sample(np.full((1, 40), -np.inf), [options(1.0, 5, 0.9, 3)])
    assert sample.token == -1


def test_minus_infinity_is_never_drawn(isa: str) -> None:
    """A head padded to whole shards: ids past the vocabulary are -inf."""
    (logits,) = logits_of(1, 100, scale=0.1)
    logits[3:] = -np.inf
    for top_k, top_p in [(0, 1.0), (50, 1.0), (0, 0.99)]:
        assert set(draw(isa, logits, options(1.0, top_k, top_p, -1, 5), 100)) <= {0, 1, 2}


# ---- the same bits ----


def mixed_options() -> list[Sampling]:
    return [options(t, k, p, n, 17) for (t, k, p), n in zip(FILTERS, range(-1, 7), strict=True)]


def sample_all(isa: str, logits: np.ndarray, n_threads: int = 1) -> tuple[list[Sample], np.ndarray]:
    with shim_for(isa, len(logits), logits.shape[1], n_threads) as shim:
        return shim.sample(logits, mixed_options()[: len(logits)], positions=np.arange(len(logits)))


def fields(sample: Sample) -> tuple[object, ...]:
    top = [(t.token, np.float32(t.logprob).tobytes()) for t in sample.top[: sample.n_top]]
    return sample.token, sample.rank, np.float32(sample.logprob).tobytes(), top


@pytest.mark.parametrize("vocab", [65, 9001])
def test_bits_depend_on_neither_set_nor_threads_nor_mates(vocab: int) -> None:
    logits = logits_of(8, vocab, scale=1.0)
    results = [[fields(s) for s in sample_all(isa, logits, n)[0]] for isa in isas() for n in (1, 2)]
    assert all(r == results[0] for r in results)
    with shim_for(isas()[0], 1, vocab, 2) as shim:
        for row in range(8):
            (alone,), _ = shim.sample(
                logits[row : row + 1], [mixed_options()[row]], positions=np.array([row])
            )
            assert fields(alone) == results[0][row]
