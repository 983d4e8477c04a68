"""Adapters come and go on other threads while engines of the same model are made, with their graphs
captured, run and are freed: nobody's answer changes and nothing fails."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers.drivers import Request, open_model, serve
from helpers.tiny_llama import write_adapter, write_tiny_llama

from milpy import _C
from milpy.adapters import read_adapter
from milpy.config import read_model_config

N_LOADERS = 2
N_ENGINES = 6
OPTIONS = {"deterministic": True, "max_num_seqs": 8, "max_num_batched_tokens": 64}


@contextmanager
def loaders(model: _C.Model, adapters: list[Path], config: object) -> Iterator[list[int]]:
    """Threads that load and unload until the end; what each counted. Their failures are raised."""
    done = threading.Event()
    counts, problems = [0] * len(adapters), list[Exception]()

    def load(i: int) -> None:
        try:
            while not done.is_set():
                model.release_adapter(model.add_adapter(read_adapter(adapters[i], config)))
                counts[i] += 1
        except Exception as problem:
            problems.append(problem)

    threads = [threading.Thread(target=load, args=(i,)) for i in range(len(adapters))]
    for thread in threads:
        thread.start()
    try:
        yield counts
    finally:
        done.set()
        for thread in threads:
            thread.join()
    if problems:
        raise problems[0]


@pytest.mark.parametrize("enforce_eager", [False, True])
def test_loading_disturbs_neither_captures_nor_steps(
    device: str, tmp_path: Path, enforce_eager: bool
) -> None:
    write_tiny_llama(tmp_path / "base", head_dim=64)
    paths = [tmp_path / f"adapter{i}" for i in range(1 + N_LOADERS)]
    for i, path in enumerate(paths):
        write_adapter(path, tmp_path / "base", rank=64, seed=i)
    config = read_model_config(tmp_path / "base")
    model = open_model(tmp_path / "base", device)
    kept = model.add_adapter(read_adapter(paths[0], config))
    requests = [
        Request([7 + i, 8, 9], 12, adapter=(kept, -1)[i % 2], temperature=1.0, seed=i)
        for i in range(8)
    ]
    options = {**OPTIONS, "enforce_eager": enforce_eager}
    expected, _ = serve(model, requests, **options)
    with loaders(model, paths[1:], config) as counts:
        for _ in range(N_ENGINES):
            found, _ = serve(model, requests, **options)
            assert found == expected
    assert min(counts) > 0
    model.close()
