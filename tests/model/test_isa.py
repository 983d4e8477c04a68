"""The whole model on every instruction set of this machine gives the same bits."""

from __future__ import annotations

from itertools import product

import pytest

from milpy import _C, LLM, SamplingParams, demo

PROMPTS = [demo.format_request(request["text"]) for request in demo.requests()[:2]]


def answers(isa: str, n_threads: int, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Texts, tokens and logprobs of each voice, greedy and drawn, in chunks of 24 tokens."""
    monkeypatch.setenv("MILPY_CPU_ISA", isa)
    rows = list(product(PROMPTS, demo.VOICES, (0.0, 1.0)))
    with LLM(
        demo.BASE,
        adapters=demo.ADAPTERS,
        n_threads=n_threads,
        max_num_batched_tokens=24,
        max_num_seqs=16,
        progress=False,
    ) as llm:
        assert llm.stats()["isa"] == isa
        outputs = llm.generate(
            [prompt for prompt, _, _ in rows],
            [SamplingParams(temperature=t, seed=7, max_tokens=6, logprobs=3) for _, _, t in rows],
            adapter=[None if voice == "base" else voice for _, voice, _ in rows],
            use_tqdm=False,
        )
    return [output.outputs for output in outputs]


def test_every_instruction_set_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MILPY_CPU_ISA", raising=False)
    available = _C.machine_report()["isa_available"].split()
    assert available[-1] == "scalar"
    expected = answers(available[0], 2, monkeypatch)
    for isa in available[1:]:
        assert answers(isa, 1, monkeypatch) == expected, isa
