"""A context that grows past 64k tokens, in chunks and then a token at a time: over page borders and
over 65,536 keys, where decode attention on a GPU doubles its splits.

The models' attention is sharp: with scores so far apart a row's softmax rests on a few keys, which
lie anywhere in the context, so that a page that is lost or taken for another one shows in the
logits. Attention that is nearly even over 64k keys would hide it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.drivers import Request, Stepped, Text, open_model, serve
from helpers.reference import Logits, Reference, error, judge
from helpers.tiny_llama import llama_config, random_weights, write_checkpoint

from milpy import _C

VOCAB = 512
MOST_OF_ROUNDING = 0.05
SHARPNESS = 3  # times q of a model whose scores have a spread of 1
SHAPES: dict[str, dict[str, int]] = {
    "head_dim_64": {"heads": 2, "kv_heads": 1, "head_dim": 64},
    "head_dim_128": {"heads": 4, "kv_heads": 2, "head_dim": 128},
}


@dataclass(frozen=True)
class Size:
    border: int
    chunk: int
    page: int
    n_before: int  # tokens of the prompt before the border
    n_after: int  # decoded past it
    crowds: tuple[int, ...]


SIZES = {
    "cuda": Size(65536, 8192, 64, 70, 80, (3, 17, 64)),
    "cpu": Size(2048, 512, 16, 20, 20, (3, 9)),
}


def write_sharp_llama(folder: Path, shape: dict[str, int], max_positions: int) -> Path:
    config = llama_config(
        hidden=128,
        ffn=256,
        vocab=VOCAB,
        max_positions=max_positions,
        rope={"rope_theta": 1e6},
        old_keys=True,
        **shape,  # type: ignore[arg-type]
    )
    weights = random_weights(config)
    for name in weights:
        if name.endswith("q_proj.weight"):
            weights[name] *= SHARPNESS
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_checkpoint(folder, weights)
    return folder


@dataclass(frozen=True)
class Rig:
    folder: Path
    model: _C.Model
    size: Size

    def prompt(self, seed: int, n_before: int) -> list[int]:
        rng = np.random.default_rng(seed)
        return rng.integers(0, VOCAB, self.size.border - n_before).tolist()


@pytest.fixture(scope="module", params=SHAPES)
def rig(
    request: pytest.FixtureRequest, device: str, tmp_path_factory: pytest.TempPathFactory
) -> Rig:
    size = SIZES[device]
    folder = tmp_path_factory.mktemp("long")
    write_sharp_llama(folder, SHAPES[request.param], 2 * size.border)
    return Rig(folder, open_model(folder, device), size)


# ---- logits ----


def walk(rig: Rig) -> tuple[Stepped, Text]:
    """A prompt in chunks to short of the border, its last tokens with their logits, and a decode
    over the border."""
    size = rig.size
    stepped = Stepped(
        rig.model,
        n_pages=2 * size.border // size.page,
        page_size=size.page,
        max_tokens=size.chunk,
        max_position=2 * size.border,
    )
    text = stepped.add(rig.prompt(1, size.n_before))
    n_kept = size.n_before // 2
    while text.n_past < len(text.tokens) - n_kept:
        left = len(text.tokens) - n_kept - text.n_past
        stepped.step((text, min(left, size.chunk)), keep=False)
    stepped.step((text, n_kept))
    for _ in range(size.n_before + size.n_after):
        stepped.step((text, 0))
    assert text.n_past > size.border + size.page
    return stepped, text


@pytest.mark.ref
def test_logits_across_the_border_are_those_of_transformers(rig: Rig, oracle_device: str) -> None:
    stepped, text = walk(rig)
    found = text.logits()
    reference = Reference(rig.folder, oracle_device)
    tokens = text.tokens[: text.n_past]
    exact = reference.last_logits(tokens, len(found))
    reference.round()
    rounded = reference.last_logits(tokens, len(found))
    judgement = judge(found, exact, rounded)
    assert judgement.passes, judgement
    assert judgement.theirs < MOST_OF_ROUNDING, judgement
    assert lost_page_error(stepped, text, exact[-1:]) > 2 * judgement.their_worst


def lost_page_error(stepped: Stepped, text: Text, exact: Logits) -> float:
    """Of the last row, computed again with every second page taken for the one before."""
    text.pages[1::2] = text.pages[: len(text.pages) // 2 * 2 : 2]
    text.n_past -= 1
    text.tokens = text.tokens[: text.n_past + 1]
    stepped.step((text, 1))
    return error(text.rows[text.n_past - 1][None], exact)


# ---- bits ----


def crowd(rig: Rig, n: int) -> list[Request]:
    rng = np.random.default_rng(n)
    return [
        Request(rng.integers(0, VOCAB, length).tolist(), int(rng.integers(1, 60)))
        for length in rng.integers(1, min(2000, rig.size.border // 2), n)
    ]


def run(rig: Rig, requests: list[Request], n_seqs: int, **options: Any) -> list[Any]:
    page_bytes = 2 * 2 * 2 * rig.size.page * 256  # of either shape, two layers, at most
    n_pages = 3 * rig.size.border // rig.size.page
    return serve(
        rig.model,
        requests,
        n_logprobs=20,
        page_size=rig.size.page,
        max_model_len=2 * rig.size.border,
        max_num_seqs=n_seqs,
        max_num_batched_tokens=rig.size.chunk,
        kv_cache_bytes=n_pages * page_bytes,
        deterministic=True,
        **options,
    )[0]


@pytest.mark.parametrize("is_first", [True, False], ids=["first", "last"])
def test_mates_change_no_bit_of_a_long_text(rig: Rig, is_first: bool) -> None:
    """Alone op by op, then in graphs of every bucket; where it comes last, its mates' decode rows
    take from its chunks, which then end elsewhere."""
    size = rig.size
    subject = Request(rig.prompt(2, size.n_before), size.n_before + size.n_after)
    (alone,) = run(rig, [subject], 1, enforce_eager=True)
    for n_mates in (0, *size.crowds):
        mates = crowd(rig, n_mates)
        requests = [subject, *mates] if is_first else [*mates, subject]
        together = run(rig, requests, n_mates + 1)
        assert together[0 if is_first else -1] == alone, f"with {n_mates} mates"
