"""transformers and peft as the oracle, on the CPU or on the GPU that is under test.

Both of its runs read the same stored weights. `exact` computes in float32, with TF32 off, as torch
has it; `rounded` is transformers' own in bfloat16, the price of that type in the plain formula. The
rule of `judge`: ours may be off by twice that, over all rows and in the worst one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]

CHUNK = 2048  # tokens of one forward where a prompt is long


def error(found: Logits, exact: Logits) -> float:
    """Root mean square of the difference over that of the (centred) reference."""
    return float(np.sqrt(np.square(row_errors(found, exact)).mean()))


def row_errors(found: Logits, exact: Logits) -> NDArray[np.floating[Any]]:
    """The same of each row, over the spread of all."""
    spread = exact - exact.mean(axis=1, keepdims=True)
    difference = np.square(found - exact).mean(axis=1)
    return np.asarray(np.sqrt(difference / np.square(spread).mean()))


@dataclass(frozen=True)
class Judgement:
    ours: float
    theirs: float
    our_worst: float  # of one row
    their_worst: float
    at: int  # our worst row

    @property
    def passes(self) -> bool:
        """Written so that a NaN does not."""
        return self.ours <= 2 * self.theirs and self.our_worst <= 2 * self.their_worst


def judge(found: Logits, exact: Logits, rounded: Logits) -> Judgement:
    ours, theirs = row_errors(found, exact), row_errors(rounded, exact)
    return Judgement(
        ours=error(found, exact),
        theirs=error(rounded, exact),
        our_worst=float(ours.max()),
        their_worst=float(theirs.max()),
        at=int(ours.argmax()),
    )


class Reference:
    """A Llama of transformers. In float32 until `round`; adapters are peft's, by name."""

    def __init__(
        self, model: Path | Any, device: str = "cpu", adapters: Mapping[str, Path] | None = None
    ) -> None:
        import torch  # noqa: PLC0415
        from peft import PeftModel  # noqa: PLC0415
        from transformers import LlamaForCausalLM  # noqa: PLC0415

        if isinstance(model, Path):
            model = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).to(device)
        self.model: Any = model
        self.device = device
        self._has_adapters = False
        for name, folder in (adapters or {}).items():
            if self._has_adapters:
                self.model.load_adapter(folder, adapter_name=name)
            else:
                self.model = PeftModel.from_pretrained(self.model, folder, adapter_name=name)
            self._has_adapters = True
        self.model.eval().requires_grad_(False)

    def round(self) -> None:
        """From here on everything is bfloat16, but for the table of RoPE's frequencies, which
        transformers keeps in float32 in either type."""
        import torch  # noqa: PLC0415

        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)

    def logits(self, tokens: Sequence[int], adapter: str | None = None) -> Logits:
        """[T, V]"""
        return self._run(adapter, lambda ids: self.model(ids, use_cache=False), tokens)

    def last_logits(self, tokens: Sequence[int], n_rows: int) -> Logits:
        """[n_rows, V] of a long prompt, through a cache, so that no T x T scores are ever held."""
        from transformers import DynamicCache  # noqa: PLC0415

        cache = DynamicCache()
        cut = len(tokens) - n_rows

        def run(ids: Any) -> Any:
            for begin in range(0, cut, CHUNK):
                part = ids[:, begin : min(begin + CHUNK, cut)]
                self.model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
            return self.model(ids[:, cut:], past_key_values=cache, use_cache=True)

        return self._run(None, run, tokens)

    def _run(self, adapter: str | None, forward: Any, tokens: Sequence[int]) -> Logits:
        import torch  # noqa: PLC0415

        ids = torch.tensor([tokens], device=self.device)
        with torch.no_grad():
            if not self._has_adapters:
                found = forward(ids)
            elif adapter is None:
                with self.model.disable_adapter():
                    found = forward(ids)
            else:
                self.model.set_adapter(adapter)
                found = forward(ids)
        logits: Logits = found.logits[0].float().cpu().numpy()
        return logits
