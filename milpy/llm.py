"""The offline face: prompts in, finished results out."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Any

from milpy.answer import Answer, Chunk
from milpy.core import Core, Job, Request
from milpy.errors import AnswerError, RequestError
from milpy.interrupt import HeldInterrupt
from milpy.loading import EngineOptions
from milpy.memory import MemoryReport
from milpy.outputs import LoRARequest, RequestOutput
from milpy.prompts import Prompt, PromptType, prompt_list
from milpy.sampling import SamplingParams
from milpy.tokenizer import Tokenizer

if TYPE_CHECKING:
    from milpy.chat_template import Message

WAIT_SECONDS = 0.1  # between looks at Ctrl-C

_log = logging.getLogger("milpy")


class LLM:
    """A model and its adapters, ready to answer batches of prompts.

    model is a folder in Hugging Face's format or the id of a Hub repository (at `revision`).
    adapters maps names to PEFT folders or Hub ids. dtype auto is bfloat16; weights of another dtype
    are converted. tensor_parallel_size splits the model over that many ranks, on the CPU alone.

    device is "cpu"; "cuda", the first GPU; "cuda:1", the second one; or "auto": the first GPU that
    there are kernels for, else the CPU, and the log says why. A GPU that there are kernels for, but
    no cuBLASLt or too little memory, is an error under "auto" as well.

    None lets milpy choose: max_model_len, the most tokens of a prompt and its answer together (the
    model's own, cut to what the KV pages hold); max_num_seqs, requests that run at once (64 on the
    CPU, 256 on a GPU, at most max_num_batched_tokens); max_num_batched_tokens, tokens of one step,
    by which a longer prompt is cut into pieces (512 on the CPU, 8192 on a GPU, at least
    max_num_seqs); page_size, tokens of a KV page (16 on the CPU, 64 on a GPU; or 32, 128, 256);
    kv_cache_bytes, for all pages (on the CPU half of the memory that is free, on a GPU what the
    share below leaves; no more than max_num_seqs full contexts need); n_threads of the CPU, for all
    ranks together (the CPUs that this process may use).

    Of a GPU, and without effect on the CPU: gpu_memory_utilization (None: 0.9) is the share of its
    whole memory that may be in use once this is up, whoever uses it: this LLM, another one, other
    processes. Weights, these adapters, workspace, libraries and CUDA graphs are measured, and KV
    pages take what they leave of the share; kv_cache_bytes overrules it, and adapters that are
    loaded later take of what is then free. enforce_eager runs decode steps without CUDA graphs;
    deterministic keeps batch mates from changing a row's bits, at a price (the CPU always does),
    unless they take a sequence's KV pages: what it has answered is then computed anew, as a prompt
    is. With deterministic at most max_num_batched_tokens - 2 requests run at once, and
    max_num_batched_tokens is 3 at least.

    load_format="dummy" makes random weights by `seed` from config.json alone. tokenizer names
    another folder for tokenizer.json; without one, prompts are token ids. progress shows a bar
    while loading.

    Use it in `with`, or call close(): both give all memory back. Methods may be called from any
    thread; a forked child needs an LLM of its own.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        adapters: Mapping[str, str | Path] | None = None,
        tensor_parallel_size: int = 1,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        kv_cache_bytes: int | None = None,
        page_size: int | None = None,
        gpu_memory_utilization: float | None = None,
        deterministic: bool = False,
        enforce_eager: bool = False,
        n_threads: int | None = None,
        load_format: str = "auto",
        seed: int = 0,
        revision: str | None = None,
        tokenizer: str | Path | None = None,
        progress: bool = True,
    ) -> None:
        options = EngineOptions(
            device=device,
            dtype=dtype,
            adapters=adapters,
            tensor_parallel_size=tensor_parallel_size,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_cache_bytes=kv_cache_bytes,
            page_size=page_size,
            gpu_memory_utilization=gpu_memory_utilization,
            deterministic=deterministic,
            enforce_eager=enforce_eager,
            n_threads=n_threads,
            load_format=load_format,
            seed=seed,
            revision=revision,
            tokenizer=tokenizer,
            progress=progress,
        )
        self._core = Core(model, options)

    # ---- answers ----

    def generate(
        self,
        prompts: PromptType | Sequence[PromptType],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | Sequence[str | None] | None = None,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer all prompts in one batch; results come in the prompts' order.

        A prompt is text, a list of token ids, or a dict of either; integers alone are one prompt.
        sampling_params and adapter are for all prompts, or lists with an entry for each (None: the
        defaults, the base model). A bad prompt, parameter or name is an error before anything runs.
        An answer whose logits are not finite ends with finish_reason "error", is logged, and takes
        no other answer with it.
        """
        reader = self._core.reader
        read = [
            reader.read(prompt, f"prompts[{i}]") for i, prompt in enumerate(prompt_list(prompts))
        ]
        return self._answer(read, sampling_params, adapter, lora_request, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | Sequence[str | None] | None = None,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
        add_generation_prompt: bool = True,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of a list of them, by the model's chat template."""
        read = [
            self._core.reader.read_chat(
                conversation, f"messages[{i}]", add_generation_prompt=add_generation_prompt
            )
            for i, conversation in enumerate(_conversations(messages))
        ]
        return self._answer(read, sampling_params, adapter, lora_request, use_tqdm)

    def stream(
        self,
        prompt: PromptType | Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        adapter: str | None = None,
    ) -> Iterator[RequestOutput]:
        """Answer one prompt or conversation; each item holds all that there is of it so far.

        Text grows by whole characters and is never taken back. Leaving the loop cancels the rest.
        AnswerError where it cannot go on.
        """
        reader = self._core.reader
        if _is_conversation(prompt):
            read = reader.read_chat(prompt, "messages", add_generation_prompt=True)
        else:
            read = reader.read(prompt, "prompt")
        (request,) = self._core.prepare([read], sampling_params, adapter, None)
        return self._stream(request)

    def _answer(
        self,
        prompts: list[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        adapter: str | Sequence[str | None] | None,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        requests = self._core.prepare(prompts, params, adapter, lora_request)
        if not requests:
            return []
        batch = _Batch()
        jobs: list[Job] = []
        with HeldInterrupt() as interrupt:
            try:
                self._core.submit(requests, batch, jobs)
                batch.wait(jobs, interrupt, shown=use_tqdm)
            except BaseException:
                # Whatever it was, nothing is left running, and the next call finds a free engine.
                self._core.cancel(jobs)
                batch.wait(jobs)
                raise
        return [batch.result(job) for job in jobs]

    def _stream(self, request: Request) -> Iterator[RequestOutput]:
        line = _Line()
        jobs: list[Job] = []
        answer = Answer(has_logprobs=request.params.logprobs is not None)
        try:
            with HeldInterrupt():
                self._core.submit([request], line, jobs)
            while answer.finish_reason is None:
                answer.add(line.take())
                raise_error(jobs[0])
                yield make_output(jobs[0], answer)
        finally:
            self._core.cancel(jobs)

    # ---- adapters ----

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters now loaded."""
        return self._core.adapters.names()

    def load_adapter(
        self, name: str, path: str | Path, *, allow_adapter_keys: Collection[str] = ()
    ) -> None:
        """Point `name` at the PEFT adapter in `path`. allow_adapter_keys lets keys of its config
        pass that milpy does not know: they are ignored.

        The same content again is no work. A name in use is re-pointed at once; requests that have
        begun end on the old content. On an error the name is what it was before.
        """
        self._core.check_alive()
        self._core.adapters.load(name, path, allow_adapter_keys=allow_adapter_keys)

    def unload_adapter(self, name: str) -> None:
        """Forget `name`; requests that have begun end on its content."""
        self._core.check_alive()
        self._core.adapters.unload(name)

    def check_adapter(self, name: str) -> None:
        """RequestError, with the names there are, unless `name` is loaded."""
        self._core.adapters.check(name)

    # ---- the rest ----

    def get_tokenizer(self) -> Tokenizer:
        """The folder's tokenizer; RequestError where there is none."""
        tokenizer = self._core.tokenizer
        if tokenizer is None:
            raise RequestError(self._core.reader.missing_tokenizer)
        return tokenizer

    def stats(self) -> dict[str, Any]:
        """The engine's counters and sizes, the model's memory, device and instruction set."""
        return self._core.stats()

    def memory(self) -> MemoryReport:
        """What the device's memory, or this machine's on the CPU, went to; str() is a table."""
        return self._core.memory()

    def close(self) -> None:
        """End open requests and give all memory back. Idempotent."""
        self._core.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        core = getattr(self, "_core", None)
        if core is not None:
            core.abandon()


class _Batch:
    """Collects the answers of one call, and lets its caller wait for them."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._answers: dict[Job, Answer] = {}
        self._closed: set[Job] = set()
        self._n_tokens = 0

    def deliver(self, news: list[tuple[Job, Chunk | None]]) -> None:
        with self._changed:
            for job, chunk in news:
                if chunk is not None:
                    self._answer(job).add(chunk)
                    self._n_tokens += len(chunk.token_ids)
                if job.is_closed:  # may be said with each of its last few chunks
                    self._closed.add(job)
            self._changed.notify()

    def wait(
        self, jobs: Sequence[Job], interrupt: HeldInterrupt | None = None, *, shown: bool = False
    ) -> None:
        """Until the engine holds none of `jobs`; a noted Ctrl-C is raised, and an error of any."""
        from tqdm import tqdm  # noqa: PLC0415 - 30 ms of import

        begin = time.monotonic()
        hidden = None if shown else True  # None: shown on a terminal only
        with closing(tqdm(total=len(jobs), unit="request", disable=hidden)) as bar:
            while True:
                with self._changed:
                    if len(self._closed) < len(jobs):
                        self._changed.wait(WAIT_SECONDS)
                    n_closed, n_tokens = len(self._closed), self._n_tokens
                if interrupt is not None:
                    interrupt.check()
                rate = n_tokens / max(time.monotonic() - begin, 1e-9)
                bar.set_postfix_str(f"{rate:.1f} tok/s", refresh=False)
                bar.update(n_closed - bar.n)
                if n_closed >= len(jobs):
                    return

    def result(self, job: Job) -> RequestOutput:
        """Raises what is wrong with the engine; what is wrong with this answer is in the answer."""
        if not isinstance(job.error, AnswerError):
            raise_error(job)
        output = make_output(job, self._answer(job))
        if job.error is not None:
            _log.error("%s", job.error)
            output.outputs[0].error = str(job.error)
        return output

    def _answer(self, job: Job) -> Answer:
        if job not in self._answers:
            self._answers[job] = Answer(has_logprobs=job.request.params.logprobs is not None)
        return self._answers[job]


class _Line:
    """One request's chunks, in order."""

    def __init__(self) -> None:
        self._chunks: SimpleQueue[Chunk] = SimpleQueue()

    def deliver(self, news: list[tuple[Job, Chunk | None]]) -> None:
        for _, chunk in news:
            if chunk is not None:
                self._chunks.put(chunk)

    def take(self) -> Chunk:
        return self._chunks.get()


def make_output(job: Job, answer: Answer) -> RequestOutput:
    output = job.request.output(str(job.id))
    output.outputs = [answer.output()]
    output.finished = output.outputs[0].finished()
    return output


def raise_error(job: Job) -> None:
    if job.error is not None:
        raise job.error


def _is_conversation(value: object) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) > 0
        and isinstance(value[0], Mapping)
    )


def _conversations(messages: Any) -> list[Sequence[Message]]:
    """Conversations as a list; an empty list is none."""
    if isinstance(messages, Sequence) and not isinstance(messages, str):
        return [messages] if _is_conversation(messages) else list(messages)
    raise RequestError('messages is no list, expected [{"role": ..., "content": ...}, ...]')
