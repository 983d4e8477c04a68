"""Logits against transformers and peft on the same device, on tiny random models of many shapes.

What bfloat16 costs transformers itself is measured beside, and ours may be off by twice that
(helpers/reference.py). Every model sees prompts that end beside and at the borders of pages and
tiles, a prompt in two chunks, decode rows among chunks, and rows with more keys than one split of
decode attention has. Then the demo model, and a large one layer by layer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.drivers import Stepped, Text, open_model
from helpers.dummy_weights import dummy_llama
from helpers.reference import Logits, Reference, error, judge
from helpers.tiny_llama import llama_config, write_adapter, write_tiny_llama

from milpy import _C, demo
from milpy.adapters import read_adapter
from milpy.config import read_model_config

pytestmark = pytest.mark.ref

GOLDEN = Path(__file__).parents[1] / "golden" / "demo.json"
PAGE = 64
SHORT = (1, 63, 64, 65)
N_DECODED = 6
# Where rounding costs more than this, twice as much could hide a mistake. It grows as the root of
# the number of layers.
MOST_OF_ROUNDING = 0.05
MOST_OF_ROUNDING_IN_32_LAYERS = 0.15


@dataclass(frozen=True)
class Size:
    """How long the long prompt is and where it is cut: on a GPU, decode crosses 512 keys."""

    long: int
    cut: int


SIZES = {"cuda": Size(509, 301), "cpu": Size(97, 37)}

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS: dict[str, dict[str, Any]] = {
    "gqa_1": {"heads": 4, "kv_heads": 4, "head_dim": 64},
    "gqa_2": {"heads": 4, "kv_heads": 2, "head_dim": 64},
    "gqa_4": {"heads": 8, "kv_heads": 2, "head_dim": 128, "hidden": 256},
    "gqa_7": {"heads": 14, "kv_heads": 2, "head_dim": 64, "hidden": 448},
    "gqa_8": {"heads": 8, "kv_heads": 1, "head_dim": 128, "hidden": 256},
    "head_dim_32": {},
    "head_dim_40_odd_widths": {"head_dim": 40, "hidden": 72, "ffn": 136, "vocab": 259},
    "head_dim_80": {"head_dim": 80, "hidden": 320},
    "head_dim_96": {"head_dim": 96, "heads": 3, "kv_heads": 1, "hidden": 288},
    "head_dim_256": {"head_dim": 256, "heads": 2, "kv_heads": 1},
    "tied": {"tied": True, "head_dim": 64},
    "bias": {"bias": True, "head_dim": 64},
    "rope_linear": {"rope": {"rope_type": "linear", "factor": 4.0}, "head_dim": 64},
    "rope_llama3": {"rope": LLAMA3, "head_dim": 128},
    "stored_f16": {"dtype": "F16", "head_dim": 64},
    "page_16": {"head_dim": 128, "page": 16},
    "page_256": {"head_dim": 64, "page": 256},
    "deep": {"layers": 8, "head_dim": 64},
    "wide": {
        "hidden": 1536,
        "ffn": 4104,
        "layers": 1,
        "heads": 12,
        "kv_heads": 2,
        "head_dim": 128,
        "vocab": 4099,
    },
}


def write_model(folder: Path, options: Mapping[str, Any]) -> Path:
    # The older keys, which every transformers reads.
    write_tiny_llama(folder, max_positions=1024, old_keys=True, **options)
    return folder


class Talk:
    """One text of each length on a device, with adapters in turn, all decoding in the end."""

    def __init__(
        self, folder: Path, device: str, page: int = PAGE, adapters: list[Path] | None = None
    ) -> None:
        size = SIZES[device]
        config = read_model_config(folder)
        self.model = open_model(folder, device)
        self.names = [None, *(path.name for path in adapters or [])]
        ids = [-1] + [self.model.add_adapter(read_adapter(a, config)) for a in adapters or []]
        stepped = Stepped(
            self.model,
            n_pages=8 + 2048 // page,
            page_size=page,
            max_tokens=1024,
            max_position=1024,
        )
        rng = np.random.default_rng(5)
        lengths = [*SHORT, size.long]
        self.texts = [
            stepped.add(rng.integers(0, config.vocab_size, n).tolist(), ids[i % len(ids)])
            for i, n in enumerate(lengths)
        ]
        *short, long = self.texts
        stepped.step((long, size.cut), *((text, n) for text, n in zip(short, SHORT, strict=True)))
        stepped.step(*((text, 0) for text in short), (long, size.long - size.cut))
        for _ in range(N_DECODED):
            stepped.step(*((text, 0) for text in self.texts))
        # The same work under another name: a chunk of one token.
        stepped.step(*((text, 1) for text in self.texts))

    def adapter(self, index: int) -> str | None:
        """Of the text of that index."""
        return self.names[index % len(self.names)]


def check(talk: Talk, reference: Reference) -> None:
    inputs = [(text.tokens[: text.n_past], talk.adapter(i)) for i, text in enumerate(talk.texts)]
    exact = [reference.logits(tokens, adapter) for tokens, adapter in inputs]
    reference.round()
    rounded = [reference.logits(tokens, adapter) for tokens, adapter in inputs]
    for text, e, r in zip(talk.texts, exact, rounded, strict=True):
        judgement = judge(text.logits(), e, r)
        where = f"{len(text.rows)} rows: {judgement}"
        assert len(text.rows) == text.n_past, where
        assert judgement.passes, where
        assert judgement.theirs < MOST_OF_ROUNDING, where


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name: str, oracle_device: str, tmp_path: Path) -> None:
    options = dict(MODELS[name])
    page = options.pop("page", PAGE)
    write_model(tmp_path, options)
    check(Talk(tmp_path, oracle_device, page), Reference(tmp_path, oracle_device))


# ---- adapters ----

ADAPTERS: dict[str, dict[str, Any]] = {
    "all_seven": {"gain": 0.2},
    "rank_1": {"rank": 1, "gain": 0.03},
    "rank_16_attention": {"rank": 16, "targets": ("q_proj", "k_proj", "v_proj", "o_proj")},
    "rank_64_mlp": {"rank": 64, "targets": ("gate_proj", "up_proj", "down_proj"), "gain": 0.8},
}


@pytest.mark.parametrize("name", ["gqa_4", "bias", "head_dim_80", "head_dim_40_odd_widths"])
def test_adapted_logits_are_those_of_peft(name: str, oracle_device: str, tmp_path: Path) -> None:
    """Four adapters and the base, a text of each, in every step."""
    base = write_model(tmp_path / "base", MODELS[name])
    folders = [tmp_path / adapter for adapter in ADAPTERS]
    for folder in folders:
        # In bfloat16, so that both sides compute with the same numbers.
        write_adapter(folder, base, dtype="BF16", **{"gain": 0.4, **ADAPTERS[folder.name]})
    talk = Talk(base, oracle_device, adapters=folders)
    reference = Reference(base, oracle_device, {folder.name: folder for folder in folders})
    tokens = talk.texts[-1].tokens
    plain = reference.logits(tokens)
    for folder in folders:
        effect = error(reference.logits(tokens, folder.name), plain)
        assert effect > 0.1, f"{folder.name} changes too little to be seen: {effect}"
    check(talk, reference)


# ---- the demo model ----


@pytest.mark.skipif(not demo.BASE.is_dir(), reason=f"no demo model in {demo.BASE}")
@pytest.mark.skipif(not GOLDEN.exists(), reason=f"no goldens in {GOLDEN}")
def test_logits_of_the_demo_model_are_those_of_transformers(oracle_device: str) -> None:
    """Prompts and answers of all voices, a voice's in one step with the others'."""
    config = read_model_config(demo.BASE)
    model = open_model(demo.BASE, oracle_device)
    stepped = Stepped(
        model, n_pages=64, page_size=PAGE, max_tokens=2048, max_position=1024, max_seqs=32
    )
    work: list[tuple[str | None, Text]] = []
    for voice, entries in json.loads(GOLDEN.read_text(encoding="utf-8"))["voices"].items():
        name = None if voice == "base" else voice
        id = -1 if name is None else model.add_adapter(read_adapter(demo.ADAPTERS[name], config))
        work += [(name, stepped.add(e["prompt"] + e["answer"], id)) for e in entries[:: 270 // 5]]
    stepped.step(*((text, len(text.tokens)) for _, text in work))
    reference = Reference(demo.BASE, oracle_device, demo.ADAPTERS)
    exact = [reference.logits(text.tokens[:-1], name) for name, text in work]
    reference.round()
    for (name, text), row in zip(work, exact, strict=True):
        judgement = judge(text.logits(), row, reference.logits(text.tokens[:-1], name))
        assert judgement.passes, f"{name}: {judgement}"


# ---- a large model, layer by layer ----


@dataclass(frozen=True)
class Large:
    shape: dict[str, int]
    depths: tuple[int, ...]
    n_prompt: int
    n_past: int  # of them in a first chunk


# Llama-3-8B, and what a CPU can do.
LARGE = {
    "cuda": Large(
        {
            "hidden": 4096,
            "ffn": 14336,
            "heads": 32,
            "kv_heads": 8,
            "head_dim": 128,
            "vocab": 128256,
        },
        (1, 2, 4, 8, 16, 32),
        600,
        568,
    ),
    "cpu": Large(
        {"hidden": 512, "ffn": 1024, "heads": 8, "kv_heads": 2, "head_dim": 64, "vocab": 1000},
        (1, 2, 4, 8),
        100,
        68,
    ),
}
SEED = 3
N_SINGLE = 8  # tokens at the end that are steps of their own


def write_large(folder: Path, large: Large, layers: int) -> Path:
    folder.mkdir()
    config = llama_config(
        **large.shape,  # type: ignore[arg-type]
        layers=layers,
        max_positions=1024,
        rope={"rope_theta": 500000.0},
        old_keys=True,
    )
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def logits_at_depth(folder: Path, large: Large, tokens: list[int], device: str) -> Logits:
    """Those of a model of that depth: a dummy's layers do not depend on how many follow."""
    model = _C.Model(
        read_model_config(folder), None, max_position=1024, device=device, dummy_seed=SEED
    )
    stepped = Stepped(model, n_pages=20, page_size=PAGE, max_tokens=1024, max_position=1024)
    text = stepped.add(tokens)
    stepped.step((text, large.n_past), keep=False)
    stepped.step((text, large.n_prompt - large.n_past))
    for _ in range(N_SINGLE):
        stepped.step((text, 1))
    return text.logits()


