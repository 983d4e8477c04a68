"""What LLM and AsyncEngine share: a model, a C engine, and the two threads that serve it.

One thread lends itself to the C engine's loop and is not seen again until close. The other, the
pump, waits for batches of events, turns tokens into text and hands chunks to whoever asked for
them. So a token costs Python one wake-up per batch, and a caller that is interrupted loses nothing.
"""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import threading
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

from milpy import _C
from milpy.adapter_table import AdapterTable
from milpy.answer import AnswerStream, Chunk, Sample
from milpy.errors import AnswerError, EngineError, MilpyError, RequestError
from milpy.interrupt import HeldInterrupt
from milpy.loading import EngineOptions, load
from milpy.memory import MemoryReport
from milpy.outputs import LoRARequest, RequestOutput
from milpy.prompts import Prompt, PromptReader
from milpy.sampling import SamplingParams
from milpy.scalars import show_argument

MAX_EVENTS = 1024

_log = logging.getLogger("milpy")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Request:
    """A request whose every part has been checked."""

    prompt: Prompt
    params: SamplingParams
    adapter: str | None
    lora_request: LoRARequest | None

    def output(self, request_id: str) -> RequestOutput:
        """Its result, with no answer in it yet."""
        return RequestOutput(
            request_id=request_id,
            prompt=self.prompt.text,
            prompt_token_ids=self.prompt.token_ids.tolist(),
            outputs=[],
            finished=False,
            adapter=self.adapter,
            lora_request=self.lora_request,
        )


class Sink(Protocol):
    def deliver(self, news: list[tuple[Job, Chunk | None]]) -> None:
        """Take what is new. Called by the pump; must neither wait nor raise."""


class Job:
    """A submitted request. The pump writes it; others read."""

    __slots__ = ("error", "id", "is_closed", "request", "sink", "stream")

    def __init__(self, id: int, request: Request, stream: AnswerStream, sink: Sink) -> None:
        self.id = id
        self.request = request
        self.stream = stream
        self.sink = sink
        self.error: MilpyError | None = None  # AnswerError: of this answer alone
        self.is_closed = False  # the engine holds nothing of it any more


