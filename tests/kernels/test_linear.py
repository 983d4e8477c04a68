"""linear on a GPU, through cuBLASLt and through our own product, against float64.

Our own product serves deterministic contexts, and what cuBLASLt does not take (K or a row that is
no multiple of 16 bytes). Its promise: a row's bits are the row's and the weight's alone.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
from helpers.cpu_shim import Array, Shim, bf16, from_bf16
from helpers.linear_shim import MARK, Weight
from kernels.judge import judge, product, rounded

pytestmark = pytest.mark.gpu

ROWS = (1, 2, 3, 8, 16, 17, 64, 100, 128, 257, 1000)
# N and K: tiles and their edges, one split of K, several, many; then K that no 16 bytes divide.
SHAPES = [(64, 64), (1, 8), (33, 40), (129, 72), (200, 1032), (1000, 4104), (4096, 4096)]
ODD_SHAPES = [(1, 1), (7, 3), (130, 33), (64, 65), (37, 513), (250, 2049)]
MODES = [False, True]

modes = pytest.mark.parametrize("deterministic", MODES)


@functools.lru_cache(maxsize=2)
def inputs(M: int, N: int, K: int) -> tuple[Array, Array]:
    rng = np.random.default_rng([M, N, K])
    x, w = rng.standard_normal((M, K), np.float32), rng.standard_normal((N, K), np.float32)
    return bf16(x), bf16(w)


def sample(n: int, most: int) -> Array:
    """All of n indices, or some of them with both ends."""
    if n <= most:
        return np.arange(n)
    rng = np.random.default_rng(n)
    return np.unique(np.concatenate([[0, n - 1], rng.integers(0, n, most)]))


class Product:
    """What x W^T (+ bias) is judged by, in some columns of large ones. Rows are x's first ones."""

    def __init__(self, x: Array, w: Array, bias: Array | None = None) -> None:
        self.columns = sample(len(w), 160)
        some = None if bias is None else bias[self.columns].astype(np.float64)
        self.exact, self.sums, self.size = product(from_bf16(x), from_bf16(w[self.columns]), some)
        self.once = self.twice = rounded(self.exact)
        # cuBLASLt wants a bias of the result's type, and rounds the product before it where columns
        # do not fill 16 bytes, as the plain formula does.
        if some is not None:
            self.twice = rounded(rounded(self.exact - some) + rounded(some))

    def judge(self, y: Array, is_logits: bool = False, deterministic: bool = True) -> None:
        got, n = y[:, self.columns].astype(np.float64), len(y)
        assert np.isfinite(y).all()
        if is_logits:
            judge("logits", got, self.exact[:n], self.sums[:n], 0.0, self.size[:n])
        else:
            plain = self.once if deterministic else self.twice
            judge("product", got, self.exact[:n], plain[:n])


@functools.cache
def product_of(M: int, N: int, K: int) -> Product:
    return Product(*inputs(M, N, K))


@modes
@pytest.mark.parametrize(("N", "K"), SHAPES + ODD_SHAPES)
def test_linear_is_the_product(path: str, deterministic: bool, N: int, K: int) -> None:
    x, w = inputs(max(ROWS), N, K)
    want = product_of(max(ROWS), N, K)
    with Shim(path, deterministic=deterministic) as shim:
        weight = Weight(shim, [w])
        for M in ROWS:
            for is_logits in (False, True):
                want.judge(weight.linear(x[:M], is_logits=is_logits), is_logits)


@modes
@pytest.mark.parametrize(("N", "K"), [(96, 64), (4096, 4096), (1025, 520), (33, 37)])
def test_bias_is_added_before_the_rounding(path: str, deterministic: bool, N: int, K: int) -> None:
    bias = (np.random.default_rng(N).standard_normal(N) * 20).astype(np.float32)
    x, w = inputs(130, N, K)
    want = Product(x, w, bias)
    with Shim(path, deterministic=deterministic) as shim:
        weight = Weight(shim, [w], bias=bias)
        for M in (1, 3, 17, 64, 130):
            for is_logits in (False, True):
                y = weight.linear(x[:M], is_logits=is_logits)
                want.judge(y, is_logits, deterministic)


@pytest.mark.sanitize
@pytest.mark.parametrize(("N", "K"), [(129, 72), (70, 1032), (130, 33)])
def test_each_kernel_of_our_own(path: str, N: int, K: int) -> None:
    """Few rows by three sizes of tile, in one split and in two; many rows, aligned and not."""
    bias = np.random.default_rng(N).standard_normal(N).astype(np.float32)
    x, w = inputs(200, N, K)
    want = Product(x, w, bias)
    with Shim(path, deterministic=True) as shim:
        weight = Weight(shim, [w], bias=bias)
        for M in (5, 20, 50, 200):
            want.judge(weight.linear(x[:M]))


