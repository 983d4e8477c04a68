"""Logits against transformers and peft, live, over the shapes and options that are served.

The reference reads the same stored weights and computes in float32; milpy rounds activations to
bfloat16 where docs/numerics.md says. Random models have near-ties everywhere, so logits are judged,
not tokens: the error's size over the logits' own. The bound was fixed from what rounding alone
gives (measured 2026-11: 0.004 to 0.008; torch in bfloat16 0.008 to 0.014); a wrong scale, rotation
or module is above 0.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.reference import Logits, Reference, error
from helpers.tiny_llama import write_adapter, write_tiny_llama

from milpy import _C
from milpy.adapters import read_adapter
from milpy.checkpoint import open_checkpoint
from milpy.config import read_model_config

pytestmark = pytest.mark.ref

BOUND = 0.012
N_PROMPT = 60
N_PAST = 37  # the second chunk begins in the middle of a page
PAGE = 16


class Ours:
    """A model under a Stepper; `logits` runs tokens in two chunks, so that the second one reads
    keys and values back from pages."""

    def __init__(self, folder: Path, *, tensor_parallel: int = 1) -> None:
        self.config = read_model_config(folder)
        self.model = _C.Model(
            self.config,
            open_checkpoint(folder, self.config),
            max_position=self.config.max_context_length,
            tensor_parallel=tensor_parallel,
            n_threads=tensor_parallel,
        )
        self.stepper = _C.Stepper(
            self.model,
            n_pages=8,
            page_size=PAGE,
            max_seqs=2,
            max_tokens=2 * N_PROMPT,
            max_pages_per_seq=8,
        )

    def add(self, folder: Path) -> int:
        return self.model.add_adapter(read_adapter(folder, self.config))

    def logits(self, tokens: list[int], adapter: int = -1) -> Logits:
        seq = self.stepper.create_seq(adapter=adapter)
        pages = [5, 2, 7, 1]  # in no order, as an engine's would be
        parts = []
        for begin, end in ((0, N_PAST), (N_PAST, len(tokens))):
            item = (seq, tokens[begin:end], begin, pages, True)
            part = self.stepper.step([item], logits=True)[1]
            assert part is not None
            parts.append(part)
        return np.concatenate(parts)


def reference(folder: Path, tokens: list[int], adapter: Path | None = None) -> Logits:
    if adapter is None:
        return Reference(folder).logits(tokens)
    return Reference(folder, adapters={"adapter": adapter}).logits(tokens, "adapter")


@pytest.fixture
def tokens() -> Iterator[list[int]]:
    rng = np.random.default_rng(5)
    yield rng.integers(0, 256, N_PROMPT).tolist()


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS: dict[str, dict[str, Any]] = {
    "gqa_2": {},
    "gqa_1": {"kv_heads": 4},
    "gqa_4": {"kv_heads": 1},
    "gqa_3": {"heads": 6, "kv_heads": 2, "hidden": 96},
    "rope_linear": {"rope": {"rope_type": "linear", "factor": 4.0}},
    "rope_llama3": {"rope": LLAMA3},
    "rope_dynamic": {"rope": {"rope_type": "dynamic", "factor": 2.0}},
    "rope_theta": {"rope": {"rope_theta": 1e6}},
    "old_keys": {"rope": LLAMA3, "old_keys": True},
    "tied": {"tied": True},
    "sharded": {"shards": 3},
    "bias": {"bias": True},
    "head_dim_64": {"head_dim": 64},
    "head_dim_80": {"head_dim": 80},
    "head_dim_128": {"head_dim": 128, "heads": 2, "kv_heads": 1},
    "head_dim_40_odd_widths": {"head_dim": 40, "hidden": 72, "ffn": 136, "vocab": 259},
    "stored_f16": {"dtype": "F16"},
    "stored_f32": {"dtype": "F32"},
    "deep": {"layers": 6},
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path, tokens: list[int]) -> None:
    write_tiny_llama(tmp_path, **MODELS[name])
    found, expected = Ours(tmp_path).logits(tokens), reference(tmp_path, tokens)
    assert error(found, expected) < BOUND
    assert error(found[-1:], expected[-1:]) < 2 * BOUND


def test_the_bound_sees_small_mistakes(tmp_path: Path, tokens: list[int]) -> None:
    """What a mistake in position, theta or norm's epsilon does to the logits is over the bound."""
    write_tiny_llama(tmp_path / "m")
    expected = reference(tmp_path / "m", tokens)
    for name, change in {
        "theta": {"rope": {"rope_theta": 20000.0}},
        "eps": {"config_extra": {"rms_norm_eps": 0.05}},
        "kv_heads": {"kv_heads": 1},
    }.items():
        write_tiny_llama(tmp_path / name, **change)
        assert error(reference(tmp_path / name, tokens), expected) > 2 * BOUND, name