def logits_at_depths(
    reference: Reference, depths: tuple[int, ...], tokens: list[int], n: int
) -> list[Logits]:
    """transformers' of the last n tokens, had the model ended after each of these layers."""
    import torch  # noqa: PLC0415

    states: list[Any] = []

    def keep(layer: Any, arguments: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        states.append(hidden[0, -n:])

    llama = reference.model
    hooks = [llama.model.layers[depth - 1].register_forward_hook(keep) for depth in depths]
    reference.logits(tokens)
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        return [llama.lm_head(llama.model.norm(s)).float().cpu().numpy() for s in states]


def test_logits_of_a_large_model_layer_by_layer(oracle_device: str, tmp_path: Path) -> None:
    import torch  # noqa: PLC0415

    large = LARGE[oracle_device]
    rng = np.random.default_rng(8)
    tokens = rng.integers(0, large.shape["vocab"], large.n_prompt + N_SINGLE).tolist()
    n = len(tokens) - large.n_past
    folders = {d: write_large(tmp_path / f"{d}", large, d) for d in large.depths}
    reference = Reference(
        dummy_llama(folders[large.depths[-1]], SEED, oracle_device), oracle_device
    )
    exact = logits_at_depths(reference, large.depths, tokens, n)
    reference.round()
    rounded = logits_at_depths(reference, large.depths, tokens, n)
    del reference
    torch.cuda.empty_cache()  # torch would keep what our weights need
    judgements = {
        depth: judge(logits_at_depth(folders[depth], large, tokens, oracle_device), e, r)
        for depth, e, r in zip(large.depths, exact, rounded, strict=True)
    }
    table = "\n".join(f"{depth} layers: {judgement}" for depth, judgement in judgements.items())
    print(table)
    assert all(judgement.passes for judgement in judgements.values()), table
    assert max(j.theirs for j in judgements.values()) < MOST_OF_ROUNDING_IN_32_LAYERS, table


# ---- the rule ----


def test_the_rule_sees_small_mistakes(tmp_path: Path) -> None:
    """A mistake in theta, norm's epsilon or a head's keys is over twice the price of bfloat16."""
    tokens = np.random.default_rng(5).integers(0, 256, 65).tolist()
    reference = Reference(write_model(tmp_path / "model", {}))
    exact = reference.logits(tokens)
    reference.round()
    rounded = reference.logits(tokens)
    assert judge(exact, exact, rounded).passes
    for name, change in {
        "theta": {"rope": {"rope_theta": 20000.0}},
        "eps": {"config_extra": {"rms_norm_eps": 0.05}},
        "kv_heads": {"kv_heads": 1},
    }.items():
        mistaken = Reference(write_model(tmp_path / name, change)).logits(tokens)
        assert not judge(mistaken, exact, rounded).passes, name
    one_bad_row = exact.copy()
    one_bad_row[33] += 0.3 * np.random.default_rng(6).standard_normal(256)
    assert not judge(one_bad_row, exact, rounded).passes
    assert not judge(exact * np.float32("nan"), exact, rounded).passes
