"""Tests of this room that take `device` run on a GPU, and smaller ones of them on the CPU."""

from __future__ import annotations

import pytest
from helpers.gpu import need_cuda, need_torch


@pytest.fixture(scope="session", params=[pytest.param("cuda", marks=pytest.mark.gpu), "cpu"])
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name == "cuda":
        need_cuda()
    return name


@pytest.fixture(scope="session")
def oracle_device(device: str) -> str:
    """The same, where torch runs on it."""
    if device == "cuda":
        need_torch()
    return device
