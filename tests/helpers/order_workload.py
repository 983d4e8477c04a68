"""Traffic that leaves a step no slack, for tests/helpers/order.py, in a process of its own.

    python order_workload.py DEVICE PAGE_SIZE WIDE [--extension FILE] [--cancels]

Prints one JSON object: for each scene, which is a model and its requests, two kinds of traffic.
`settled`: every request is there before the loop starts, so that which step does what follows from
the requests alone, whatever is slow; few pages, so that requests are preempted and pages change
hands. `live`: requests, cancels and adapters come and go while steps are in flight; each answer
must be its own whatever shares its steps (`deterministic`).

Scenes: `demo`, with short texts, and `wide`, whose folder order.py writes, with texts so long and
on a GPU a model so wide that kernels leave each other partial results in the workspace.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import milpy
from milpy import demo

if TYPE_CHECKING:
    from milpy import _C
    from milpy.adapter_table import AdapterTable
    from milpy.loading import LoadedModel

AT_ONCE = 16  # requests that are open at once while others come and go
N_DEMO, N_WIDE = 64, 32  # requests
# Tokens of the wide scene's prompts: cut as they decode, soon to be cut (from 512 keys on), short.
WIDE_PROMPTS = ((600, 1500), (440, 512), (1, 100))
WIDE_ANSWER = 200  # tokens, at most: over page borders, so that pages run out

Answer = dict[str, Any]  # finish, prompt's length, samples: token, bits of its logprob, rank, best


def use_extension(file: str) -> None:
    """Take the C core from `file`, not from the package's folder."""
    spec = importlib.util.spec_from_file_location("milpy._C", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["milpy._C"] = module
    spec.loader.exec_module(module)
    milpy._C = module  # type: ignore[attr-defined]


# ---- scenes ----


@dataclass(frozen=True)
class Scene:
    """A model, and what is asked of it."""

    loaded: LoadedModel
    table: AdapterTable
    adapters: dict[str, Path]
    prompts: Sequence[Sequence[int]]
    most_new: int
    stop_tokens: Sequence[int]
    page: int
    n_pages_longest: int  # of the longest sequence
    n_pages_settled: int  # all that six of them get
    n_batched_settled: int  # tokens of a step: prompts are cut to fit
    n_batched_live: int

    @property
    def longest(self) -> int:
        """Tokens of a sequence."""
        return self.page * self.n_pages_longest


def open_model(
    device: str, base: Path, adapters: dict[str, Path]
) -> tuple[LoadedModel, AdapterTable]:
    from milpy.adapter_table import AdapterTable  # noqa: PLC0415 - they import the extension
    from milpy.loading import EngineOptions, load  # noqa: PLC0415

    loaded = load(base, EngineOptions(device=device, progress=False))
    table = AdapterTable(loaded.model, loaded.config)
    for name, folder in adapters.items():
        table.load(name, folder)
    return loaded, table


def open_demo(device: str, page: int) -> Scene:
    loaded, table = open_model(device, demo.BASE, demo.ADAPTERS)
    assert loaded.tokenizer is not None
    texts = [request["text"] for request in demo.requests()[:N_DEMO]]
    longest, settled = {16: (8, 15), 64: (4, 9)}[page]
    return Scene(
        loaded,
        table,
        demo.ADAPTERS,
        prompts=[loaded.tokenizer.encode(demo.format_request(text)) for text in texts],
        most_new=sys.maxsize,
        stop_tokens=loaded.eos_token_ids,
        page=page,
        n_pages_longest=longest,
        n_pages_settled=settled,
        n_batched_settled=40,
        n_batched_live=2048,  # no prompt is cut
    )


def open_wide(device: str, page: int, folder: Path) -> Scene:
    adapters = {path.name: path for path in sorted(folder.glob("adapters/*"))}
    loaded, table = open_model(device, folder / "base", adapters)
    rng = np.random.default_rng(1)
    vocab = loaded.config.vocab_size
    ranges = rng.choice(WIDE_PROMPTS, N_WIDE)
    return Scene(
        loaded,
        table,
        adapters,
        prompts=[rng.integers(0, vocab, rng.integers(*ends)).tolist() for ends in ranges],
        most_new=WIDE_ANSWER,
        stop_tokens=range(0, vocab, 64),
        page=page,
        n_pages_longest=-(-(max(map(max, WIDE_PROMPTS)) + WIDE_ANSWER) // page),
        n_pages_settled=2560 // page,
        n_batched_settled=192,
        n_batched_live=160,  # up to 192 rows our own products are cut along K
    )


# ---- traffic ----


class Traffic:
    """An engine on a scene's model, and what its requests have been answered so far."""

    def __init__(self, scene: Scene, n_pages: int, **options: Any):
        from milpy import _C  # noqa: PLC0415 - after use_extension

        self.scene = scene
        self.answers: dict[int, Answer] = {}  # by engine id, in order
        self.n_open = 0
        token_bytes = scene.loaded.config.kv_bytes_per_token()
        self.engine: _C.Engine = _C.Engine(
            scene.loaded.model,
            max_model_len=scene.longest,
            page_size=scene.page,
            kv_cache_bytes=(1 + n_pages) * scene.page * token_bytes,
            poison=_C.read_switch("MILPY_POISON", False),
            **options,
        )
        self.loop = threading.Thread(target=self.engine.run)

    def submit(self, i: int) -> int:
        """Request `i`: each voice in turn, greedy and drawn, some past the end of their answer."""
        scene = self.scene
        tokens = scene.prompts[i]
        voices = (None, *scene.adapters)
        voice = voices[i % len(voices)]
        with scene.table.held([voice]) as contents:
            id = self.engine.submit(
                tokens,
                max_tokens=1 + 29 * i % min(scene.most_new, scene.longest - len(tokens)),
                stop_tokens=() if i % 3 > 0 else scene.stop_tokens,
                adapter=contents[voice],
                temperature=0.0 if i % 2 == 0 else 0.9,
                top_k=0 if i % 4 < 2 else 40,
                top_p=1.0 if i % 4 < 2 else 0.95,
                n_logprobs=2,
                seed=i,
            )
        self.answers[id] = {"finish": 0, "n_prompt": len(tokens), "samples": []}
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

    def end(self) -> Answer:
        """All answers, and what the engine counted."""
        while self.n_open > 0:
            self.receive()
        self.engine.stop()
        self.loop.join()
        stats = self.engine.stats()
        self.engine.free()
        return {"answers": list(self.answers.values()), "stats": stats}


def settled(scene: Scene) -> Answer:
    """Too few pages for the sequences, and prompts cut to fit a step."""
    traffic = Traffic(
        scene,
        scene.n_pages_settled,
        max_num_seqs=6,
        max_num_batched_tokens=scene.n_batched_settled,
    )
    for i in range(len(scene.prompts)):
        traffic.submit(i)
    traffic.loop.start()
    return traffic.end()


def live(scene: Scene, *, cancels: bool) -> Answer:
    """Pages for all that eight sequences may have: nothing but requests and cancels says who runs,
    and no prompt is computed twice."""
    traffic = Traffic(
        scene,
        8 * scene.n_pages_longest,
        max_num_seqs=8,
        max_num_batched_tokens=scene.n_batched_live,
        deterministic=True,
    )
    traffic.loop.start()
    names = list(scene.adapters)
    doomed: dict[int, int] = {}  # id -> tokens that it may still give
    for i in range(len(scene.prompts)):
        if i % 8 == 4:  # new content for a name whose old content is in use
            name = names[i // 8 % len(names)]
            scene.table.unload(name)
            scene.table.load(name, scene.adapters[name])
        id = traffic.submit(i)
        if cancels and i % 3 == 1:
            doomed[id] = 1 + i % 7
        while traffic.n_open >= AT_ONCE:
            for given in traffic.receive():
                doomed[given] = doomed.get(given, sys.maxsize) - 1
                if doomed[given] == 0:
                    traffic.engine.cancel(given)
    return traffic.end()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("device")
    parser.add_argument("page_size", type=int, choices=(16, 64))
    parser.add_argument("wide", type=Path)
    parser.add_argument("--extension")
    parser.add_argument("--cancels", action="store_true")
    options = parser.parse_args()
    if options.extension:
        use_extension(options.extension)
    from milpy.errors import EngineError  # noqa: PLC0415 - it may import the extension

    scenes = {
        "demo": open_demo(options.device, options.page_size),
        "wide": open_wide(options.device, options.page_size, options.wide),
    }
    try:
        found: dict[str, Any] = {
            name: {"settled": settled(scene), "live": live(scene, cancels=options.cancels)}
            for name, scene in scenes.items()
        }
    except EngineError as problem:  # a step failed: a result like another, for a broken build
        found = {"error": str(problem)}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
