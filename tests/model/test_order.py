"""Answers do not depend on when anything runs, where a host works ahead of a device that is late.

The device is the CPU (tests/chaos/late_cpu.c), its ops held back until the host waits or a seed
lets them go. Two builds that break a rule are caught by it. test_cuda_order.py asks a GPU for more.
"""

from __future__ import annotations

import pytest
from helpers.order import Found, Workload, check_worth, difference, name_of, write_workload

CHAOS: list[dict[str, str]] = [
    {"CHAOS": "sleeps", "CHAOS_SEED": "1"},
    {"CHAOS": "device", "CHAOS_SEED": "2"},
    {"CHAOS": "device,sleeps,late", "CHAOS_SEED": "3"},
]


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Workload:
    return write_workload(tmp_path_factory.mktemp("wide"), "cpu")


@pytest.fixture(scope="module")
def calm(workload: Workload) -> Found:
    """The CPU as it is, nobody cancelled."""
    found = workload.run(cancels=False)
    check_worth(found)
    return found


def test_poison_changes_no_bit(workload: Workload, calm: Found) -> None:
    assert difference(workload.run(POISON="0"), calm) == ""


@pytest.mark.parametrize("switches", CHAOS, ids=name_of)
def test_lateness_changes_no_bit(workload: Workload, calm: Found, switches: dict[str, str]) -> None:
    assert difference(workload.run("late", **switches), calm) == ""


@pytest.mark.parametrize("kind", ["ring", "fence"])
def test_a_broken_rule_is_seen(workload: Workload, calm: Found, kind: str) -> None:
    assert difference(workload.run(kind, CHAOS="device", CHAOS_SEED="4"), calm) != ""
