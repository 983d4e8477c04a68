"""Index arrays on a GPU that hold anything: no fault, nothing outside the arrays is written, and
what other entries stand for keeps its bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers.cuda_arrays import DeviceArray, synchronize
from helpers.op_cases import Array, Case, int32, normal, put

from milpy import ops
from milpy.ops import bfloat16

pytestmark = pytest.mark.gpu

HOSTILE = [-5, 10**9, -(2**31), 2**31 - 1]
SEED = 3

# Four sequences of 1, 3, 2 and 2 of 8 tokens; three segments of 7 of the tokens.
T, N, K, D, V, E, H = 8, 4, 2, 64, 50, 2, 64
PAGES = np.random.default_rng(SEED).permutation(12).astype(np.int32).reshape(4, 3)
ROWS = int32(3, 0, 7, 5, 1, 4, 6)


def batch(rng: np.random.Generator, P: int) -> dict[str, Array]:
    return {
        "k_cache": bfloat16(normal(rng, 12, K, P, D)),
        "v_cache": bfloat16(normal(rng, 12, K, P, D)),
        "page_table": PAGES.copy(),
        "query_indptr": int32(0, 1, 4, 6, 8),
        "kv_lengths": int32(2 * P + 3, P + 5, 7, P + 1),
    }


def lora(rng: np.random.Generator) -> dict[str, Any]:
    return {
        "segment_indptr": int32(0, 2, 5, 7),
        "segment_adapter": int32(1, 0, 1),
        "rows": ROWS.copy(),
        "scale": normal(rng, E),
    }


def case(name: str, P: int) -> Case:
    rng = np.random.default_rng(SEED)
    cos, sin = ops.rope_tables(40, D)
    angles = {"positions": rng.integers(0, 40, T).astype(np.int32), "cos": cos, "sin": sin}
    x, a, b = (bfloat16(normal(rng, *s)) for s in [(T, 2048), (E, 16, 2048), (E, H, 16)])
    y = bfloat16(normal(rng, T, H))
    heads = np.zeros((T, N, D), np.uint16)
    cases: dict[str, Case] = {
        "embedding": (
            {"tokens": rng.integers(0, V, T).astype(np.int32),
             "weight": bfloat16(normal(rng, V, H)), "out": np.zeros((T, H), np.float32)},
            ["out"], ops.embedding),
        "rope": (
            {"x": bfloat16(normal(rng, T, N, D)), **angles, "out": heads}, ["out"], ops.rope),
        "rope_and_cache": (
            {"qkv": bfloat16(normal(rng, T, (N + 2 * K) * D)), **angles, **batch(rng, P),
             "out": heads}, ["out", "k_cache", "v_cache"], ops.rope_and_cache),
        "attention": (
            {"q": bfloat16(normal(rng, T, N, D)), **batch(rng, P), "out": heads},
            ["out"], ops.attention),
        "lora": ({"y": y, "x": x, "a": a, "b": b, **lora(rng)}, ["y"], ops.lora),
        "lora_shrink": (
            {"x": x, "a": a, **lora(rng), "out": np.zeros((len(ROWS), 16), np.float32)},
            ["out"], ops.lora_shrink),
        "lora_expand": (
            {"y": y, "v": normal(rng, len(ROWS), 16), "b": b,
             **{key: v for key, v in lora(rng).items() if key != "scale"}},
            ["y"], ops.lora_expand),
    }  # fmt: skip
    return cases[name]


def pages_of(*sequences: int) -> list[int]:
    return PAGES[list(sequences)].reshape(-1).tolist()


def caches(pages: list[int]) -> dict[str, list[int]]:
    return {"k_cache": pages, "v_cache": pages}


# Op, index array, entry, and what may differ then: of each written array, entries of its first
# dimension. The first and the last start are known without looking.
SPOTS: list[tuple[str, str, int, dict[str, list[int]]]] = [
    ("embedding", "tokens", 2, {"out": [2]}),
    ("rope", "positions", 2, {"out": [2]}),
    ("rope_and_cache", "positions", 2, {"out": [2], **caches(pages_of(1))}),
    ("rope_and_cache", "kv_lengths", 1, caches(pages_of(1))),
    ("rope_and_cache", "query_indptr", 0, {}),
    ("rope_and_cache", "query_indptr", 2, caches(pages_of(1, 2))),
    ("rope_and_cache", "query_indptr", 4, {}),
    ("rope_and_cache", "page_table", 4, caches(pages_of(1))),
    ("attention", "kv_lengths", 1, {"out": [1, 2, 3]}),
    ("attention", "query_indptr", 0, {}),
    ("attention", "query_indptr", 2, {"out": [1, 2, 3, 4, 5]}),
    ("attention", "query_indptr", 4, {}),
    ("attention", "page_table", 4, {"out": [1, 2, 3]}),
    *((op, "segment_indptr", at, {}) for op in ("lora", "lora_expand") for at in (0, 3)),
    *((op, "segment_indptr", 1, {"y": ROWS[:5].tolist()}) for op in ("lora", "lora_expand")),
    *((op, "segment_adapter", 1, {"y": ROWS[2:5].tolist()}) for op in ("lora", "lora_expand")),
    *((op, "rows", 3, {"y": [int(ROWS[3])]}) for op in ("lora", "lora_expand")),
    ("lora_shrink", "segment_indptr", 0, {}),
    ("lora_shrink", "segment_indptr", 1, {"out": [0, 1, 2, 3, 4]}),
    ("lora_shrink", "segment_indptr", 3, {}),
    ("lora_shrink", "segment_adapter", 1, {"out": [2, 3, 4]}),
    ("lora_shrink", "rows", 3, {"out": [3]}),
]


def run(name: str, changed: dict[tuple[str, int], int], P: int = 16) -> dict[str, Array]:
    """What the op writes where entries of its index arrays are changed on the GPU."""
    arrays, written, call = case(name, P)
    there = put(arrays, DeviceArray)
    for (key, entry), value in changed.items():
        content = arrays[key].copy()
        content.reshape(-1)[entry] = value
        there[key].set(content)
    call(**there)
    return {key: there[key].get() for key in written}


# Pages of 64 rows are those that the Hopper path serves.
@pytest.mark.parametrize("P", [16, 64])
@pytest.mark.parametrize(
    ("op", "indices", "entry", "differs"), SPOTS, ids=[f"{s[0]}-{s[1]}-{s[2]}" for s in SPOTS]
)
def test_a_hostile_index_reaches_no_other_row(
    op: str, indices: str, entry: int, differs: dict[str, list[int]], P: int
) -> None:
    want = run(op, {}, P)
    for value in HOSTILE:
        got = run(op, {(indices, entry): value}, P)
        for key, array in want.items():
            kept = np.ones(len(array), bool)
            kept[differs.get(key, [])] = False
            assert np.array_equal(got[key][kept], array[kept]), (key, value)


@pytest.mark.sanitize
@pytest.mark.parametrize("P", [16, 64])
@pytest.mark.parametrize("op", sorted({spot[0] for spot in SPOTS}))
def test_nothing_but_hostile_indices_is_no_fault(op: str, P: int) -> None:
    arrays, _, _ = case(op, P)
    names = [key for key, x in arrays.items() if getattr(x, "dtype", None) == np.int32]
    rng = np.random.default_rng(1)
    for _ in range(8):
        values = rng.integers(-(2**31), 2**31, sum(arrays[key].size for key in names)).tolist()
        run(op, {(key, i): values.pop() for key in names for i in range(arrays[key].size)}, P)
    synchronize()


# ---- what a bad index stands for ----


@pytest.mark.sanitize
def test_rows_and_adapters_that_are_not_there_change_nothing() -> None:
    arrays, _, _ = case("lora", 16)
    y = arrays["y"]
    for op in ("lora", "lora_expand"):
        for changed, rows in [({("segment_adapter", 1): E}, ROWS[2:5]), ({("rows", 3): T}, [5])]:
            assert np.array_equal(run(op, changed)["y"][rows], y[rows])
    assert not run("lora_shrink", {("segment_adapter", 1): E})["out"][2:5].any()
    assert not run("lora_shrink", {("rows", 3): T})["out"][3].any()


@pytest.mark.sanitize
def test_many_starts_ascend_whatever_they_hold() -> None:
    """More segments than one round of the block that puts them right."""
    rng = np.random.default_rng(SEED)
    n = 1000
    x, a = bfloat16(normal(rng, n, 64)), bfloat16(normal(rng, E, 8, 64))
    indptr = np.arange(n + 1, dtype=np.int32)
    adapter = rng.integers(0, E, n).astype(np.int32)
    arrays: dict[str, Any] = {
        "x": x, "a": a, "segment_indptr": indptr.copy(), "segment_adapter": adapter,
        "rows": np.arange(n, dtype=np.int32), "out": np.zeros((n, 8), np.float32),
    }  # fmt: skip
    bad = rng.permutation(np.arange(1, n))[:300]
    arrays["segment_indptr"][bad] = rng.choice(HOSTILE, 300)
    there = put(arrays, DeviceArray)
    ops.lora_shrink(**there)
    # A start that says nothing is the one before it: its row joins the next segment.
    starts = np.maximum.accumulate(np.where(np.isin(np.arange(n + 1), bad), 0, indptr))
    arrays["segment_indptr"] = starts.astype(np.int32)
    arrays["out"] = np.zeros((n, 8), np.float32)
    want = ops.lora_shrink(**arrays)
    np.testing.assert_allclose(there["out"].get(), want, rtol=1e-4, atol=1e-3)


# ---- sampling's parameters ----


@pytest.mark.parametrize(
    "row",
    [
        {"temperature": np.nan}, {"temperature": np.inf}, {"temperature": -1.0},
        {"temperature": 1e-45}, {"temperature": 1.0, "top_k": -5},
        {"temperature": 1.0, "top_k": 10**9}, {"temperature": 1.0, "top_p": np.nan},
        {"temperature": 1.0, "top_p": -1.0}, {"temperature": 1.0, "top_p": 0.0},
        {"temperature": 1.0, "top_k": 7, "top_p": np.inf}, {"n_logprobs": 10**9},
        {"n_logprobs": -5},
    ],
    ids=str,
)  # fmt: skip
def test_hostile_parameters_choose_a_token_and_no_other_rows(row: dict[str, float]) -> None:
    rng = np.random.default_rng(SEED)
    n, width = 3, 5000
    logits = normal(rng, n, width) * 5
    params = ops.sampling_params(n, temperature=1.0, top_k=[0, 0, 9], seed=np.arange(n))
    fields = np.dtype(
        [("temperature", "f4"), ("top_k", "i4"), ("top_p", "f4"), ("n_logprobs", "i4"),
         ("seed", "u8")]
    )  # fmt: skip
    changed = params.copy()
    for name, value in row.items():
        changed.view(fields)[name][1] = value
    positions = int32(1, -5, 2**31 - 1)

    def sample(params: Array) -> Array:
        out = DeviceArray(np.full(n, -7, np.int32))
        ops.sample(*map(DeviceArray, (logits, params, positions)), out=out)
        return out.get()

    want, got = sample(params), sample(changed)
    assert np.array_equal(got[[0, 2]], want[[0, 2]])
    assert -1 <= got[1] < width
