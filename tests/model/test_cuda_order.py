"""A GPU's answers do not depend on when anything runs: kernels that start early or late, a second
stream, a slow host, a host that hears late. And two builds that break a rule are caught by it."""

from __future__ import annotations

import pytest
from helpers.order import Found, check_worth, difference, name_of, run

from milpy import LLM, demo

pytestmark = pytest.mark.gpu

SWITCHES: list[dict[str, str]] = [
    {"CUDA_PDL": "0"},
    {"CUDA_SIDE": "0"},
    {"CUDA_PDL": "0", "CUDA_SIDE": "0"},
    {"POISON": "0"},
]
CHAOS: list[dict[str, str]] = [
    {"CHAOS": "delays", "CHAOS_SEED": "1"},
    {"CHAOS": "delays", "CHAOS_SEED": "2"},
    {"CHAOS": "sleeps", "CHAOS_SEED": "3"},
    {"CHAOS": "late", "CHAOS_SEED": "4"},
    {"CHAOS": "delays,sleeps,late", "CHAOS_SEED": "5"},
    {"CHAOS": "delays,sleeps", "CHAOS_SEED": "6", "CUDA_PDL": "0"},
    {"CHAOS": "delays,sleeps", "CHAOS_SEED": "7", "CUDA_SIDE": "0"},
]


@pytest.fixture(scope="module")
def calm() -> Found:
    """Everything on, nothing delayed, nobody cancelled."""
    found = run("cuda", cancels=False)
    check_worth(found)
    return found


@pytest.mark.parametrize("switches", SWITCHES, ids=name_of)
def test_switches_change_no_bit(calm: Found, switches: dict[str, str]) -> None:
    assert difference(run("cuda", **switches), calm) == ""


@pytest.mark.parametrize("switches", CHAOS, ids=name_of)
def test_lateness_changes_no_bit(calm: Found, switches: dict[str, str]) -> None:
    assert difference(run("cuda", "late", **switches), calm) == ""


@pytest.mark.parametrize("seed", ["1", "2"])
def test_a_ring_of_one_is_seen(calm: Found, seed: str) -> None:
    found = run("cuda", "ring", CHAOS="delays,sleeps,late", CHAOS_SEED=seed)
    assert difference(found, calm) != ""


@pytest.mark.parametrize("seed", ["1", "2"])
def test_pages_freed_before_the_fence_are_seen(calm: Found, seed: str) -> None:
    assert difference(run("cuda", "fence", CHAOS="delays", CHAOS_SEED=seed), calm) != ""


@pytest.mark.parametrize("name", ["MILPY_CUDA_PDL", "MILPY_CUDA_SIDE"])
def test_a_switch_that_is_neither_on_nor_off_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "yes")
    with pytest.raises(Exception, match=f'{name} is "yes", expected 0 or 1'):
        LLM(demo.BASE, device="cuda", progress=False)
