"""embed on a GPU: rows come whole out of a row-major weight."""

from __future__ import annotations

import numpy as np
import pytest
from cpu.tolerance import assert_close
from helpers.cpu_shim import Array, Shim, bf16, from_bf16
from helpers.marks import small

pytestmark = pytest.mark.gpu

# K that no vector divides; one vector; a block's first round, its edge, several rounds.
SHAPES = [
    (1, 1),
    small(31, 7),
    small(64, 64),
    (77, 130),
    (9, 4),
    (50, 4096),
    (33, 4100),
    (20, 16384),
]


def weight_of(N: int, K: int) -> Array:
    return bf16(np.random.default_rng([N, K]).standard_normal((N, K)))


@pytest.mark.parametrize(("N", "K"), SHAPES)
@pytest.mark.parametrize("captured", [False, True])
def test_rows_come_back_whole(path: str, N: int, K: int, captured: bool) -> None:
    weight = weight_of(N, K)
    tokens = np.random.default_rng(N).integers(0, N, 200)
    with Shim(path, captured=captured) as shim:
        out = shim.embed(tokens, weight, N, K)
        scaled = shim.embed(tokens, weight, N, K, scale=1.7)
    assert np.array_equal(out, from_bf16(weight)[tokens].astype(np.float32))
    assert_close("embed", scaled, from_bf16(weight)[tokens] * np.float64(np.float32(1.7)))


@pytest.mark.parametrize("K", [15, 16])
def test_tokens_of_other_ranks_give_zeros(path: str, K: int) -> None:
    weight = weight_of(40, K)
    tokens = np.array([99, 100, 139, 140, -1, -(2**31), 2**31 - 1])
    with Shim(path) as shim:
        out = shim.embed(tokens, weight, 40, K, vocab_begin=100)
    want = np.zeros((7, K))
    want[1:3] = from_bf16(weight)[[0, 39]]
    assert np.array_equal(out, want)


def test_two_shards_add_up_to_the_whole(path: str) -> None:
    weight, tokens = weight_of(70, 24), np.arange(70)
    with Shim(path) as shim:
        whole = shim.embed(tokens, weight, 70, 24)
        low = shim.embed(tokens, weight[:35], 35, 24)
        high = shim.embed(tokens, weight[35:], 35, 24, vocab_begin=35)
    assert np.array_equal(low + high, whole)


def test_no_tokens_is_no_work(path: str) -> None:
    with Shim(path) as shim:
        assert shim.embed(np.zeros(0), weight_of(4, 8), 4, 8).shape == (0, 8)
