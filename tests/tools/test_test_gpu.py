"""tools/test_gpu.py on pytest runs of its own: what it counts, and what it does not let pass."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import test_gpu

PASSES = "def test_passes():\n    pass\n"
SKIPS = "import pytest\n\ndef test_skips():\n    pytest.skip('needs two moons')\n"
FAILS = "def test_fails():\n    assert False\n"
BREAKS = "def test_breaks(nothing_by_this_name):\n    pass\n"
DIES = "import os\n\ndef test_dies():\n    os._exit(3)\n"


def outcome_of(folder: Path, *texts: str) -> test_gpu.Outcome:
    path = folder / "test_it.py"
    path.write_text("\n".join(texts))
    return test_gpu.run_pytest([str(path)], [], dict(os.environ), is_shown=False)


def test_passes_and_skips_are_counted_by_reason(tmp_path: Path) -> None:
    it = outcome_of(tmp_path, PASSES, SKIPS)
    assert (it.n_passed, it.n_failed, it.problems) == (1, 0, [])
    assert it.skips == {"needs two moons": 1}


@pytest.mark.parametrize(("text", "name"), [(FAILS, "test_fails"), (BREAKS, "test_breaks")])
def test_a_failure_is_named(tmp_path: Path, text: str, name: str) -> None:
    it = outcome_of(tmp_path, PASSES, text)
    assert (it.n_passed, it.n_failed) == (1, 1)
    assert it.problems[0].endswith(f"::{name}")


def test_a_process_that_dies_is_a_problem(tmp_path: Path) -> None:
    it = outcome_of(tmp_path, PASSES, DIES)
    assert it.n_passed == 0
    assert it.problems == [f"{tmp_path}/test_it.py: pytest ended with 3"]


def test_a_stage_that_passes_nothing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def skips(options: list[str], env: dict[str, str]) -> test_gpu.Outcome:
        return outcome_of(tmp_path, SKIPS)

    monkeypatch.setitem(test_gpu.STAGES, "kernels", skips)
    assert test_gpu.run_stages(["kernels"], [])["kernels"].problems == ["no test passed"]


@pytest.mark.parametrize("must", ["0", "1"])
def test_where_a_gpu_must_be_its_absence_is_no_skip(must: str) -> None:
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "MILPY_TEST_GPU": must}
    options = ["-k", "unknown_ordinal or test_rope"]
    paths = ["tests/model/test_cuda.py", "tests/kernels/test_rope.py"]
    it = test_gpu.run_pytest(paths, options, env, is_shown=False)
    assert it.n_passed == 0
    n_tests = it.n_failed + it.skips.total()
    assert n_tests > 2
    assert it.n_failed == (n_tests if must == "1" else 0), it.problems
