"""The demo model, scored: served answers, and choices along the float32 reference's own path.

Goldens were made by transformers and peft from the stored bf16 weights read as float32, teacher-
forced. Where milpy chooses another token than the reference, the reference itself must have been
in two minds (its two best logits nearer than the goldens' margin bound, fixed beforehand), and that
may be so for one token in two hundred. Mutants of the adapters fail the same judgement.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from milpy import _C, LLM, RequestOutput, SamplingParams, demo
from milpy.adapters import Adapter, read_adapter
from milpy.checkpoint import open_checkpoint
from milpy.config import read_model_config

GOLDEN = Path(__file__).parents[1] / "golden" / "demo.json"
PAGE = 16
MAX_TOKENS = 4096  # of one step
ANSWER = SamplingParams(temperature=0, max_tokens=128, logprobs=3)

ADAPTER_SHARE, BASE_SHARE = 0.95, 0.05
DIFFERENT_SHARE = 0.005

needs_demo = pytest.mark.skipif(not demo.BASE.is_dir(), reason=f"no demo model in {demo.BASE}")
needs_golden = pytest.mark.skipif(not GOLDEN.exists(), reason=f"no goldens in {GOLDEN}")
pytestmark = needs_demo

Judgement = tuple[float, int]  # share of tokens chosen otherwise, and how many without excuse


# ---- served answers ----


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(demo.BASE, adapters=demo.ADAPTERS, progress=False) as llm:
        yield llm


def ask(llm: LLM, texts: list[str], voices: list[str]) -> list[RequestOutput]:
    return llm.generate(
        [demo.format_request(text) for text in texts],
        ANSWER,
        adapter=[None if voice == "base" else voice for voice in voices],
        use_tqdm=False,
    )


@pytest.fixture(scope="module")
def served(llm: LLM) -> dict[str, list[RequestOutput]]:
    """Every held-out request in every voice, all in one batch."""
    texts = [request["text"] for request in demo.requests()]
    pairs = [(text, voice) for text in texts for voice in demo.VOICES]
    outputs = ask(llm, [text for text, _ in pairs], [voice for _, voice in pairs])
    return {voice: outputs[i :: len(demo.VOICES)] for i, voice in enumerate(demo.VOICES)}


def share_right(outputs: list[RequestOutput], voice: str) -> float:
    answers = [request["answers"][voice] for request in demo.requests()]
    pairs = zip(outputs, answers, strict=True)
    return sum(output.outputs[0].text == answer for output, answer in pairs) / len(answers)


@pytest.mark.parametrize("voice", demo.ADAPTERS)
def test_an_adapter_answers_in_its_own_voice(
    served: dict[str, list[RequestOutput]], voice: str
) -> None:
    assert share_right(served[voice], voice) >= ADAPTER_SHARE
    assert share_right(served["base"], voice) <= BASE_SHARE
    assert all(o.outputs[0].finish_reason == "stop" for o in served[voice])


def test_four_voices_in_one_batch_are_each_alone_bit_for_bit(
    llm: LLM, served: dict[str, list[RequestOutput]]
) -> None:
    for i, request in enumerate(demo.requests()[:6]):
        for voice in demo.VOICES:
            (alone,) = ask(llm, [request["text"]], [voice])
            assert alone.outputs == served[voice][i].outputs


# ---- along the reference ----


@dataclass(frozen=True)
class Golden:
    """One request in one voice: what the reference saw, chose and thought of it."""

    prompt: list[int]
    answer: list[int]  # fed in, whatever was chosen
    choices: list[int]  # the reference's own best token at each place of `answer`
    margins: list[float]  # of its two best logits
    logprobs: list[float]  # of the answer's tokens


def goldens(voice: str) -> list[Golden]:
    found: dict[str, Any] = json.loads(GOLDEN.read_text(encoding="utf-8"))
    return [Golden(**entry) for entry in found["voices"][voice]]


def margin_bound() -> float:
    found: dict[str, Any] = json.loads(GOLDEN.read_text(encoding="utf-8"))
    return float(found["margin_bound"])


class Forced:
    """Feeds prompts and answers in, and gives the logits that precede each answer token."""

    def __init__(self) -> None:
        self.config = read_model_config(demo.BASE)
        self.model = _C.Model(
            self.config,
            open_checkpoint(demo.BASE, self.config),
            max_position=self.config.max_position_embeddings,
        )
        self.stepper = _C.Stepper(
            self.model,
            vocab=self.config.vocab_size,
            n_pages=MAX_TOKENS // PAGE + 64,
            page_size=PAGE,
            max_seqs=64,
            max_tokens=MAX_TOKENS,
            max_pages_per_seq=64,
        )

    def logits(self, entries: list[Golden], adapter: int) -> list[np.ndarray]:
        found: list[np.ndarray] = []
        for begin in range(0, len(entries), 8):
            found += self._step(entries[begin : begin + 8], adapter)
        return found

    def _step(self, entries: list[Golden], adapter: int) -> list[np.ndarray]:
        items, n_pages = [], 0
        for entry in entries:
            tokens = entry.prompt + entry.answer[:-1]
            needed = -(-len(tokens) // PAGE)
            seq = self.stepper.create_seq(adapter=adapter)
            items.append((seq, tokens, 0, list(range(n_pages, n_pages + needed)), True))
            n_pages += needed
        logits = self.stepper.step(items, logits=True)[1]
        assert logits is not None
        rows, at = [], 0
        for entry in entries:
            at += len(entry.prompt) + len(entry.answer) - 1
            rows.append(logits[at - len(entry.answer) : at])
        return rows


@pytest.fixture(scope="module")
def forced() -> Forced:
    return Forced()


def judge(forced: Forced, entries: list[Golden], adapter: Adapter | None) -> Judgement:
    content = -1 if adapter is None else forced.model.add_adapter(adapter)
    bound, n_tokens, n_different, n_inexcusable = margin_bound(), 0, 0, 0
    for entry, rows in zip(entries, forced.logits(entries, content), strict=True):
        different = rows.argmax(axis=1) != np.array(entry.choices)
        n_tokens += len(entry.choices)
        n_different += int(different.sum())
        n_inexcusable += int((different & (np.array(entry.margins) >= bound)).sum())
    if content >= 0:
        forced.model.release_adapter(content)
    return n_different / n_tokens, n_inexcusable


def stored(forced: Forced, voice: str) -> Adapter | None:
    return None if voice == "base" else read_adapter(demo.ADAPTERS[voice], forced.config)


@needs_golden
@pytest.mark.parametrize("voice", demo.VOICES)
def test_choices_are_the_references_but_for_near_ties(forced: Forced, voice: str) -> None:
    share, n_inexcusable = judge(forced, goldens(voice), stored(forced, voice))
    assert n_inexcusable == 0
    assert share <= DIFFERENT_SHARE


@needs_golden
@pytest.mark.parametrize("voice", demo.VOICES)
def test_logprobs_are_the_references_to_rounding(forced: Forced, voice: str) -> None:
    adapter = stored(forced, voice)
    content = -1 if adapter is None else forced.model.add_adapter(adapter)
    entries = goldens(voice)
    errors = []
    for entry, rows in zip(entries, forced.logits(entries, content), strict=True):
        best = rows.max(axis=1, keepdims=True).astype(np.float64)
        totals = np.log(np.exp(rows - best).sum(axis=1)) + best[:, 0]
        found = rows[np.arange(len(rows)), entry.answer] - totals
        # A token that the reference all but rules out has a steep logprob; likely ones are judged.
        likely = np.array(entry.logprobs) > -2
        errors.append(np.abs(found - entry.logprobs)[likely])
    assert float(np.concatenate(errors).mean()) < 0.02


# ---- mutants ----


def louder(adapter: Adapter) -> Adapter:
    return replace(
        adapter, modules=tuple(replace(m, scale=m.scale * 1.25) for m in adapter.modules)
    )


def without_down_proj(adapter: Adapter) -> Adapter:
    return replace(
        adapter, modules=tuple(m for m in adapter.modules if m.projection != "down_proj")
    )


def q_and_k_swapped(adapter: Adapter) -> Adapter:
    """Each takes the other's A; their B are of unlike shapes."""
    a = {(m.layer, m.projection): m.a for m in adapter.modules}
    other = {"q_proj": "k_proj", "k_proj": "q_proj"}
    return replace(
        adapter,
        modules=tuple(
            replace(m, a=a[m.layer, other.get(m.projection, m.projection)])  # type: ignore[index]
            for m in adapter.modules
        ),
    )


@needs_golden
@pytest.mark.parametrize("mutate", [louder, without_down_proj, q_and_k_swapped])
@pytest.mark.parametrize("voice", demo.ADAPTERS)
def test_a_mutant_fails_the_judgement(
    forced: Forced, voice: str, mutate: Callable[[Adapter], Adapter]
) -> None:
    adapter = stored(forced, voice)
    assert adapter is not None
    share, n_inexcusable = judge(forced, goldens(voice), mutate(adapter))
    assert n_inexcusable > 0 or share > DIFFERENT_SHARE
