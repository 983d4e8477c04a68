"""Traffic that leaves a step no slack, for tests/helpers/order.py, in a process of its own.

    python order_workload.py DEVICE PAGE_SIZE [--extension FILE] [--cancels]

Prints one JSON object. `settled`: every request is there before the loop starts, so that which
step does what follows from the requests alone, whatever is slow; few pages, so that requests are
preempted and pages change hands. `live`: requests, cancels and adapters come and go while steps
are in flight; each answer must be its own whatever shares its steps (`deterministic`).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import threading
from typing import TYPE_CHECKING, Any

import milpy
from milpy import demo

if TYPE_CHECKING:
    from milpy import _C
    from milpy.adapter_table import AdapterTable
    from milpy.loading import LoadedModel

N_REQUESTS = 64
# Page size -> pages of the longest sequence, and all that six of them get in `settled`.
PAGES = {16: (8, 15), 64: (4, 9)}
AT_ONCE = 16  # requests that are open at once while others come and go

Answer = dict[str, Any]  # finish, and samples: token, bits of its logprob, rank, best tokens


def use_extension(file: str) -> None:
    """Take the C core from `file`, not from the package's folder."""
    spec = importlib.util.spec_from_file_location("milpy._C", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["milpy._C"] = module
    spec.loader.exec_module(module)
    milpy._C = module  # type: ignore[attr-defined]


class Traffic:
    """An engine on a loaded model, and what its requests have been answered so far."""

    def __init__(
        self, loaded: LoadedModel, table: AdapterTable, page: int, n_pages: int, **options: Any
    ):
        from milpy import _C  # noqa: PLC0415 - after use_extension

        self.loaded = loaded
        self.table = table
        self.prompts = demo.requests()
        self.max_length = page * PAGES[page][0]
        self.answers: dict[int, Answer] = {}  # by engine id, in order
        self.n_open = 0
        self.engine: _C.Engine = _C.Engine(
            loaded.model,
            max_model_len=self.max_length,
            page_size=page,
            kv_cache_bytes=(1 + n_pages) * page * loaded.config.kv_bytes_per_token(),
            poison=_C.read_switch("MILPY_POISON", False),
            **options,
        )
        self.loop = threading.Thread(target=self.engine.run)

    def submit(self, i: int) -> int:
        """Request `i`: each voice in turn, greedy and drawn, some past the end of their answer."""
        assert self.loaded.tokenizer is not None
        text = self.prompts[i % len(self.prompts)]["text"]
        tokens = self.loaded.tokenizer.encode(demo.format_request(text))
        voice = None if i % 4 == 0 else demo.VOICES[i % 4]
        with self.table.held([voice]) as contents:
            id = self.engine.submit(
                tokens,
                max_tokens=1 + 29 * i % (self.max_length - len(tokens)),
                stop_tokens=() if i % 3 > 0 else self.loaded.eos_token_ids,
                adapter=contents[voice],
                temperature=0.0 if i % 2 == 0 else 0.9,
                top_k=0 if i % 4 < 2 else 40,
                top_p=1.0 if i % 4 < 2 else 0.95,
                n_logprobs=2,
                seed=i,
            )
        self.answers[id] = {"finish": 0, "samples": []}
        self.n_open += 1
        return id

    def receive(self) -> list[int]:
        """Wait for news; the ids of requests that were given a token."""
        events = self.engine.poll(-1, 256)
        for id, finish, sample in events:
            if sample is not None:
                token, logprob, rank, top = sample
                bits = [[other, value.hex()] for other, value in top]
                self.answers[id]["samples"].append([token, logprob.hex(), rank, bits])
            self.answers[id]["finish"] = finish
            self.n_open -= finish != 0
        return [id for id, _, sample in events if sample is not None]

    def end(self) -> list[Answer]:
        while self.n_open > 0:
            self.receive()
        self.engine.stop()
        self.loop.join()
        return list(self.answers.values())


def settled(loaded: LoadedModel, table: AdapterTable, page: int) -> Answer:
    """Too few pages for the sequences, and prompts cut to fit 40 tokens a step."""
    traffic = Traffic(
        loaded, table, page, PAGES[page][1], max_num_seqs=6, max_num_batched_tokens=40
    )
    for i in range(N_REQUESTS):
        traffic.submit(i)
    traffic.loop.start()
    answers = traffic.end()
    stats = traffic.engine.stats()
    traffic.engine.free()
    return {"answers": answers, "stats": stats}


def live(loaded: LoadedModel, table: AdapterTable, page: int, *, cancels: bool) -> Answer:
    """Pages for all that eight sequences may have: nothing but requests and cancels says who runs,
    and no prompt is cut or computed twice."""
    traffic = Traffic(
        loaded,
        table,
        page,
        8 * PAGES[page][0],
        max_num_seqs=8,
        max_num_batched_tokens=2048,
        deterministic=True,
    )
    traffic.loop.start()
    doomed: dict[int, int] = {}  # id -> tokens that it may still give
    for i in range(N_REQUESTS):
        if i % 8 == 4:  # new content for a name whose old content is in use
            name = demo.VOICES[1 + i // 8 % len(demo.ADAPTERS)]
            table.unload(name)
            table.load(name, demo.ADAPTERS[name])
        id = traffic.submit(i)
        if cancels and i % 3 == 1:
            doomed[id] = 1 + i % 7
        while traffic.n_open >= AT_ONCE:
            for given in traffic.receive():
                doomed[given] = doomed.get(given, sys.maxsize) - 1
                if doomed[given] == 0:
                    traffic.engine.cancel(given)
    answers = traffic.end()
    traffic.engine.free()
    return {"answers": answers}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("device")
    parser.add_argument("page_size", type=int, choices=PAGES)
    parser.add_argument("--extension")
    parser.add_argument("--cancels", action="store_true")
    options = parser.parse_args()
    if options.extension:
        use_extension(options.extension)
    from milpy.adapter_table import AdapterTable  # noqa: PLC0415 - they import the extension
    from milpy.errors import EngineError  # noqa: PLC0415
    from milpy.loading import EngineOptions, load  # noqa: PLC0415

    loaded = load(demo.BASE, EngineOptions(device=options.device, progress=False))
    table = AdapterTable(loaded.model, loaded.config)
    for name, folder in demo.ADAPTERS.items():
        table.load(name, folder)
    try:
        found: dict[str, Any] = {
            "settled": settled(loaded, table, options.page_size),
            "live": live(loaded, table, options.page_size, cancels=options.cancels),
        }
    except EngineError as problem:  # a step failed: a result like another, for a broken build
        found = {"error": str(problem)}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
