"""The core over an engine that does as a test tells it: faults that the C engine never has."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import pytest

from milpy import _C, LLM, SamplingParams, core
from milpy.errors import AnswerError, EngineError, RequestError
from milpy.memory import MemoryReport

FOREVER = SamplingParams(ignore_eos=True)
STATS = {"max_model_len": 64, "n_running": 0, "n_waiting": 0, "kv_bytes": 0}

MEMORY = [field.name for field in fields(MemoryReport) if field.name != "device"]


class ScriptedEngine:
    """Stands in for _C.Engine. `script` maps the how-manieth submission to events, or an error."""

    script: dict[int, Any] = {}
    fails_with: Exception | None = None

    def __init__(self, model: object, **knobs: object) -> None:
        self.events: SimpleQueue[tuple[int, int, Any]] = SimpleQueue()
        self.stopped = threading.Event()
        self.cancelled: list[int] = []
        self.n_submitted = 0
        self.is_freed = False

    def run(self) -> None:
        self.stopped.wait()
        if self.fails_with is not None:
            raise self.fails_with

    def submit(self, tokens: object, **options: object) -> int:
        self.n_submitted += 1
        answer = self.script.get(self.n_submitted, [])
        if isinstance(answer, Exception):
            raise answer
        for finish, sample in answer:
            self.events.put((self.n_submitted, finish, sample))
            if finish == _C.FINISH_ERROR:
                self.stopped.set()
        return self.n_submitted

    def cancel(self, id: int) -> None:
        self.cancelled.append(id)
        self.events.put((id, _C.FINISH_CANCELLED, None))

    def poll(self, timeout_ms: int, max_events: int) -> list[tuple[int, int, Any]]:
        while True:
            try:
                return [self.events.get(timeout=0.01)]
            except Empty:
                if self.stopped.is_set():
                    raise EngineError("the loop has ended") from None

    def stop(self) -> None:
        self.stopped.set()

    def free(self) -> None:
        self.is_freed = True

    def stats(self) -> dict[str, int]:
        return dict(STATS)

    def memory(self) -> dict[str, Any]:
        return {"device": "cpu"} | dict.fromkeys(MEMORY, 0)


class FakeC:
    """milpy._C with a scripted engine."""

    Engine = ScriptedEngine

    def __getattr__(self, name: str) -> Any:
        return getattr(_C, name)


@pytest.fixture
def scripted(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LLM]:
    monkeypatch.setattr(core, "_C", FakeC())
    monkeypatch.setattr(ScriptedEngine, "script", {})
    monkeypatch.setattr(ScriptedEngine, "fails_with", None)
    with LLM(model, n_threads=1, progress=False) as llm:
        yield llm


def engine_of(llm: LLM) -> ScriptedEngine:
    engine: Any = llm._core._engine
    return engine


def token(number: int) -> tuple[int, float, int, list[Any]]:
    return (number, -1.0, 1, [])


def test_a_fault_reaches_every_open_request_and_later_ones(scripted: LLM) -> None:
    engine = engine_of(scripted)
    ScriptedEngine.fails_with = EngineError("step 7: the device is gone")
    ScriptedEngine.script = {
        1: [(_C.FINISH_NONE, token(65))],
        2: [(_C.FINISH_ERROR, None)],
    }
    engine.events.put((99, _C.FINISH_NONE, token(66)))  # of a request that nobody knows
    stream = scripted.stream([1], FOREVER)
    assert next(stream).outputs[0].token_ids == [65]
    with pytest.raises(EngineError, match="has failed: step 7: the device is gone"):
        scripted.generate([[1]], FOREVER, use_tqdm=False)
    with pytest.raises(EngineError, match="closed while the request was open|has failed"):
        next(stream)
    for call in (scripted.stats, lambda: scripted.generate([[1]])):
        with pytest.raises(EngineError, match="has failed: step 7"):
            call()
    scripted.close()
    assert engine.is_freed


def test_a_refusal_in_mid_batch_cancels_what_was_submitted(scripted: LLM) -> None:
    ScriptedEngine.script = {3: RequestError("tokens[0] is strange, expected another")}
    with pytest.raises(RequestError, match="strange"):
        scripted.generate([[1], [2], [3], [4]], FOREVER, use_tqdm=False)
    engine = engine_of(scripted)
    assert (engine.cancelled, engine.n_submitted) == ([1, 2], 3)
    assert not scripted._core._jobs


def test_a_fault_in_one_answers_text_stays_its_own(
    scripted: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = scripted.get_tokenizer()
    decode = type(tokenizer).decode

    def decode_but_66(self: Any, ids: list[int], **options: Any) -> str:
        if 66 in ids:
            raise OverflowError("out of range")
        return decode(self, ids, **options)

    monkeypatch.setattr(type(tokenizer), "decode", decode_but_66)
    ScriptedEngine.script = {
        1: [(_C.FINISH_NONE, token(65)), (_C.FINISH_NONE, token(66))],
        2: [(_C.FINISH_NONE, token(65)), (_C.FINISH_LENGTH, token(67))],
    }
    bad, good = (scripted.stream([1], FOREVER) for _ in range(2))
    with pytest.raises(AnswerError, match="request 1: out of range"):
        list(bad)
    assert [output.finished for output in good] == [False, True]
    assert 1 in engine_of(scripted).cancelled


def test_several_events_of_a_request_in_one_batch_end_it_once(
    scripted: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call once returned before its other requests were answered: two events of one request in
    one batch were counted as two requests."""
    engine = engine_of(scripted)
    held: list[tuple[int, int, Any]] = []
    poll = engine.poll

    def in_one_batch(timeout_ms: int, max_events: int) -> list[tuple[int, int, Any]]:
        while len(held) < 3:
            held.extend(poll(timeout_ms, max_events))
        batch, held[:] = held[:3], held[3:]
        return batch

    # The pump is inside the first poll; its event comes alone, the other nine in threes.
    monkeypatch.setattr(engine, "poll", in_one_batch)
    one = [(_C.FINISH_NONE, token(65)), (_C.FINISH_LENGTH, token(66))]
    ScriptedEngine.script = {n: list(one) for n in range(1, 6)}
    outputs = scripted.generate([[1]] * 5, FOREVER, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in outputs] == [[65, 66]] * 5


def test_a_pump_that_fails_tells_everybody(scripted: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pump that died of MemoryError once left every caller waiting for ever."""

    def no_room(timeout_ms: int, max_events: int) -> list[tuple[int, int, Any]]:
        raise MemoryError("no room for events")

    # The pump is inside the first poll; the request's one event takes it to the second.
    monkeypatch.setattr(engine_of(scripted), "poll", no_room)
    ScriptedEngine.script = {1: [(_C.FINISH_NONE, token(65))]}
    with pytest.raises(EngineError, match="closed while the request was open|has failed"):
        scripted.generate([[1]], FOREVER, use_tqdm=False)
    with pytest.raises(EngineError, match="has failed: no room for events"):
        scripted.stats()
