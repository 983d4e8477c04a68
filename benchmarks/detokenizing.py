"""What the tokens of a step cost the thread that turns them into text, by the demo's tokenizer."""

from __future__ import annotations

import time

from milpy import _C, demo
from milpy.answer import AnswerStream
from milpy.sampling import SamplingParams
from milpy.tokenizer import Tokenizer

N_STEPS = 200


def step_ms(n_rows: int) -> float:
    """Milliseconds for one token of each of n_rows answers. That thread is not the engine's."""
    tokenizer = Tokenizer(demo.BASE)
    ids = [id for request in demo.requests() for id in tokenizer.encode(request["answers"]["base"])]
    streams = [AnswerStream(SamplingParams(), (), tokenizer) for _ in range(n_rows)]
    begin = time.perf_counter()
    for step in range(N_STEPS):
        for row, stream in enumerate(streams):
            stream.push((ids[(step + 17 * row) % len(ids)], 0.0, 0, []), _C.FINISH_NONE)
    return 1e3 * (time.perf_counter() - begin) / N_STEPS
