"""How the next token is chosen and when an answer ends, by vLLM's names.

Each value is checked here, once, with found and expected in the message. A parameter that milpy
does not honour yet is refused by name: it is never taken and ignored.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from milpy.errors import RequestError
from milpy.scalars import (
    MAX_INT32,
    MAX_UINT64,
    check_flag,
    check_integer,
    check_real,
    refuse,
    show_argument,
)

MAX_LOGPROBS = 20
MAX_STOPS = 64
MAX_STOP_BYTES = 1024
MIN_TEMPERATURE = 1e-6  # below it logits / temperature may leave fp32
MAX_TEMPERATURE = 100.0

# vLLM's parameters that milpy has not got yet.
NOT_BUILT = frozenset(
    """
    allowed_token_ids bad_words best_of detokenize extra_args flat_logprobs frequency_penalty
    guided_decoding length_penalty logit_bias logits_processors logprob_token_ids min_p min_tokens
    output_kind presence_penalty prompt_logprobs repetition_detection repetition_penalty
    spaces_between_special_tokens stream_interval structured_outputs thinking_token_budget
    truncate_prompt_tokens typical_p use_beam_search
    """.split()
)


@dataclass(frozen=True, slots=True, init=False)
class SamplingParams:
    """Parameters of one request; vLLM's names and meanings, but for `max_tokens`.

    max_tokens=None runs until the end of the answer or of the context, where vLLM stops at 16.
    temperature is 1.0 unless given, as vLLM's, so that answers differ from run to run; 0 is greedy,
    the command line's default. top_k 0 or -1 is off. seed=None draws a fresh seed per request. stop
    strings are looked for in the decoded text as though after each character. logprobs=n gives the
    chosen token's log-probability and the n best, before temperature and filters.
    """

    n: int
    temperature: float
    top_k: int
    top_p: float
    seed: int | None
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    max_tokens: int | None
    logprobs: int | None
    skip_special_tokens: bool
    include_stop_str_in_output: bool

    def __init__(
        self,
        *,
        n: int = 1,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: str | Iterable[str] | None = None,
        stop_token_ids: Iterable[int] | None = None,
        ignore_eos: bool = False,
        max_tokens: int | None = None,
        logprobs: int | None = None,
        skip_special_tokens: bool = True,
        include_stop_str_in_output: bool = False,
        **others: object,
    ) -> None:
        for name in others:
            if name in NOT_BUILT:
                raise RequestError(f"{name} is {show_argument(others[name])}: not built yet")
            raise TypeError(f"SamplingParams has no parameter {name!r}")
        if check_integer("n", n, 1, MAX_INT32) != 1:
            raise RequestError(f"n is {n}, expected 1: several answers per prompt not built yet")
        values = {
            "n": 1,
            "temperature": _temperature(temperature),
            "top_k": max(check_integer("top_k", top_k, -1, MAX_INT32), 0),
            "top_p": _top_p(top_p),
            "seed": _optional("seed", seed, 0, MAX_UINT64),
            "stop": _stop_strings(stop),
            "stop_token_ids": _stop_token_ids(stop_token_ids),
            "ignore_eos": check_flag("ignore_eos", ignore_eos),
            "max_tokens": (
                None
                if max_tokens is None
                else check_integer("max_tokens", max_tokens, 1, MAX_INT32)
            ),
            "logprobs": (
                None if logprobs is None else check_integer("logprobs", logprobs, 0, MAX_LOGPROBS)
            ),
            "skip_special_tokens": check_flag("skip_special_tokens", skip_special_tokens),
            "include_stop_str_in_output": check_flag(
                "include_stop_str_in_output", include_stop_str_in_output
            ),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)


def _optional(name: str, value: object, low: int, high: int) -> int | None:
    return None if value is None else check_integer(name, value, low, high)


def _temperature(value: object) -> float:
    expected = f"0 or a number in {MIN_TEMPERATURE:g}..{MAX_TEMPERATURE:g}"
    number = check_real("temperature", value, expected)
    if number != 0 and not MIN_TEMPERATURE <= number <= MAX_TEMPERATURE:
        refuse("temperature", number, expected)
    return number


def _top_p(value: object) -> float:
    expected = "a number above 0 and at most 1"
    number = check_real("top_p", value, expected)
    # The core holds it in fp32, where a smaller number would be zero.
    if not 1e-37 < number <= 1:
        refuse("top_p", number, expected)
    return number


def _stop_strings(value: str | Iterable[str] | None) -> tuple[str, ...]:
    expected = f"a string or at most {MAX_STOPS} strings of 1 to {MAX_STOP_BYTES} bytes"
    if value is None:
        return ()
    stops = (value,) if isinstance(value, str) else value
    if not isinstance(stops, Iterable):
        refuse("stop", value, expected)
    found = tuple(stops)
    if len(found) > MAX_STOPS:
        refuse("stop", f"{len(found)} strings", expected)
    for text in found:
        if not isinstance(text, str) or not text:
            refuse("stop", text, expected)
        # surrogatepass: such a string matches no decoded text, and is no error of size.
        if len(text.encode("utf-8", "surrogatepass")) > MAX_STOP_BYTES:
            refuse("stop", text, expected)
    return tuple(dict.fromkeys(found))


def _stop_token_ids(value: Iterable[int] | None) -> tuple[int, ...]:
    expected = f"at most {MAX_STOPS} token ids"
    if value is None:
        return ()
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        refuse("stop_token_ids", value, expected)
    tokens = tuple(check_integer("stop_token_ids", token, 0, MAX_INT32) for token in value)
    if len(tokens) > MAX_STOPS:
        refuse("stop_token_ids", f"{len(tokens)} ids", expected)
    return tuple(dict.fromkeys(tokens))
