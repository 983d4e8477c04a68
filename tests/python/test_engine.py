"""The asyncio face: the same answers as LLM's, read as they grow."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from milpy import _C, LLM, AsyncEngine, RequestOutput, SamplingParams
from milpy.errors import EngineError, RequestError

GREEDY = SamplingParams(temperature=0, max_tokens=12, logprobs=2, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0, ignore_eos=True)

Scene = Callable[[AsyncEngine], Awaitable[None]]


def play(folders: Path, scene: Scene) -> None:
    async def main() -> None:
        adapters = {"a": folders / "a", "b": folders / "b"}
        engine = AsyncEngine(folders / "model", adapters=adapters, n_threads=1, progress=False)
        async with engine:
            await scene(engine)

    before = _C.memory_held()
    asyncio.run(main())
    # Less where another LLM's loop has only now let go of the request that it answered.
    assert _C.memory_held() <= before


async def last_of(engine: AsyncEngine, prompt: list[int], adapter: str | None) -> RequestOutput:
    return [output async for output in engine.generate(prompt, GREEDY, adapter=adapter)][-1]


async def wait_until_idle(engine: AsyncEngine) -> None:
    while engine.stats()["n_running"] or engine.stats()["n_waiting"]:
        await asyncio.sleep(0)
    assert engine.stats()["n_free_pages"] == engine.stats()["n_pages"]


def test_streams_at_once_give_what_the_llm_gives(folders: Path, llm: LLM) -> None:
    prompts = [[1, 2, 3], [5], [9] * 20, [7, 8]]
    adapters = [None, "a", "b", "a"]
    expected = llm.generate(prompts, GREEDY, adapter=adapters, use_tqdm=False)

    async def scene(engine: AsyncEngine) -> None:
        pairs = zip(prompts, adapters, strict=True)
        found = await asyncio.gather(*[last_of(engine, *pair) for pair in pairs])
        assert [o.outputs for o in found] == [o.outputs for o in expected]
        assert all(output.finished for output in found)

    play(folders, scene)


def test_items_grow_and_only_the_last_is_finished(folders: Path) -> None:
    async def scene(engine: AsyncEngine) -> None:
        ids: list[int] = []
        flags = []
        async for output in engine.generate("hello", GREEDY, "mine"):
            assert output.request_id == "mine"
            assert output.outputs[0].token_ids[: len(ids)] == ids
            ids = output.outputs[0].token_ids
            flags.append(output.finished)
        assert len(ids) == 12 and flags == [False] * (len(flags) - 1) + [True]

    play(folders, scene)


def test_leaving_and_cancelling_end_the_request(folders: Path) -> None:
    async def scene(engine: AsyncEngine) -> None:
        stream = engine.generate([1, 2, 3], ENDLESS)
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]
        await wait_until_idle(engine)

        async def endless() -> None:
            async for _ in engine.generate([1, 2, 3], ENDLESS):
                started.set()

        started = asyncio.Event()
        task = asyncio.create_task(endless())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await wait_until_idle(engine)

    play(folders, scene)


def test_an_aborted_request_finishes_as_abort(folders: Path) -> None:
    async def scene(engine: AsyncEngine) -> None:
        await engine.abort("nobody")
        reasons = []
        async for output in engine.generate([1, 2, 3], ENDLESS, "mine"):
            reasons.append(output.outputs[0].finish_reason)
            await engine.abort("mine")
        assert reasons[-1] == "abort"
        await wait_until_idle(engine)

    play(folders, scene)


def test_bad_requests_touch_no_other(folders: Path, llm: LLM) -> None:
    (expected,) = llm.generate([[1, 2, 3]], GREEDY, adapter="a", use_tqdm=False)

    async def refused(engine: AsyncEngine, prompt: object, match: str, **options: object) -> None:
        with pytest.raises(RequestError, match=match):
            async for _ in engine.generate(prompt, **options):  # type: ignore[arg-type]
                pass

    async def scene(engine: AsyncEngine) -> None:
        good = asyncio.create_task(last_of(engine, [1, 2, 3], "a"))
        await refused(engine, [], "no single prompt")
        await refused(engine, [[1, 2]], "no single prompt")
        await refused(engine, [1, 9999], "token 1 is 9999")
        await refused(engine, [1], 'adapter is "zz", expected one of "a", "b"', adapter="zz")
        assert (await good).outputs == expected.outputs

    play(folders, scene)


def test_an_open_request_id_is_not_taken_twice(folders: Path) -> None:
    async def scene(engine: AsyncEngine) -> None:
        stream = engine.generate([1], ENDLESS, "mine")
        await anext(stream)
        with pytest.raises(RequestError, match="'mine' is open"):
            await anext(engine.generate([2], ENDLESS, "mine"))
        # The refused one must not have closed the first.
        await engine.abort("mine")
        reasons = [output.outputs[0].finish_reason async for output in stream]
        assert reasons[-1] == "abort"

    play(folders, scene)


def test_adapters_come_and_go(folders: Path, llm: LLM) -> None:
    (expected,) = llm.generate([[1, 2]], GREEDY, adapter="b", use_tqdm=False)

    async def scene(engine: AsyncEngine) -> None:
        await engine.load_adapter("c", folders / "b")
        assert engine.adapters == ["a", "b", "c"]
        assert (await last_of(engine, [1, 2], "c")).outputs == expected.outputs
        await engine.unload_adapter("c")
        with pytest.raises(RequestError, match='adapter is "c"'):
            await last_of(engine, [1, 2], "c")

    play(folders, scene)


def test_closing_ends_open_streams(folders: Path) -> None:
    async def main() -> None:
        engine = AsyncEngine(folders / "model", n_threads=1, progress=False)
        stream = engine.generate([1], ENDLESS)
        await anext(stream)
        await engine.close()
        reasons = []
        try:
            async for output in stream:
                reasons.append(output.outputs[0].finish_reason)
        except EngineError:
            reasons.append("abort")
        assert reasons[-1] == "abort"
        with pytest.raises(EngineError, match="closed"):
            await anext(engine.generate([1], ENDLESS))

    asyncio.run(main())
