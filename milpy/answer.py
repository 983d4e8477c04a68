"""One answer as it grows: sampled tokens to text, stop strings found, chunks for whoever reads.

Text is searched as though it came character by character: the stop string that is complete first
ends the answer, wherever the tokens' borders lie. Text that may yet become a stop string is held
back, so that what has been streamed is never taken back.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from milpy import _C
from milpy.outputs import CompletionOutput, FinishReason, Logprob
from milpy.sampling import SamplingParams
from milpy.tokenizer import Detokenizer, Tokenizer

Sample = tuple[int, float, int, list[tuple[int, float]]]


@dataclass(slots=True)
class Chunk:
    """What is new of an answer. `logprobs` is empty unless they were asked for."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


class StopFinder:
    """Looks for stop strings in text that comes in pieces."""

    __slots__ = ("_held", "_include", "_longest", "_stops", "found")

    def __init__(self, stops: tuple[str, ...], *, include: bool = False) -> None:
        self._stops = stops
        self._include = include
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self.found: str | None = None

    def push(self, piece: str) -> str:
        """The text that is now certain. After `found` is set it ends there."""
        text = self._held + piece
        matches = [
            (at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0
        ]
        if matches:
            end, begin, self.found = min(matches)
            self._held = ""
            return text[: end if self._include else begin]
        n_held = self._n_held(text)
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held]

    def flush(self) -> str:
        """What was held back, once nothing more can come."""
        text, self._held = self._held, ""
        return text

    def _n_held(self, text: str) -> int:
        """The longest end of `text` that begins a stop string."""
        for n in range(min(self._longest - 1, len(text)), 0, -1):
            tail = text[len(text) - n :]
            if any(stop.startswith(tail) for stop in self._stops):
                return n
        return 0


class AnswerStream:
    """Turns one request's events into chunks."""

    __slots__ = ("_detokenizer", "_eos", "_params", "_stops", "_tokenizer", "is_finished")

    def __init__(
        self, params: SamplingParams, eos_token_ids: Collection[int], tokenizer: Tokenizer | None
    ) -> None:
        self._params = params
        self._eos = () if params.ignore_eos else eos_token_ids
        self._tokenizer = tokenizer
        self._detokenizer: Detokenizer | None = None
        if tokenizer is not None:
            self._detokenizer = Detokenizer(
                tokenizer, skip_special_tokens=params.skip_special_tokens
            )
        self._stops = StopFinder(params.stop, include=params.include_stop_str_in_output)
        self.is_finished = False

    def push(self, sample: Sample | None, finish: int) -> Chunk:
        """The next event. Nothing may follow once `is_finished`."""
        chunk = Chunk()
        piece = ""
        if sample is not None:
            token = sample[0]
            chunk.token_ids.append(token)
            if self._params.logprobs is not None:
                chunk.logprobs.append(self._logprobs(sample))
            is_ending = finish == _C.FINISH_STOP and not self._params.include_stop_str_in_output
            if self._detokenizer is not None and not is_ending:
                piece = self._detokenizer.push(token)
        if finish != _C.FINISH_NONE and self._detokenizer is not None:
            piece += self._detokenizer.flush()
        chunk.text = self._stops.push(piece)
        if self._stops.found is not None:
            chunk.finish_reason, chunk.stop_reason = "stop", self._stops.found
        elif finish != _C.FINISH_NONE:
            chunk.text += self._stops.flush()
            self._end(chunk, finish)
        self.is_finished = chunk.finish_reason is not None
        return chunk

    def _end(self, chunk: Chunk, finish: int) -> None:
        if finish == _C.FINISH_STOP:
            chunk.finish_reason = "stop"
            token = chunk.token_ids[-1]
            chunk.stop_reason = None if token in self._eos else token
        else:
            reasons: dict[int, FinishReason]
            reasons = {_C.FINISH_LENGTH: "length", _C.FINISH_CANCELLED: "abort"}
            chunk.finish_reason = reasons.get(finish, "error")

    def _logprobs(self, sample: Sample) -> dict[int, Logprob]:
        token, logprob, rank, top = sample
        result = {token: self._logprob(token, logprob, rank)}
        for place, (other, value) in enumerate(top, 1):
            result.setdefault(other, self._logprob(other, value, place))
        return result

    def _logprob(self, token: int, logprob: float, rank: int) -> Logprob:
        decoded = None if self._tokenizer is None else self._tokenizer.decode_token(token)
        return Logprob(logprob, rank, decoded)


class Answer:
    """The sum of an answer's chunks."""

    __slots__ = ("_logprobs", "_texts", "finish_reason", "stop_reason", "token_ids")

    def __init__(self, *, has_logprobs: bool) -> None:
        self._texts: list[str] = []
        self._logprobs: list[dict[int, Logprob]] | None = [] if has_logprobs else None
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None

    def add(self, chunk: Chunk) -> None:
        if chunk.text:
            self._texts.append(chunk.text)
        self.token_ids += chunk.token_ids
        if self._logprobs is not None:
            self._logprobs += chunk.logprobs
        self.finish_reason, self.stop_reason = chunk.finish_reason, chunk.stop_reason

    def output(self) -> CompletionOutput:
        """A copy of what there is, which later chunks leave alone."""
        self._texts = ["".join(self._texts)]
        cumulative = None
        if self._logprobs is not None:
            cumulative = sum(
                entry[token].logprob
                for token, entry in zip(self.token_ids, self._logprobs, strict=True)
            )
        return CompletionOutput(
            text=self._texts[0],
            token_ids=list(self.token_ids),
            cumulative_logprob=cumulative,
            logprobs=None if self._logprobs is None else list(self._logprobs),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )
