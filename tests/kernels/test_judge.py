"""The judge of GPU results, on the CPU backend's: it passes what is right and refuses what is
slightly wrong."""

from __future__ import annotations

import numpy as np
import pytest
from cpu.test_attention import Sequence, reference, run, sequence
from helpers.cpu_shim import Array, bf16, from_bf16, isas
from kernels.judge import attention, cut, judge, judge_rounded, product, rounded
from kernels.test_attention import HEADS, Part, assert_formula, flat

refused = pytest.raises(AssertionError, match="expected")


def without(seq: Sequence, begin: int, end: int) -> Sequence:
    """Its keys and values begin .. end lost; its queries last as they were."""
    kept = np.r_[:begin, end : len(seq.k)]
    return Sequence(seq.q[end - begin :], seq.k[kept], seq.v[kept])


def last_row(seq: Sequence) -> Part:
    return seq, len(seq.k) - 1, len(seq.k)


def rows_of(part: Part, P: int = 64) -> Array:
    return run(isas()[0], [part], P)[0]


# ---- attention ----


@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (30, 0.0), (0, 3.0)])
def test_exact_is_the_references(window: int, softcap: float) -> None:
    seq = sequence(150, 6, 2, 40)
    q, k, v = (from_bf16(x) for x in (seq.q[50:], seq.k, seq.v))
    exact, plain = attention(q, k, v, 50, 40**-0.5, window, softcap)
    want = reference(seq, 50, 40**-0.5, window, softcap)
    assert np.abs(exact - want).max() < 1e-12
    assert 0 < np.abs(plain - want).max() < 2**-6
    assert np.array_equal(rounded(plain), plain)


@pytest.mark.parametrize(("N", "K", "D", "P"), HEADS)
def test_right_rows_pass(N: int, K: int, D: int, P: int) -> None:
    for n, first in [(1, 0), (65, 64), (700, 699), (200, 150)]:
        part = (sequence(n, N, K, D), first, n)
        assert_formula(part, rows_of(part, P))


def test_a_lost_page_of_128k_keys_is_refused() -> None:
    whole = flat(sequence(131072, 4, 1, 64))
    assert_formula(last_row(whole), rows_of(last_row(whole)))
    for page in (0, 999, 2046):
        lost = without(whole, 64 * page, 64 * page + 64)
        with refused:
            assert_formula(last_row(whole), rows_of(last_row(lost)))


@pytest.mark.parametrize("n", [1024, 5000])
def test_a_lost_split_is_refused(n: int) -> None:
    whole = sequence(n, 4, 2, 64)
    with refused:
        assert_formula(last_row(whole), rows_of(last_row(without(whole, 512, 1024))))


@pytest.mark.parametrize("by", [-1, 1])
@pytest.mark.parametrize("first", [0, 200, 1000])
def test_a_mask_wrong_by_one_key_is_refused(first: int, by: int) -> None:
    """Queries that lie one place on see one key more, or one less."""
    seq = sequence(first + 80, 4, 2, 64)
    begin, end = first + 1, first + 65
    moved = Sequence(np.roll(seq.q, by, 0), seq.k, seq.v)
    with refused:
        assert_formula((seq, begin, end), rows_of((moved, begin + by, end + by)))


def test_rows_that_see_many_keys_are_not_covered_by_others() -> None:
    """The first rows of a prompt have the largest values and errors; only the last one is off."""
    part = (sequence(600, 4, 2, 64), 0, 600)
    rows = rows_of(part)
    assert_formula(part, rows)
    rows[-1] += 2  # units of the last place
    with refused:
        assert_formula(part, rows)


# ---- one rounding, sums in float32 ----


def test_one_rounding_passes_and_a_coarser_one_does_not() -> None:
    exact = np.random.default_rng(1).standard_normal((4, 50))
    judge_rounded("values", bf16(exact * (1 + 2**-21)), exact)
    with refused:
        judge_rounded("values", bf16(np.round(exact * 2**6) / 2**6), exact)


def test_one_element_may_not_be_far_off() -> None:
    """Even where the root mean square does not tell."""
    exact = np.random.default_rng(1).standard_normal((4, 50))
    got = rounded(exact)
    got[2, 3] += 3 * 2**-8 * np.abs(exact).max()
    with pytest.raises(AssertionError, match=r"at \(2, 3\) found"):
        judge("values", got, exact, rounded(exact))


def test_exact_results_must_be_exact() -> None:
    exact = np.arange(64.0)
    judge("whole numbers", exact, exact, exact)
    with refused:
        judge("whole numbers", exact * (1 + 2**-9), exact, exact)
    with pytest.raises(AssertionError, match="1 not finite"):
        judge("whole numbers", np.where(exact == 3, np.nan, exact), exact, exact)


@pytest.mark.parametrize("K", [8, 65, 1032])
def test_float32_sums_pass_and_narrower_ones_do_not(K: int) -> None:
    rng = np.random.default_rng(K)
    x, w = (rounded(rng.standard_normal((n, K))) for n in (40, 30))
    bias = rng.standard_normal(30)
    exact, plain, size = product(x, w, bias)
    assert np.abs(exact - (x @ w.T + bias)).max() < 1e-9
    chain = np.zeros((40, 30), np.float32)
    for k in range(K):
        chain += (x[:, k : k + 1] * w[:, k]).astype(np.float32)
    judge("a chain", chain.astype(np.float64) + bias, exact, plain, 0.0, size)
    for wrong in (x[:, 1:] @ w[:, 1:].T + bias, rounded(exact), chain.astype(np.float16) + bias):
        with refused:
            judge("product", wrong, exact, plain, 0.0, size)


def test_cut_is_towards_zero() -> None:
    ulp = 2.0**-23
    x = np.array([1 + 0.9 * ulp, -1 - 0.9 * ulp, 1 + ulp, 1 - 0.3 * ulp, 0.0])
    assert cut(x).tolist() == [1, -1, 1 + ulp, 1 - 0.5 * ulp, 0]
