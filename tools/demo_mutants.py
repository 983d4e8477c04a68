"""Adapters that are wrong in ways a serving bug would make them; the goldens must tell.

    python tools/demo_mutants.py [--model milpy/demo]      (prints how transformers judges each)

A mutant is written as an ordinary PEFT folder, so that whatever reads adapters can be given it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo_options import end_without, model_parser

try:
    import demo_corpus as corpus
    import demo_goldens as goldens
    import demo_score as score
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file, save_file
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM
except ModuleNotFoundError as problem:
    end_without(problem, __name__, model_parser(__doc__))

Tensors = dict[str, torch.Tensor]
Mutation = Callable[[dict[str, Any], Tensors], Tensors]  # may edit the config, returns the tensors

DIFFERENT_SHARE = 0.005  # of tokens chosen otherwise: more is a failure even if all are near-ties
MARGIN_ERROR = 0.1  # mean, in logits: about twice what transformers itself has in bf16
SHARE_RIGHT = 0.95
DROPPED = "down_proj"


def louder(config: dict[str, Any], tensors: Tensors) -> Tensors:
    config["lora_alpha"] *= 1.25
    return tensors


def one_module_dropped(config: dict[str, Any], tensors: Tensors) -> Tensors:
    """Tensors and targets alike, so that the folder is still a whole adapter."""
    config["target_modules"] = [name for name in config["target_modules"] if name != DROPPED]
    return {name: tensor for name, tensor in tensors.items() if f".{DROPPED}." not in name}


def q_and_k_swapped(_config: dict[str, Any], tensors: Tensors) -> Tensors:
    """Each takes the other's A, [rank, hidden] both; their B are of unlike shapes."""
    other = {"q_proj.lora_A": "k_proj.lora_A", "k_proj.lora_A": "q_proj.lora_A"}

    def source(name: str) -> str:
        for mine, theirs in other.items():
            if mine in name:
                return name.replace(mine, theirs)
        return name

    return {name: tensors[source(name)] for name in tensors}


MUTATIONS: dict[str, Mutation] = {
    "scale x 1.25": louder,
    f"{DROPPED} dropped": one_module_dropped,
    "q and k swapped": q_and_k_swapped,
}


def write_mutant(source: Path, out: Path, mutation: Mutation) -> Path:
    """The adapter in `source`, mutated, as a folder `out` made here."""
    config = json.loads((source / "adapter_config.json").read_text(encoding="utf-8"))
    # Cloned: the file may not hold two names of one storage.
    tensors = {
        name: tensor.clone()
        for name, tensor in mutation(
            config, load_file(source / "adapter_model.safetensors")
        ).items()
    }
    out.mkdir(parents=True)
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    return out


@dataclass(frozen=True)
class Judgement:
    """A model against the goldens of one voice, teacher-forced along the reference."""

    different: float  # share of tokens chosen otherwise
    inexcusable: float  # of those, the share of tokens where the reference was not in two minds
    margin_error: float  # mean over tokens, in logits
    margin_error_999: float  # its 99.9th percentile: what the near-tie bound was fixed by
    right: float  # share of requests answered exactly right

    @property
    def broken(self) -> list[str]:
        """The rules that do not hold; a served adapter breaks none."""
        rules = {
            "choice": self.inexcusable == 0 and self.different <= DIFFERENT_SHARE,
            "margin": self.margin_error <= MARGIN_ERROR,
            "exact": self.right >= SHARE_RIGHT,
        }
        return [name for name, holds in rules.items() if not holds]


def margins_of(logits: torch.Tensor, answer: list[int]) -> torch.Tensor:
    """By how much each token of the answer beats the best other one."""
    tokens = torch.tensor(answer)[:, None]
    others = logits.scatter(1, tokens, -torch.inf).max(-1).values
    return logits.gather(1, tokens)[:, 0] - others


def judge(model: score.Model, folder: Path, voice: str) -> Judgement:
    entries = goldens.read_goldens()[voice]
    logits = score.forced_logits(model, [e.prompt for e in entries], [e.answer for e in entries])
    choices = torch.cat(logits).argmax(-1)
    different = choices != torch.tensor([token for e in entries for token in e.choices])
    margins = torch.tensor([margin for e in entries for margin in e.margins])
    found = torch.cat([margins_of(rows, e.answer) for rows, e in zip(logits, entries, strict=True)])
    errors = (found - margins).abs()
    return Judgement(
        float(different.double().mean()),
        float((different & (margins >= goldens.MARGIN_BOUND)).double().mean()),
        float(errors.mean()),
        float(errors.quantile(0.999)),
        share_right(model, folder, entries, voice),
    )


def share_right(
    model: score.Model, folder: Path, entries: list[goldens.Golden], voice: str
) -> float:
    tokenizer = Tokenizer.from_file(str(folder / "base" / "tokenizer.json"))
    requests = goldens.read_requests(folder)
    right = [score.answer_ids(tokenizer, request["answers"][voice]) for request in requests]
    return sum(score.exact(model, [e.prompt for e in entries], right)) / len(right)


def load_adapter(folder: Path, adapter: Path) -> score.Model:
    base = LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    return PeftModel.from_pretrained(base, adapter).float().eval()


def print_row(voice: str, name: str, judgement: Judgement) -> None:
    print(
        f"{voice:7} {name:18} other choice {100 * judgement.different:5.2f} %, beyond near-ties "
        f"{100 * judgement.inexcusable:5.2f} %, exact {100 * judgement.right:6.2f} %, margins off "
        f"by {judgement.margin_error:5.3f} ({judgement.margin_error_999:6.3f} at the 99.9th "
        f"percentile): breaks {', '.join(judgement.broken) or 'nothing'}",
        flush=True,
    )


def main() -> None:
    args = model_parser(__doc__).parse_args()
    folder: Path = args.model
    with tempfile.TemporaryDirectory() as scratch:
        for voice in corpus.demo_module().ADAPTERS:
            stored = folder / "adapters" / voice
            models = {
                "as stored": lambda adapter=stored: load_adapter(folder, adapter),
                "as stored, bf16": lambda name=voice: score.load_voice(
                    folder, name, "cpu", torch.bfloat16
                ),
            }
            for i, (name, mutation) in enumerate(MUTATIONS.items()):
                mutant = write_mutant(stored, Path(scratch) / f"{voice}-{i}", mutation)
                models[name] = lambda adapter=mutant: load_adapter(folder, adapter)
            for name, load in models.items():
                print_row(voice, name, judge(load(), folder, voice))


if __name__ == "__main__":
    main()
