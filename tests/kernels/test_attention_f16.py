"""attention and rope_write over pages of float16 on a GPU: as good as the plain formula in float16
rounded where it must be, and the same bits alone and in a batch."""

from __future__ import annotations

import numpy as np
import pytest
from cpu.test_attention_f16 import (
    EPS_F16,
    Part,
    any_values,
    assert_no_worse,
    f16,
    from_f16,
    run,
    sequence,
    write_and_attend,
)
from cpu.test_rope import rotated, tables
from helpers.cpu_shim import Shim, bf16, from_bf16
from helpers.cuda_arrays import DeviceArray
from helpers.marks import small
from helpers.op_cases import Torch
from kernels.test_rope import case, read_back

pytestmark = pytest.mark.gpu

# N, K, D, P: every instance of either path, pages of 16, 64 and 256, groups of 1 to 20.
HEADS = [
    (1, 1, 32, 16),
    (4, 2, 64, 16),
    (4, 1, 64, 32),
    (4, 1, 64, 64),
    (8, 2, 64, 256),
    (7, 1, 80, 64),
    (7, 1, 80, 128),
    (20, 1, 96, 16),
    (8, 2, 128, 16),
    (32, 8, 128, 64),
    (8, 2, 128, 128),
    (20, 1, 128, 256),
    (2, 2, 256, 64),
    (8, 1, 256, 256),
]


def check(path: str, parts: list[Part], P: int, is_f16: bool = True, **options: float) -> None:
    assert_no_worse(run(path, parts, P, is_f16=is_f16, **options), parts, is_f16, **options)


@pytest.mark.parametrize(("N", "K", "D", "P"), HEADS)
def test_mixed_batch_is_the_formula(path: str, N: int, K: int, D: int, P: int) -> None:
    """One key, decode rows about a block's end, a split one, chunks with and without a past, a
    chunk as small as a decode row; NaN in every row of the pages that no query may see."""
    cases = [(1, 0), (63, 62), (64, 63), (65, 64), (1000, 999), (130, 65), (300, 0), (90, 88)]
    check(path, [(sequence(n, N, K, D), first, n) for n, first in cases], P)


@pytest.mark.parametrize(("N", "D", "P"), [(4, 64, 64), (8, 128, 64), (7, 80, 16), (2, 256, 64)])
def test_the_result_may_be_bfloat16(path: str, N: int, D: int, P: int) -> None:
    """As what enters a product is: of a whole row, a split one, a chunk."""
    cases = [(65, 64), (1000, 999), (130, 65)]
    check(path, [(sequence(n, N, 1, D), first, n) for n, first in cases], P, is_f16=False)


@pytest.mark.sanitize
@pytest.mark.parametrize(
    ("D", "P"), [(40, 16), (80, 16), (96, 16), (128, 16), (256, 16), (64, 64), (128, 64)]
)
def test_a_row_a_split_row_a_tile_and_its_tail(path: str, D: int, P: int) -> None:
    """Each instance at its smallest."""
    cases = [(1, 0), (600, 599), (70, 69), (90, 60), (80, 0)]
    check(path, [(sequence(n, 4, 2, D), first, n) for n, first in cases], P)


@pytest.mark.parametrize("length", [513, 4097, 20000])
@pytest.mark.parametrize(("N", "K", "D"), [(4, 1, 128), (8, 2, 64), (4, 1, 80), (2, 1, 256)])
def test_long_decode_rows_are_merged_from_splits(
    path: str, length: int, N: int, K: int, D: int
) -> None:
    check(path, [(sequence(length, N, K, D), length - 1, length)], 64)


@pytest.mark.parametrize("D", [64, 96, 128])
@pytest.mark.parametrize("options", [{"window": 15}, {"window": 700}, {"softcap": 3.0}])
def test_window_and_softcap(path: str, D: int, options: dict[str, float]) -> None:
    seq = sequence(1300, 4, 2, D)
    check(path, [(seq, 1100, 1300), (seq, 1299, 1300), (seq, 1296, 1300)], 64, **options)


