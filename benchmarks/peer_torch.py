"""torch and transformers on bench_engine's shapes, in a process of their own.

The model is transformers' Llama with random bf16 weights and sdpa, as one would run it without a
server. Says that it is ready, or in a note why it is not, then answers each line with its tokens a
second, in JSON.

    python -m benchmarks.peer_torch FOLDER-WITH-CONFIG N-THREADS
    prefill LENGTH                          one prompt, logits of the last row only
    decode N-SEQS CONTEXT N-STEPS           steps of N-SEQS sequences from CONTEXT tokens on
"""

from __future__ import annotations

import json
import sys
import time
from functools import partial

try:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
except ImportError as error:
    print(json.dumps({"note": f"{error.name} not installed"}), flush=True)
    raise SystemExit(0) from None


class Peer:
    def __init__(self, folder: str, n_threads: int) -> None:
        torch.set_num_threads(n_threads)
        torch.manual_seed(1)
        config = AutoConfig.from_pretrained(folder)
        self._model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
        self._vocab = config.vocab_size

    def _prompt(self, length: int) -> torch.Tensor:
        return torch.randint(3, self._vocab, (1, length))

    def prefill(self, length: int) -> float:
        prompt = self._prompt(length)
        begin = time.perf_counter()
        self._model(prompt, use_cache=True, logits_to_keep=1).logits.argmax(-1)
        return length / (time.perf_counter() - begin)

    def decode(self, n_seqs: int, context: int, n_steps: int) -> float:
        """All sequences begin with one prompt: a step's time does not depend on its values."""
        out = self._model(self._prompt(context), use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        cache.batch_repeat_interleave(n_seqs)
        tokens = out.logits[:, -1].argmax(-1, keepdim=True).repeat(n_seqs, 1)
        begin = time.perf_counter()
        for _ in range(n_steps):
            logits = self._model(tokens, past_key_values=cache, logits_to_keep=1).logits
            tokens = logits[:, -1].argmax(-1, keepdim=True)
        return n_seqs * n_steps / (time.perf_counter() - begin)


@torch.inference_mode()
def main(folder: str, n_threads: str) -> None:
    peer = Peer(folder, int(n_threads))
    print(json.dumps({"ready": torch.__version__}), flush=True)
    warm: set[str] = set()
    for line in sys.stdin:
        what, *numbers = line.split()
        run = partial({"prefill": peer.prefill, "decode": peer.decode}[what], *map(int, numbers))
        # oneDNN makes its kernels for a shape when it first meets it.
        if line not in warm:
            run()
            warm.add(line)
        print(json.dumps({"rate": run()}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
