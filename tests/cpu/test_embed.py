"""embed and gather_tokens: rows come whole out of the panels, tokens from slots or the plan."""

import numpy as np
import pytest
from cpu.tolerance import assert_close
from helpers.cpu_shim import Batch, Shim, bf16, from_bf16


def panels_of(weight: np.ndarray) -> np.ndarray:
    """[N, K] bits to [N/32][K/2][32][2], padded with zeros."""
    N, K = weight.shape
    padded = np.zeros((-(-N // 32) * 32, -(-K // 2) * 2), np.uint16)
    padded[:N, :K] = weight
    blocks = padded.reshape(-1, 32, padded.shape[1] // 2, 2)
    return np.ascontiguousarray(blocks.transpose(0, 2, 1, 3))


@pytest.mark.parametrize(("N", "K"), [(1, 1), (31, 7), (64, 64), (77, 130)])
@pytest.mark.parametrize("n_threads", [1, 2])
def test_rows_come_back_whole(isa: str, N: int, K: int, n_threads: int) -> None:
    rng = np.random.default_rng(N)
    weight = bf16(rng.standard_normal((N, K)))
    tokens = rng.integers(0, N, 200)
    with Shim(isa, n_threads) as shim:
        out = shim.embed(tokens, panels_of(weight), N, K)
        assert np.array_equal(out, from_bf16(weight)[tokens].astype(np.float32))
        scaled = shim.embed(tokens, panels_of(weight), N, K, scale=1.7)
    assert_close("embed", scaled, from_bf16(weight)[tokens] * np.float64(np.float32(1.7)))


def test_tokens_of_other_ranks_give_zeros(isa: str) -> None:
    weight = bf16(np.random.default_rng(0).standard_normal((40, 16)))
    tokens = np.array([99, 100, 139, 140, -1, -(2**31), 2**31 - 1])
    with Shim(isa) as shim:
        out = shim.embed(tokens, panels_of(weight), 40, 16, vocab_begin=100)
    want = np.zeros((7, 16))
    want[1:3] = from_bf16(weight)[[0, 39]]
    assert np.array_equal(out, want)


def test_two_shards_add_up_to_the_whole(isa: str) -> None:
    weight = bf16(np.random.default_rng(1).standard_normal((70, 24)))
    tokens = np.arange(70)
    with Shim(isa) as shim:
        whole = shim.embed(tokens, panels_of(weight), 70, 24)
        low = shim.embed(tokens, panels_of(weight[:35]), 35, 24)
        high = shim.embed(tokens, panels_of(weight[35:]), 35, 24, vocab_begin=35)
    assert np.array_equal(low + high, whole)


def test_decode_rows_take_their_slots_token_and_chunks_the_plans(isa: str) -> None:
    batch = Batch(
        query_lengths=[1, 1, 3, 0, 2],
        kv_lengths=[4, 9, 3, 0, 7],
        page_table=np.zeros((6, 1)),
        seq_slot=[5, 0, 1, 2, 3],
        n_decode=2,
        tokens=np.array([-9, -9, 11, 12, 13, 14, 15]),
        last_token=np.array([50, 51, 52, 53, 54, 55]),
    )
    with Shim(isa) as shim:
        assert shim.gather_tokens(batch).tolist() == [55, 50, 11, 12, 13, 14, 15]