@pytest.mark.parametrize(("N", "K", "D"), [(4, 2, 64), (4, 1, 80), (8, 2, 128), (2, 1, 256)])
def test_a_row_that_sees_one_key_answers_with_its_value(path: str, N: int, K: int, D: int) -> None:
    """Every finite float16 passes through, subnormals as well."""
    seq = any_values(200, N, K, D)
    want = np.repeat(from_f16(seq.v), N // K, 1)
    prompt, row = run(path, [(seq, 0, 200), (seq, 199, 200)], 64, window=1)
    assert np.array_equal(from_f16(prompt), want)
    assert np.array_equal(from_f16(row), want[199:])


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize(("N", "D"), [(2, 32), (2, 64), (16, 128)])
def test_a_nan_of_ones_own_is_not_hidden(path: str, name: str, N: int, D: int) -> None:
    seq = sequence(70, N, 1, D)
    getattr(seq, name)[66] = 0x7E00
    (got,) = run(path, [(seq, 64, 70)], 64)
    is_nan = np.isnan(from_f16(got)).all((1, 2))
    assert is_nan[2:].tolist() == [True] + [name != "q"] * 3


@pytest.mark.parametrize(("N", "K", "D"), [(4, 2, 64), (7, 1, 128), (3, 1, 80), (2, 1, 256)])
def test_batch_mates_and_graphs_change_no_bits(path: str, N: int, K: int, D: int) -> None:
    own = sequence(1500, N, K, D)
    parts: list[Part] = [(own, 1499, 1500), (own, 1400, 1500), (own, 0, 333)]
    mates: list[Part] = [
        (sequence(n, N, K, D, seed=7 + i), first, n)
        for i, (n, first) in enumerate([(700, 699), (3, 2), (900, 200)])
    ]
    together = run(path, [*mates, *parts], 64, seed=1)[len(mates) :]
    for part, expected in zip(parts, together, strict=True):
        for captured in (False, True):
            (alone,) = run(path, [part], 64, captured=captured)
            assert np.array_equal(alone, expected)


# ---- rope_write ----


@pytest.mark.parametrize(
    ("N", "K", "D", "P", "rotary_dim", "pairs"),
    [
        small(7, 1, 64, 64, 64, False),
        (4, 1, 40, 32, 40, False),
        (32, 8, 128, 64, 128, False),
        small(4, 2, 72, 16, 24, False),
        small(4, 2, 72, 16, 24, True),
        (4, 2, 72, 16, 20, True),
    ],
)
def test_rope_write(
    path: str, N: int, K: int, D: int, P: int, rotary_dim: int, pairs: bool
) -> None:
    """Beside others v has values that float16 rounds, makes subnormal, and cannot hold."""
    qkv, batch, kv = case(N, K, D, P)
    kv.is_f16 = True
    heads = qkv.reshape(len(qkv), N + 2 * K, D)
    odd = np.array([65280, 65536, -1e6, 2.0**-24, 2.0**-25, -1.5 * 2.0**-24, 2.0**-15, -0.0])
    heads[:, N + K :, :8] = from_bf16(bf16(odd))
    with Shim(path) as shim:
        q = shim.rope_write(qkv, *tables(rotary_dim), batch, kv, N, rotary_dim, 1, pairs)
    got = np.concatenate([q.reshape(-1, N, D), read_back(kv.k, batch)], axis=1)
    want = rotated(heads[:, : N + K], batch.positions, rotary_dim, pairs)
    # float32's error where a cos - b sin cancels counts against |a| + |b|, <= 8 here.
    bound = 1.02 * EPS_F16 * np.abs(want) + 8 * 4 * 2.0**-24
    assert (np.abs(from_f16(got) - want) <= bound).all()
    with np.errstate(over="ignore"):
        assert np.array_equal(read_back(kv.v, batch), f16(heads[:, N + K :]))
    assert (kv.k == 0xFFFF).all() and (kv.v == 0xFFFF).all(), "wrote outside its rows"


# ---- milpy.ops ----


def test_numpy_arrays_are_copied_there_and_back() -> None:
    write_and_attend(device="cuda")


def test_device_arrays_are_used_in_place() -> None:
    write_and_attend(DeviceArray, DeviceArray.get)


def test_tensors_of_torch_are_used_in_place() -> None:
    library = Torch()
    write_and_attend(library.put, library.get)
