"""What may stand for a prompt: text, token ids, or vLLM's dicts of either; one, or a list of them.

A list of integers alone is one prompt. Everything is checked before anything is submitted; messages
name the prompt's index, what was found and what was expected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

import numpy as np
from numpy.typing import NDArray

from milpy.errors import RequestError
from milpy.scalars import kind_of_argument, show_argument
from milpy.tokenizer import Tokenizer

# A dict has "prompt" or "prompt_token_ids".
PromptType: TypeAlias = "str | Sequence[int] | NDArray[Any] | Mapping[str, Any]"

_EXPECTED = 'text, a list of token ids, {"prompt": text} or {"prompt_token_ids": ids}'


@dataclass(frozen=True, slots=True)
class Prompt:
    """A checked prompt. `text` is None where ids were given."""

    text: str | None
    token_ids: NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class PromptReader:
    """Checks prompts for one model."""

    tokenizer: Tokenizer | None
    missing_tokenizer: str  # the message where there is none
    vocab_size: int
    max_model_len: int

    def read(self, prompt: object, where: str) -> Prompt:
        """`where` begins every message: "prompts[3]"."""
        text: str | None = None
        given: object = prompt
        if isinstance(prompt, Mapping):
            text, given = self._open_mapping(prompt, where)
        if isinstance(given, str):
            text = given
            if not text:  # its BOS alone is surely not what was meant, and can be given as an id
                raise RequestError(f"{where} is empty, expected text")
            ids = _as_int32(self._require(where).encode(given))
        else:
            ids = self._read_ids(given, where)
        n_tokens = len(ids)
        if n_tokens == 0:
            raise RequestError(f"{where} is empty, expected at least one token")
        if n_tokens >= self.max_model_len:
            raise RequestError(
                f"{where} has {n_tokens} tokens, expected at most {self.max_model_len - 1}: the "
                f"context holds {self.max_model_len}, prompt and answer"
            )
        return Prompt(text, ids)

    def read_chat(self, messages: Any, where: str, *, add_generation_prompt: bool) -> Prompt:
        text, ids = self._require(where).encode_chat(
            messages, add_generation_prompt=add_generation_prompt
        )
        prompt = self.read(ids, where)
        return Prompt(text, prompt.token_ids)

    def check_token(self, token: int, what: str) -> None:
        if not 0 <= token < self.vocab_size:
            raise RequestError(f"{what} is {token}, expected an id in 0..{self.vocab_size - 1}")

    def _require(self, where: str) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError(f"{where} is text, expected token ids: {self.missing_tokenizer}")
        return self.tokenizer

    def _open_mapping(self, prompt: Mapping[Any, Any], where: str) -> tuple[str | None, object]:
        unknown = set(prompt) - {"prompt", "prompt_token_ids"}
        if unknown:
            raise RequestError(
                f"{where} has {show_argument(sorted(map(str, unknown)))}, expected {_EXPECTED}"
            )
        text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        if text is not None and not isinstance(text, str):
            raise RequestError(f"{where}: prompt is {kind_of_argument(text)}, expected text")
        if ids is None and text is None:
            raise RequestError(f"{where} has neither prompt nor prompt_token_ids")
        return (None, text) if ids is None else (text, ids)

    def _read_ids(self, given: object, where: str) -> NDArray[np.int32]:
        if isinstance(given, bytes) or not isinstance(given, Sequence | np.ndarray):
            raise RequestError(f"{where} is {kind_of_argument(given)}, expected {_EXPECTED}")
        if len(given) == 0:
            return np.empty(0, np.int32)
        try:
            ids = np.asarray(given)
        except (ValueError, OverflowError):
            _refuse_ids(given, where)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            _refuse_ids(given, where)
        outside = np.flatnonzero((ids < 0) | (ids >= self.vocab_size))
        if outside.size:
            at = int(outside[0])
            self.check_token(int(ids[at]), f"{where}: token {at}")
        return _as_int32(ids)


def _as_int32(ids: Any) -> NDArray[np.int32]:
    return np.ascontiguousarray(ids, dtype=np.int32)


def _refuse_ids(given: Sequence[Any] | NDArray[Any], where: str) -> NoReturn:
    """Name the first entry that is no id."""
    for at, token in enumerate(given):
        if isinstance(token, bool) or not isinstance(token, int | np.integer):
            raise RequestError(
                f"{where}: token {at} is {show_argument(token)}, expected an integer"
            )
        if not -(1 << 63) <= token < 1 << 63:
            raise RequestError(f"{where}: token {at} is {token}, expected an id of the vocabulary")
    raise RequestError(f"{where}: is no list of integers, expected token ids")


def is_one_prompt(prompts: object) -> bool:
    """Whether it is a prompt itself, where a list of prompts could stand as well."""
    if isinstance(prompts, str | Mapping):
        return True
    if isinstance(prompts, np.ndarray):
        return prompts.ndim == 1
    if isinstance(prompts, Sequence):
        return len(prompts) > 0 and isinstance(prompts[0], int | np.integer)
    return False


def prompt_list(prompts: object) -> list[object]:
    """Prompts as a list; an empty list is no prompts."""
    if is_one_prompt(prompts):
        return [prompts]
    if isinstance(prompts, bytes) or not isinstance(prompts, Sequence | np.ndarray):
        raise RequestError(
            f"prompts is {kind_of_argument(prompts)}, expected {_EXPECTED}, or a list of them"
        )
    return list(prompts)
