"""A tiny model with a tokenizer and two adapters, written once; an LLM on it, opened once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.tiny_llama import write_adapter, write_tiny_llama
from helpers.tiny_tokenizer import VOCAB, write_tokenizer

import milpy


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, and the adapters `a` and `b` of different ranks.

    Its context is long, so that a request without an end is still running when it is cancelled.
    """
    root = tmp_path_factory.mktemp("tiny")
    write_tiny_llama(root / "model", vocab=VOCAB, max_positions=4096)
    write_tokenizer(root / "model")
    write_adapter(root / "a", root / "model", rank=4, gain=2.0, seed=1)
    write_adapter(root / "b", root / "model", rank=16, gain=2.0, seed=2)
    return root


@pytest.fixture(scope="session")
def model(folders: Path) -> Path:
    return folders / "model"


@pytest.fixture(scope="module")
def llm(folders: Path) -> Iterator[milpy.LLM]:
    adapters = {"a": folders / "a", "b": folders / "b"}
    with milpy.LLM(
        folders / "model", adapters=adapters, max_model_len=256, n_threads=2, progress=False
    ) as llm:
        yield llm
