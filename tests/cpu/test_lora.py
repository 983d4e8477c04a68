"""LoRA beside a product: rows of different adapters, ranks and none in one batch."""

import numpy as np
import pytest
from cpu.tolerance import assert_close
from helpers.cpu_shim import Shim, bf16, from_bf16, isas
from helpers.linear_shim import (
    Adapter,
    Array,
    Segments,
    Weight,
    gate_up_act,
    linear_lora,
    random_adapter,
)

K = 530
# Rows of the three adapters: a lone row, a chunk, scattered rows; 1, 11 and 15 are base rows.
ROWS_OF = [[4], [5, 6, 7, 8, 9, 10], [0, 2, 3, 12, 14, 13]]
T = 16
RANKS = [[4, 16, 0], [24, 3, 16], [0, 0, 64]]


def merged(weight: Weight, x: Array, adapters: list[Adapter]) -> Array:
    """x W^T + scale (x A^T) B^T in float64, packed order."""
    exact = from_bf16(x)
    parts = []
    for index, rows in enumerate(weight.parts):
        y = exact @ from_bf16(rows).T
        for adapter, at in zip(adapters, ROWS_OF, strict=True):
            y[at] += adapter.delta(exact[at], index)
        parts.append(y)
    return np.concatenate(parts, 1)[:, weight.order()]


def make(
    shim: Shim, part_rows: list[int], interleave: int, n_rows: int = T
) -> tuple[Weight, Array, list[Adapter]]:
    rng = np.random.default_rng(len(part_rows))
    parts = [bf16(rng.standard_normal((rows, K)) / K**0.5) for rows in part_rows]
    adapters = [random_adapter(rng, ranks[: len(parts)], K, part_rows) for ranks in RANKS]
    return Weight(shim, parts, interleave), bf16(rng.standard_normal((n_rows, K))), adapters


@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize(("part_rows", "interleave"), [([40, 24, 8], 0), ([48, 48], 16), ([33], 0)])
def test_each_row_gets_its_adapter(
    isa: str, part_rows: list[int], interleave: int, is_fused: bool
) -> None:
    with Shim(isa, n_threads=2, hidden=K) as shim:
        weight, x, adapters = make(shim, part_rows, interleave)
        y = linear_lora(weight, x, Segments(weight, adapters, ROWS_OF, T), is_fused)
        assert np.abs(y - merged(weight, x, adapters)).max() < 2e-5


def test_base_rows_have_the_bits_of_the_base_product(isa: str) -> None:
    with Shim(isa, hidden=K) as shim:
        weight, x, adapters = make(shim, [40, 24, 8], 0)
        y = linear_lora(weight, x, Segments(weight, adapters, ROWS_OF, T), True)
        base = weight.linear(x)
    assert np.array_equal(y[[1, 11, 15]], base[[1, 11, 15]])
    assert not np.array_equal(y[4], base[4])


def test_a_row_keeps_its_bits_without_batch_mates(isa: str) -> None:
    with Shim(isa, n_threads=2, hidden=K) as shim:
        weight, x, adapters = make(shim, [40, 24, 8], 0)
        y = linear_lora(weight, x, Segments(weight, adapters, ROWS_OF, T), True)
        for index, rows in enumerate(ROWS_OF):
            for row in rows:
                alone: list[list[int]] = [[], [], []]
                alone[index] = [0]
                segments = Segments(weight, adapters, alone, 1)
                assert np.array_equal(linear_lora(weight, x[[row]], segments, True)[0], y[row])


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize(("part_rows", "interleave"), [([40, 24, 8], 0), ([48, 48], 16), ([33], 0)])
def test_a_long_batch_has_the_bits_of_its_rows_in_small_ones(
    isa: str, part_rows: list[int], interleave: int, n_threads: int
) -> None:
    """Work over many rows is dealt in other pieces than over few, which end inside segments."""
    n_rows = 167
    rows_of = [[*range(2, 103)], [*range(104, 120)], [*range(121, n_rows, 2)]]
    with Shim(isa, n_threads, hidden=K, max_tokens=n_rows) as shim:
        weight, x, adapters = make(shim, part_rows, interleave, n_rows)
        y = linear_lora(weight, x, Segments(weight, adapters, rows_of, n_rows), True)
        for begin in range(0, n_rows, 11):
            piece = range(begin, min(begin + 11, n_rows))
            local = [[row - begin for row in rows if row in piece] for rows in rows_of]
            few = Segments(weight, adapters, local, len(piece))
            assert np.array_equal(linear_lora(weight, x[piece], few, True), y[piece])


def test_no_segments_is_the_base_product(isa: str) -> None:
    with Shim(isa, hidden=K) as shim:
        weight, x, adapters = make(shim, [40, 24, 8], 0)
        none = Segments(weight, adapters, [[], [], []], T)
        assert np.array_equal(linear_lora(weight, x, none, True), weight.linear(x))
        assert np.array_equal(linear_lora(weight, x, none, False), weight.linear(x))


@pytest.mark.parametrize("interleave", [0, 16])
def test_gate_up_act_is_act_of_linear_lora(isa: str, interleave: int) -> None:
    with Shim(isa, n_threads=2, hidden=K) as shim:
        weight, x, adapters = make(shim, [48, 48], interleave)
        for rows_of in (ROWS_OF, [[], [], []]):
            segments = Segments(weight, adapters, rows_of, T)
            y = linear_lora(weight, x, segments, False)
            out = gate_up_act(weight, x, segments)
            assert np.array_equal(out, shim.act(y, interleave))


def test_gate_up_act_is_the_formula(isa: str) -> None:
    with Shim(isa, hidden=K) as shim:
        weight, x, adapters = make(shim, [48, 48], 16)
        out = gate_up_act(weight, x, Segments(weight, adapters, ROWS_OF, T))
        stacked = merged(weight, x, adapters)[:, np.argsort(weight.order())]
    gate, up = stacked[:, :48], stacked[:, 48:]
    assert_close("gate_up_act", from_bf16(out), gate / (1 + np.exp(-gate)) * up)


def test_bits_depend_on_neither_set_nor_threads() -> None:
    results = []
    for isa in isas():
        for n_threads in (1, 2):
            with Shim(isa, n_threads, hidden=K) as shim:
                weight, x, adapters = make(shim, [40, 24, 8], 0)
                for is_fused in (True, False):
                    segments = Segments(weight, adapters, ROWS_OF, T)
                    results.append(linear_lora(weight, x, segments, is_fused))
    assert all(np.array_equal(r, results[0]) for r in results)