# Gains keep each adapter's effect near the base's own size: a stronger one makes a random model
# so sensitive that two correct computations in bfloat16 differ by a tenth.
ADAPTERS: dict[str, dict[str, Any]] = {
    "all_seven": {},
    "rank_1": {"rank": 1, "gain": 0.03},
    "rank_17": {"rank": 17, "gain": 0.4},
    "rank_64": {"rank": 64, "alpha": 32, "gain": 0.8},
    "rslora": {"rslora": True, "rank": 16, "gain": 0.1},
    "attention_only": {"targets": ("q_proj", "v_proj"), "gain": 0.5},
    "mlp_only": {"targets": ("gate_proj", "up_proj", "down_proj"), "gain": 0.3},
    "one_layer": {"layers": [1], "gain": 0.3},
    "rank_pattern": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 24}},
    "alpha_pattern": {"alpha_pattern": {"o_proj": 64, "layers.0.mlp.down_proj": 1}, "gain": 0.1},
    "patterns_rslora": {
        "rslora": True,
        "rank_pattern": {"v_proj": 4},
        "alpha_pattern": {"v_proj": 3, "gate_proj": 40},
        "gain": 0.05,
    },
    "stored_bf16": {"dtype": "BF16"},
}


def check_adapter(folder: Path, options: Mapping[str, Any], tokens: list[int]) -> None:
    write_adapter(folder / "a", folder / "m", **{"gain": 0.2, **options})
    ours = Ours(folder / "m")
    base, adapted = ours.logits(tokens), ours.logits(tokens, ours.add(folder / "a"))
    expected = reference(folder / "m", tokens, folder / "a")
    assert error(adapted, expected) < BOUND
    assert error(base, expected) > 5 * BOUND, "the adapter changes too little to be seen"


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapted_logits_are_those_of_peft(name: str, tmp_path: Path, tokens: list[int]) -> None:
    write_tiny_llama(tmp_path / "m")
    check_adapter(tmp_path, ADAPTERS[name], tokens)


def test_adapters_on_a_biased_model_with_odd_widths(tmp_path: Path, tokens: list[int]) -> None:
    write_tiny_llama(tmp_path / "m", bias=True, head_dim=40, hidden=72, ffn=136, vocab=259)
    check_adapter(tmp_path, {"rank": 5}, tokens)


def test_rows_of_one_step_get_their_own_adapters(tmp_path: Path, tokens: list[int]) -> None:
    write_tiny_llama(tmp_path / "m")
    ours = Ours(tmp_path / "m")
    ids = {}
    for name, rank in (("a", 4), ("b", 32)):
        write_adapter(tmp_path / name, tmp_path / "m", rank=rank, seed=rank, gain=rank / 40)
        ids[name] = ours.add(tmp_path / name)
    items = [
        (ours.stepper.create_seq(adapter=ids[name]), tokens, 0, pages, True)
        for name, pages in (("a", [0, 1, 2, 3]), ("b", [4, 5, 6, 7]))
    ]
    logits = ours.stepper.step(items, logits=True)[1]
    assert logits is not None
    for name, part in (("a", logits[:N_PROMPT]), ("b", logits[N_PROMPT:])):
        assert error(part, reference(tmp_path / "m", tokens, tmp_path / name)) < BOUND


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_are_the_model(world: int, tmp_path: Path, tokens: list[int]) -> None:
    write_tiny_llama(tmp_path / "m")
    write_adapter(tmp_path / "a", tmp_path / "m", rank=8, gain=0.2)
    ours = Ours(tmp_path / "m", tensor_parallel=world)
    assert error(ours.logits(tokens), reference(tmp_path / "m", tokens)) < BOUND
    expected = reference(tmp_path / "m", tokens, tmp_path / "a")
    assert error(ours.logits(tokens, ours.add(tmp_path / "a")), expected) < BOUND
