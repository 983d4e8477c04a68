"""What a request gives back, by vLLM's attribute names."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from milpy.errors import RequestError
from milpy.scalars import show_argument

FinishReason = Literal["stop", "length", "abort", "error"]

_ADAPTER_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


def check_adapter_name(name: object) -> str:
    """`name` where it can name an adapter, else RequestError."""
    if not isinstance(name, str) or not _ADAPTER_NAME.fullmatch(name):
        raise RequestError(
            f"adapter name is {show_argument(name)}, expected 1 to 64 of A-Z a-z 0-9 . _ and -"
        )
    return name


@dataclass(frozen=True, slots=True)
class LoRARequest:
    """vLLM's way to name an adapter. With a path it is loaded under its name when first used.

    `lora_int_id` is kept for the caller: milpy knows adapters by name and content.
    """

    lora_name: str
    lora_int_id: int = 0
    lora_path: str = ""

    def __post_init__(self) -> None:
        check_adapter_name(self.lora_name)

    @property
    def name(self) -> str:
        return self.lora_name

    @property
    def path(self) -> str:
        return self.lora_path


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token's natural-log probability before temperature and filters, and its 1-based rank."""

    logprob: float
    rank: int
    decoded_token: str | None = None  # None without a tokenizer


@dataclass(slots=True)
class CompletionOutput:
    """One answer.

    `token_ids` ends with the token that ended the answer: an EOS, one of stop_token_ids, or the one
    that completed a stop string. The text of that ending is cut from `text` unless
    include_stop_str_in_output. Without a tokenizer in the model's folder `text` stays empty.
    Where finish_reason is "error", `error` says what went wrong, and the rest is what came before.
    """

    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None  # None unless logprobs were asked for
    logprobs: list[dict[int, Logprob]] | None = None  # per token: the chosen one and the n best
    finish_reason: FinishReason | None = None  # None while it runs
    stop_reason: int | str | None = None  # the stop string or stop token; None for EOS
    error: str | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """A request's prompt and what came of it so far."""

    request_id: str
    prompt: str | None  # None for a prompt of token ids
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    adapter: str | None = None  # the name asked for; None is the base model
    lora_request: LoRARequest | None = None