class Core:
    """A running model. Close it, or its memory stays until the process ends."""

    def __init__(self, model: str | Path, options: EngineOptions) -> None:
        # Bad ones are told before weights are read; MILPY_CHECK the core reads itself.
        poison = _C.read_switch("MILPY_POISON", False)
        _C.read_switch("MILPY_CHECK", False)
        loaded = load(model, options)
        self.folder = loaded.folder
        self.config = loaded.config
        self.tokenizer = loaded.tokenizer
        self.eos_token_ids = loaded.eos_token_ids
        self._model = loaded.model
        self._pid = os.getpid()
        self._lock = threading.Lock()  # over _jobs and every short call into the engine
        self._jobs: dict[int, Job] = {}
        self._engine: _C.Engine | None = None
        self.adapters = AdapterTable(self._model, self.config)
        self._failure: Exception | None = None
        self._is_closed = False
        self._is_abandoned = False
        try:
            # First: KV pages take what is left.
            for name, path in (options.adapters or {}).items():
                self.adapters.load(name, path)
            self._engine = _C.Engine(
                self._model,
                max_model_len=options.max_model_len or 0,
                max_num_seqs=options.max_num_seqs or 0,
                max_num_batched_tokens=options.max_num_batched_tokens or 0,
                page_size=options.page_size or 0,
                kv_cache_bytes=options.kv_cache_bytes or 0,
                gpu_memory_utilization=options.gpu_memory_utilization or 0.0,
                deterministic=options.deterministic,
                enforce_eager=options.enforce_eager,
                poison=poison,
            )
            stats = self._engine.stats()
            _log.info("%s: %s", self.folder, MemoryReport(**self._engine.memory()).line())
        except BaseException:
            self._give_back()
            raise
        # A length that was asked for is held or refused; the model's own may have been cut.
        context = stats["max_model_len"]
        if context < self.config.context_length(options.max_model_len):
            _log.warning(
                "%s: the context is %d tokens, cut from the model's %d to what %d bytes of KV "
                "pages hold",
                self.folder,
                context,
                self.config.context_length(),
                stats["kv_bytes"],
            )
        self.reader = PromptReader(
            self.tokenizer, loaded.missing_tokenizer, self.config.vocab_size, context
        )
        # Daemons: whoever forgets close() must not keep the interpreter from ending.
        self._runner = threading.Thread(target=self._run, name="milpy-engine", daemon=True)
        self._pump = threading.Thread(target=self._pump_events, name="milpy-pump", daemon=True)
        self._runner.start()
        self._pump.start()
        _live.add(self)

    # ---- requests ----

    def prepare(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        adapter: str | Sequence[str | None] | None,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None,
    ) -> list[Request]:
        """Check everything about these requests; adapters given by path are loaded last of all."""
        self.check_alive()
        n = len(prompts)
        each_params = _spread("sampling_params", params, SamplingParams, n)
        names = _spread("adapter", adapter, str, n)
        loras = _spread("lora_request", lora_request, LoRARequest, n)
        if adapter is not None and lora_request is not None:
            raise RequestError("adapter and lora_request are both given, expected at most one")
        requests: list[Request] = []
        for i, prompt in enumerate(prompts):
            lora = loras[i]
            name = names[i] if lora is None else lora.name
            request = Request(prompt, each_params[i] or SamplingParams(), name, lora)
            self._check_request(request, f"prompts[{i}]")
            requests.append(request)
        for lora in dict.fromkeys(lora for lora in loras if lora is not None and lora.path):
            self.adapters.load_once(lora.name, lora.path)
        return requests

    def submit(self, requests: Iterable[Request], sink: Sink, jobs: list[Job]) -> None:
        """Submit in order; each job is in `jobs` before the next request is looked at."""
        requests = list(requests)
        with self.adapters.held(request.adapter for request in requests) as contents:
            for request in requests:
                self._submit(request, contents[request.adapter], sink, jobs)

    def cancel(self, jobs: Iterable[Job]) -> None:
        """End jobs soon. One that has ended is no error."""
        with self._lock:
            for job in jobs:
                if not job.is_closed and self._engine is not None:
                    self._engine.cancel(job.id)

    def stats(self) -> dict[str, Any]:
        """The engine's counters and the model's report."""
        self.check_alive()
        with self._lock:
            if self._engine is None:
                raise EngineError("the engine is closed")
            return {**self._engine.stats(), **self._model.report()}

    def memory(self) -> MemoryReport:
        """What the memory where the model lies went to."""
        self.check_alive()
        with self._lock:
            if self._engine is None:
                raise EngineError("the engine is closed")
            return MemoryReport(**self._engine.memory())

    # ---- life ----

    def close(self) -> None:
        """End open requests, give all memory back. Idempotent."""
        if self._pid != os.getpid():
            return  # the threads and locks are the parent's
        _live.discard(self)
        with self._lock:
            self._is_closed = True
            if self._engine is not None:
                self._engine.stop()
        with HeldInterrupt():  # a second close would find it closed and give nothing back
            self._runner.join()
            self._pump.join()
            self._give_back()

    def abandon(self) -> None:
        """As close, from a finalizer: waits for nothing; the pump gives the memory back."""
        if self._pid != os.getpid() or self._is_closed:
            return
        # No lock is taken: a finalizer may run in the middle of anything, the pump included.
        self._is_abandoned = self._is_closed = True
        engine = self._engine
        if engine is not None:
            engine.stop()

    def _give_back(self) -> None:
        self.adapters.close()
        with self._lock:
            engine, self._engine = self._engine, None
            if engine is not None:
                engine.free()
            self._model.close()

    def check_alive(self) -> None:
        if self._pid != os.getpid():
            raise EngineError(
                f"this process is {os.getpid()}, forked from {self._pid} that has the engine: it "
                "does not survive a fork, expected a new LLM in the child"
            )
        if self._failure is not None:
            raise EngineError(f"the engine has failed: {self._failure}") from self._failure
        if self._is_closed:
            raise EngineError("the engine is closed")

    def _check_request(self, request: Request, where: str) -> None:
        params, n_prompt = request.params, len(request.prompt.token_ids)
        for token in params.stop_token_ids:
            self.reader.check_token(token, f"{where}: stop_token_ids")
        if params.stop and self.tokenizer is None:
            raise RequestError(
                f"{where}: stop is {show_argument(params.stop[0])}, expected none: "
                f"{self.reader.missing_tokenizer}"
            )
        limit = self.reader.max_model_len
        if params.max_tokens is not None and n_prompt + params.max_tokens > limit:
            raise RequestError(
                f"{where} has {n_prompt} tokens and max_tokens is {params.max_tokens}, expected at "
                f"most {limit - n_prompt}: the context holds {limit}"
            )
        comes_by_path = request.lora_request is not None and request.lora_request.path
        if request.adapter is not None and not comes_by_path:
            self.adapters.check(request.adapter)

    def _submit(self, request: Request, adapter: int, sink: Sink, jobs: list[Job]) -> None:
        params = request.params
        eos = () if params.ignore_eos else self.eos_token_ids
        stops = tuple(dict.fromkeys(eos + params.stop_token_ids))
        stream = AnswerStream(params, self.eos_token_ids, self.tokenizer)
        with self._lock:
            if self._engine is None or self._is_closed:
                raise EngineError("the engine is closed")
            # Under the lock, so that the pump finds the job before its first event.
            id = self._engine.submit(
                request.prompt.token_ids,
                max_tokens=params.max_tokens or 0,
                stop_tokens=stops,
                adapter=adapter,
                temperature=params.temperature,
                top_k=min(params.top_k, self.config.vocab_size),  # more than all is all
                top_p=params.top_p,
                n_logprobs=-1 if params.logprobs is None else params.logprobs,
                seed=secrets.randbits(64) if params.seed is None else params.seed,
            )
            job = self._jobs[id] = Job(id, request, stream, sink)
            jobs.append(job)

    # ---- threads ----

    def _run(self) -> None:
        engine = self._engine
        assert engine is not None
        try:
            engine.run()
        except Exception as problem:  # a device fault or a bug: told to every open request
            self._failure = problem

    def _pump_events(self) -> None:
        engine = self._engine
        assert engine is not None
        while True:
            try:
                events = engine.poll(-1, MAX_EVENTS)
            except EngineError:
                break  # the loop has ended and no events are left
            except MemoryError as problem:
                self._fail(problem)
                break
            try:
                self._dispatch(events)
            except Exception as problem:  # a pump that dies leaves every caller waiting for ever
                self._fail(problem)
                break
        self._runner.join()
        self._close_orphans()
        if self._is_abandoned:
            self._give_back()

    def _fail(self, problem: Exception) -> None:
        self._failure = problem
        engine = self._engine
        if engine is not None:
            engine.stop()

    def _dispatch(self, events: Sequence[tuple[int, int, Sample | None]]) -> None:
        """Hand a batch of events to their sinks, one call per sink."""
        with self._lock:
            jobs = [self._jobs.get(event[0]) for event in events]
        news: dict[int, list[tuple[Job, Chunk | None]]] = {}
        enough: list[Job] = []
        for job, (_, finish, sample) in zip(jobs, events, strict=True):
            if job is None:
                continue
            chunk = None if job.stream.is_finished else self._push(job, sample, finish)
            if finish != _C.FINISH_NONE:
                job.is_closed = True
            elif job.stream.is_finished and chunk is not None:
                enough.append(job)
            if chunk is not None or job.is_closed:
                news.setdefault(id(job.sink), []).append((job, chunk))
        self.cancel(enough)
        for batch in news.values():
            batch[0][0].sink.deliver(batch)
        # Last: whoever is still there when something above fails is told by _close_orphans.
        with self._lock:
            for number, finish, _ in events:
                if finish != _C.FINISH_NONE:
                    self._jobs.pop(number, None)

    def _push(self, job: Job, sample: Sample | None, finish: int) -> Chunk:
        if finish == _C.FINISH_ERROR:
            self._runner.join()  # it has raised, or is about to
            job.error = EngineError(f"the engine has failed: {self._failure}")
        elif finish == _C.FINISH_NUMERICS:
            voice = show_argument(job.request.adapter) if job.request.adapter else "the base model"
            job.error = AnswerError(
                f"request {job.id}: the logits of {voice} are not finite, expected finite ones"
            )
        try:
            return job.stream.push(sample, finish)
        except Exception as problem:  # one answer's text must not end everybody's
            job.error = AnswerError(f"request {job.id}: {problem}")
            job.error.__cause__ = problem
            job.stream.is_finished = True
            return Chunk(finish_reason="error")

    def _close_orphans(self) -> None:
        """Nobody may wait for an event that cannot come."""
        with self._lock:
            jobs, self._jobs = list(self._jobs.values()), {}
        for job in jobs:
            job.is_closed = True
            if not job.stream.is_finished:
                job.error = EngineError("the engine was closed while the request was open")
                job.stream.is_finished = True
                job.sink.deliver([(job, Chunk(finish_reason="abort"))])
            else:
                job.sink.deliver([(job, None)])


def _spread(name: str, value: object, kind: type[T], n: int) -> list[T | None]:
    """One value for all prompts, or a list with one for each; each None or a `kind`."""
    if value is None or isinstance(value, kind):
        return [value] * n
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise RequestError(
            f"{name} is {show_argument(value)}, expected {kind.__name__}, None or a list"
        )
    if len(value) != n:
        raise RequestError(f"{name} has {len(value)} entries, expected {n}: one for each prompt")
    for i, entry in enumerate(value):
        if entry is not None and not isinstance(entry, kind):
            raise RequestError(
                f"{name}[{i}] is {show_argument(entry)}, expected {kind.__name__} or None"
            )
    return cast("list[T | None]", list(value))


_live: weakref.WeakSet[Core] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Stop the C loops before the interpreter goes away under them."""
    for core in list(_live):
        core.close()