@pytest.mark.sanitize
def test_the_kernel_that_rounds_a_bias(path: str) -> None:
    """It runs before cuBLASLt is asked, which declines rows of 33: the sanitizers need not look
    into the library."""
    bias = np.random.default_rng(2).standard_normal(300).astype(np.float32)
    x, w = inputs(5, 300, 33)
    with Shim(path, max_tokens=5, hidden=33, ffn=300) as shim:
        Product(x, w, bias).judge(Weight(shim, [w], bias=bias).linear(x), deterministic=False)


@modes
def test_no_rows_is_no_work(path: str, deterministic: bool) -> None:
    _, w = inputs(1, 64, 64)
    with Shim(path, deterministic=deterministic) as shim:
        weight = Weight(shim, [w], bias=np.ones(64, np.float32))
        for is_logits in (False, True):
            assert weight.linear(np.empty((0, 64), np.uint16), is_logits=is_logits).size == 0


@modes
def test_logits_beyond_two_to_the_31_elements(path: str, deterministic: bool) -> None:
    """The host has the last rows alone."""
    M, N, K, last = 2**12 + 3, 2**19, 64, 3
    x, w = inputs(M, N, K)
    with Shim(path, deterministic=deterministic) as shim:
        y = Weight(shim, [w]).linear(x, is_logits=True, last=last)
    Product(x[-last:], w).judge(y, is_logits=True)


def test_bfloat16_bias_loses_nothing(path: str) -> None:
    bias = from_bf16(bf16(np.random.default_rng(1).standard_normal(256) * 20)).astype(np.float32)
    x, w = np.zeros((5, 64), np.uint16), inputs(1, 256, 64)[1]
    for deterministic in MODES:
        with Shim(path, deterministic=deterministic) as shim:
            y = Weight(shim, [w], bias=bias).linear(x)
        assert np.array_equal(y, np.broadcast_to(bias, y.shape))


@modes
@pytest.mark.parametrize(("ldx", "ldy"), [(80, 104), (73, 101), (72, 107), (88, 100)])
@pytest.mark.parametrize("M", [1, 16, 130])
def test_rows_may_be_wider_than_the_product(
    path: str, deterministic: bool, M: int, ldx: int, ldy: int
) -> None:
    x, w = inputs(M, 100, 72)
    with Shim(path, deterministic=deterministic) as shim:
        weight = Weight(shim, [w])
        for is_logits in (False, True):
            wide = weight.linear(x, ldx=ldx, ldy=ldy, is_logits=is_logits)
            product_of(M, 100, 72).judge(wide[:, :100], is_logits)
            assert (wide[:, 100:] == MARK).all()


@pytest.mark.parametrize("is_logits", [False, True])
@pytest.mark.parametrize(
    ("N", "K"), [(64, 64), (200, 1032), (4096, 4096), (6144, 2048), (1000, 4104), (37, 513)]
)
def test_batch_mates_do_not_change_a_row(path: str, N: int, K: int, is_logits: bool) -> None:
    """D1: alone, among others, at any place, and whichever kernel the number of rows asks for."""
    x, w = inputs(1000, N, K)
    with Shim(path, deterministic=True) as shim:
        weight = Weight(shim, [w])
        whole = weight.linear(x, is_logits=is_logits)
        for begin, n in ((0, 1), (999, 1), (3, 5), (7, 13), (100, 33), (9, 64), (64, 65), (5, 193)):
            part = weight.linear(x[begin : begin + n], is_logits=is_logits)
            assert np.array_equal(part, whole[begin : begin + n]), (begin, n)


@modes
def test_a_row_of_nan_stays_in_its_row(path: str, deterministic: bool) -> None:
    x, w = inputs(130, 200, 1032)
    for M in (3, 20, 64, 130):
        spoilt = x[:M].copy()
        spoilt[1] = 0x7FC0
        with Shim(path, deterministic=deterministic) as shim:
            weight = Weight(shim, [w])
            clean, y = weight.linear(x[:M]), weight.linear(spoilt)
        rest = np.arange(M) != 1
        assert np.isnan(y[1]).all()
        assert np.array_equal(y[rest], clean[rest])


@modes
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("N", "K"), [(200, 1032), (4096, 4096), (37, 65)])
def test_a_captured_product_gives_the_same_bits(
    path: str, deterministic: bool, N: int, K: int, has_bias: bool
) -> None:
    x, w = inputs(130, N, K)
    bias = np.arange(N, dtype=np.float32) if has_bias else None
    results = []
    for captured in (False, True):
        with Shim(path, deterministic=deterministic, captured=captured) as shim:
            weight = Weight(shim, [w], bias=bias)
            results.append([weight.linear(x[:M]) for M in (1, 17, 64, 130)])
    assert all(np.array_equal(a, b) for a, b in zip(*results, strict=True))
