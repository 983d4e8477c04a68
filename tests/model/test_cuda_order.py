"""A GPU's answers do not depend on when anything runs: kernels that start early or late, a second
stream, a slow host, a host that hears late. And two builds that break a rule are caught by it.

Pages of 64 are what Hopper's own kernels serve; pages of 16 change hands more often. Late builds
count launches: what a switch turns off is on without it, and off with it (helpers/order.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
from helpers.gpu import need_cuda, need_file
from helpers.order import Found, Workload, check_worth, difference, name_of, write_workload

from milpy import _C, LLM, demo

pytestmark = pytest.mark.gpu

SWITCHES: list[tuple[int, dict[str, str]]] = [
    (64, {"CUDA_PDL": "0"}),
    (64, {"CUDA_SIDE": "0"}),
    (16, {"CUDA_PDL": "0", "CUDA_SIDE": "0"}),
    (16, {"POISON": "0"}),
]
CHAOS: list[tuple[int, dict[str, str]]] = [
    (64, {"CHAOS": "delays", "CHAOS_SEED": "1"}),
    (16, {"CHAOS": "delays", "CHAOS_SEED": "2"}),
    (64, {"CHAOS": "sleeps", "CHAOS_SEED": "3"}),
    (16, {"CHAOS": "late", "CHAOS_SEED": "4"}),
    (64, {"CHAOS": "delays,sleeps,late", "CHAOS_SEED": "5"}),
    (16, {"CHAOS": "delays,sleeps", "CHAOS_SEED": "6", "CUDA_PDL": "0"}),
    (16, {"CHAOS": "delays,sleeps", "CHAOS_SEED": "7", "CUDA_SIDE": "0"}),
]

Calm = Callable[[int], Found]


@pytest.fixture(scope="module", autouse=True)
def cuda() -> None:
    need_cuda()
    need_file(demo.BASE, "tools/demo_train.py")


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Workload:
    is_hopper = _C.gpu_reports()[0]["compute_capability"] == 90
    return write_workload(tmp_path_factory.mktemp("wide"), "cuda", has_pdl=is_hopper)


@pytest.fixture(scope="module")
def calm(workload: Workload) -> Calm:
    """By page size: everything on, nothing delayed, nobody cancelled."""

    @cache
    def found(page_size: int) -> Found:
        found = workload.run(page_size=page_size, cancels=False)
        check_worth(found)
        return found

    return found


def name_of_case(case: object) -> str:
    return name_of(case) if isinstance(case, dict) else f"pages of {case}"


@pytest.mark.parametrize(("page_size", "switches"), SWITCHES, ids=name_of_case)
def test_switches_change_no_bit(
    workload: Workload, calm: Calm, page_size: int, switches: dict[str, str]
) -> None:
    found = workload.run(page_size=page_size, **switches)
    assert difference(found, calm(page_size)) == ""


@pytest.mark.parametrize(("page_size", "switches"), CHAOS, ids=name_of_case)
def test_lateness_changes_no_bit(
    workload: Workload, calm: Calm, page_size: int, switches: dict[str, str]
) -> None:
    found = workload.run("late", page_size=page_size, **switches)
    assert difference(found, calm(page_size)) == ""


@pytest.mark.parametrize("seed", ["1", "2"])
def test_a_ring_of_one_is_seen(workload: Workload, calm: Calm, seed: str) -> None:
    found = workload.run("ring", CHAOS="delays,sleeps,late", CHAOS_SEED=seed)
    assert difference(found, calm(16)) != ""


@pytest.mark.parametrize("seed", ["1", "2"])
def test_pages_freed_before_the_fence_are_seen(workload: Workload, calm: Calm, seed: str) -> None:
    found = workload.run("fence", CHAOS="delays", CHAOS_SEED=seed)
    assert difference(found, calm(16)) != ""


@pytest.mark.parametrize("name", ["MILPY_CUDA_PDL", "MILPY_CUDA_SIDE"])
def test_a_switch_that_is_neither_on_nor_off_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "yes")
    with pytest.raises(Exception, match=f'{name} is "yes", expected 0 or 1'):
        LLM(demo.BASE, device="cuda", progress=False)
