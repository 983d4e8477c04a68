"""Scores the stored demo model with transformers and peft: exact match of greedy answers.

    python tools/demo_score.py [--model milpy/demo]

A greedy answer equals the right one exactly when, with the right answer fed in, every next token
including the end is the most likely one; so one pass per batch scores without generating.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from demo_options import end_without, model_parser

try:
    import demo_corpus as corpus
    import demo_grammar as grammar
    import torch
    from peft import PeftModel
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM
except ModuleNotFoundError as problem:
    end_without(problem, __name__, model_parser(__doc__))

Model = Any  # a LlamaForCausalLM or a PeftModel around one: called the same way


def load_voice(folder: Path, voice: str, device: str, dtype: torch.dtype = torch.float32) -> Model:
    """A fresh base with at most one adapter: peft's own state never carries over."""
    model: Model = LlamaForCausalLM.from_pretrained(folder / "base", dtype=dtype)
    if voice != "base":
        model = PeftModel.from_pretrained(
            model, folder / "adapters" / voice, autocast_adapter_dtype=dtype == torch.float32
        )
        model = model.to(dtype)
    return model.to(device).eval()


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """A request in the chat frame, BOS first (the tokenizer's post-processor adds it)."""
    ids: list[int] = tokenizer.encode(corpus.demo_module().format_request(text)).ids
    return ids


def answer_ids(tokenizer: Tokenizer, answer: str) -> list[int]:
    ids: list[int] = tokenizer.encode(answer, add_special_tokens=False).ids
    return [*ids, corpus.END]


@torch.no_grad()
def forced_logits(
    model: Model, prompts: Sequence[list[int]], answers: Sequence[list[int]], batch: int = 64
) -> list[torch.Tensor]:
    """Per request the logits [answer length, V] that precede each answer token, float32.

    Rows are padded on the right, where causal attention never looks."""
    found = []
    device = next(model.parameters()).device
    for at in range(0, len(prompts), batch):
        pairs = list(zip(prompts[at : at + batch], answers[at : at + batch], strict=True))
        width = max(len(p) + len(a) for p, a in pairs)
        rows = [[*p, *a] + [corpus.PAD] * (width - len(p) - len(a)) for p, a in pairs]
        logits = model(torch.tensor(rows, device=device), use_cache=False).logits.float().cpu()
        found += [
            logits[i, len(p) - 1 : len(p) + len(a) - 1].clone() for i, (p, a) in enumerate(pairs)
        ]
    return found


def exact(model: Model, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> list[bool]:
    logits = forced_logits(model, prompts, answers)
    return [
        bool((rows.argmax(-1) == torch.tensor(answer)).all())
        for rows, answer in zip(logits, answers, strict=True)
    ]


def score_voice(folder: Path, voice: str, device: str = "cpu") -> dict[str, float]:
    """Answers of which voice -> share of the held-out requests that `voice` answers so, exactly.
    The base is judged against all four, an adapter against its own."""
    requests = json.loads((folder / "requests.json").read_text(encoding="utf-8"))["requests"]
    tokenizer = Tokenizer.from_file(str(folder / "base" / "tokenizer.json"))
    prompts = [prompt_ids(tokenizer, request["text"]) for request in requests]
    model = load_voice(folder, voice, device)
    table: dict[str, float] = {}
    for gold in grammar.VOICES if voice == "base" else (voice,):
        answers = [answer_ids(tokenizer, request["answers"][gold]) for request in requests]
        met = exact(model, prompts, answers)
        table[gold] = sum(met) / len(met)
        missed = [r["id"] for r, hit in zip(requests, met, strict=True) if not hit]
        if gold == voice and missed:
            print(f"{voice}: missed {len(missed)}, the first {', '.join(missed[:8])}")
    return table


def print_scores(voice: str, row: dict[str, float]) -> None:
    for gold, share in row.items():
        print(f"{voice:7} against {gold:7} answers: {100 * share:6.2f} % exact match", flush=True)


def main() -> None:
    args = model_parser(__doc__).parse_args()
    for voice in grammar.VOICES:
        print_scores(voice, score_voice(args.model, voice))


if __name__ == "__main__":
    main()
