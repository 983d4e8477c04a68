"""`python -m benchmarks`: which parts run on this machine."""

from __future__ import annotations

import pytest
from helpers.devices import gpu_count

from benchmarks import __main__ as parts


def test_a_machine_without_a_gpu_is_told_what_is_left_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    usable = parts.usable_parts([])
    assert [name for name in usable if name not in parts.NEED_GPU] == [
        name for name in parts.PARTS if name not in parts.NEED_GPU
    ]
    left_out = set(parts.NEED_GPU) - set(usable)
    assert bool(left_out) == ("left out" in capsys.readouterr().out)


@pytest.mark.skipif(gpu_count() > 0, reason="a GPU's benchmarks would run")
def test_a_part_that_was_named_and_cannot_run_is_a_failure(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert parts.main(["ops"]) == 1
    assert "== ops: left out: " in capsys.readouterr().out


def test_an_unknown_part_is_named_beside_those_there_are() -> None:
    assert parts.main(["gpu"]) == 2
