"""The asyncio face: requests come one by one, and answers are read as they grow."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from milpy.answer import Answer, Chunk
from milpy.core import Core, Job, Request
from milpy.errors import RequestError
from milpy.llm import make_output, raise_error
from milpy.loading import EngineOptions
from milpy.memory import MemoryReport
from milpy.outputs import LoRARequest, RequestOutput
from milpy.prompts import PromptType, is_one_prompt
from milpy.sampling import SamplingParams


class AsyncEngine:
    """As LLM, for asyncio. Takes LLM's options.

    Reading files, tokenizing and closing run on worker threads, never on the event loop.
    """

    def __init__(self, model: str | Path, **options: Any) -> None:
        self._core = Core(model, EngineOptions(**options))
        self._jobs: dict[str, Job] = {}

    async def generate(
        self,
        prompt: PromptType,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        adapter: str | None = None,
        lora_request: LoRARequest | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Each item holds all that there is of the answer so far; the last one is `finished`.

        Leaving the loop, or cancelling its task, cancels the request.
        """
        if not is_one_prompt(prompt):
            raise RequestError("prompt is no single prompt, expected text, token ids or a dict")
        request = await asyncio.to_thread(
            self._prepare, prompt, sampling_params, adapter, lora_request
        )
        line = _AsyncLine(asyncio.get_running_loop())
        answer = Answer(has_logprobs=request.params.logprobs is not None)
        jobs: list[Job] = []
        name = request_id
        try:
            if request_id is not None and request_id in self._jobs:
                raise RequestError(f"request_id {request_id!r} is open, expected a new one")
            self._core.submit([request], line, jobs)
            name = str(jobs[0].id) if request_id is None else request_id
            self._jobs[name] = jobs[0]
            while answer.finish_reason is None:
                for chunk in await line.take():
                    answer.add(chunk)
                raise_error(jobs[0])
                output = make_output(jobs[0], answer)
                output.request_id = name
                yield output
        finally:
            if jobs and name is not None:
                self._jobs.pop(name, None)
            if answer.finish_reason is None:
                self._core.cancel(jobs)

    async def abort(self, request_id: str) -> None:
        """End a request; its answer finishes with "abort". An unknown id is no error."""
        job = self._jobs.get(request_id)
        if job is not None:
            self._core.cancel([job])

    async def load_adapter(
        self, name: str, path: str | Path, *, allow_adapter_keys: Collection[str] = ()
    ) -> None:
        """As LLM.load_adapter."""
        self._core.check_alive()
        await asyncio.to_thread(
            self._core.adapters.load, name, path, allow_adapter_keys=allow_adapter_keys
        )

    async def unload_adapter(self, name: str) -> None:
        """As LLM.unload_adapter."""
        self._core.check_alive()
        self._core.adapters.unload(name)

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters now loaded."""
        return self._core.adapters.names()

    def stats(self) -> Mapping[str, Any]:
        """As LLM.stats."""
        return self._core.stats()

    def memory(self) -> MemoryReport:
        """As LLM.memory."""
        return self._core.memory()

    async def close(self) -> None:
        """End open requests and give all memory back. Idempotent."""
        await asyncio.to_thread(self._core.close)

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    def __del__(self) -> None:
        core = getattr(self, "_core", None)
        if core is not None:
            core.abandon()

    def _prepare(
        self,
        prompt: PromptType,
        params: SamplingParams | None,
        adapter: str | None,
        lora_request: LoRARequest | None,
    ) -> Request:
        read = self._core.reader.read(prompt, "prompt")
        (request,) = self._core.prepare([read], params, adapter, lora_request)
        return request


class _AsyncLine:
    """One request's chunks, carried from the pump's thread to an event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._chunks: list[Chunk] = []
        self._has_some = asyncio.Event()

    def deliver(self, news: list[tuple[Job, Chunk | None]]) -> None:
        chunks = [chunk for _, chunk in news if chunk is not None]
        if chunks:
            # A loop that has ended takes nothing, and nobody waits there any more.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._put, chunks)

    def _put(self, chunks: list[Chunk]) -> None:
        self._chunks += chunks
        self._has_some.set()

    async def take(self) -> list[Chunk]:
        """All that has come since, at least one."""
        await self._has_some.wait()
        self._has_some.clear()
        chunks, self._chunks = self._chunks, []
        return chunks
