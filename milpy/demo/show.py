"""milpy demo: held-out requests, each answered by the base and three adapters in one batch."""

from __future__ import annotations

import shutil
import sys
import textwrap
import time
from collections.abc import Sequence

from milpy import demo
from milpy.errors import ConfigError, RequestError
from milpy.llm import LLM
from milpy.outputs import RequestOutput
from milpy.sampling import SamplingParams

MAX_TOKENS = 128
INDENT = 10


def show_demo(prompts: Sequence[str] | None, n: int, *, device: str, is_quiet: bool) -> int:
    """Answer `prompts`, or `n` held-out requests, and print every voice's answer."""
    if not demo.BASE.is_dir():
        raise ConfigError(f"{demo.BASE}: no such folder, expected the demo model")
    texts, expected = _texts(prompts, n)
    progress = not is_quiet
    with LLM(demo.BASE, device=device, adapters=demo.ADAPTERS, progress=progress) as llm:
        begin = time.monotonic()
        outputs = llm.generate(
            [demo.format_request(text) for text in texts for _ in demo.VOICES],
            SamplingParams(temperature=0, max_tokens=MAX_TOKENS),
            adapter=[None if v == "base" else v for _ in texts for v in demo.VOICES],
            use_tqdm=not is_quiet,
        )
        seconds = time.monotonic() - begin
        facts = llm.stats()
    n_voices = len(demo.VOICES)
    for i, text in enumerate(texts):
        _print_request(text, outputs[i * n_voices : (i + 1) * n_voices])
    n_right = sum(
        output.outputs[0].text == answer for output, answer in zip(outputs, expected, strict=False)
    )
    n_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    cpu = f"{facts['n_threads']} threads, {facts['isa']}"
    compared = f", {n_right} of {len(expected)} answers exactly right" if expected else ""
    print(
        f"{len(outputs)} requests in one batch, {len(demo.ADAPTERS)} adapters and the base"
        f"{compared}: {n_tokens} tokens, {n_tokens / seconds:.0f} tok/s, "
        f"{cpu if facts['device'] == 'cpu' else facts['device']}"
    )
    return 0


def _texts(prompts: Sequence[str] | None, n: int) -> tuple[list[str], list[str]]:
    """Requests, and the right answer of each voice to each, where they are known."""
    if prompts:
        return list(prompts), []
    held_out = demo.requests()
    if not 1 <= n <= len(held_out):
        raise RequestError(f"--n is {n}, expected 1..{len(held_out)}")
    chosen = held_out[:n]
    answers = [request["answers"][voice] for request in chosen for voice in demo.VOICES]
    return [request["text"] for request in chosen], answers


def _print_request(text: str, outputs: Sequence[RequestOutput]) -> None:
    width = min(shutil.get_terminal_size().columns, 110)
    for line in text.splitlines():
        print(_bold(textwrap.fill(line, width)))
    for voice, output in zip(demo.VOICES, outputs, strict=True):
        body = textwrap.fill(output.outputs[0].text, width, subsequent_indent=" " * INDENT,
                             initial_indent=f"  {voice:<{INDENT - 2}}")  # fmt: skip
        print(body)
    print()


def _bold(text: str) -> str:
    return f"\033[1m{text}\033[0m" if sys.stdout.isatty() else text
