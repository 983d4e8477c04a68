"""tools/test_gpu.py on pytest runs of its own: what it counts, and what it does not let pass."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import test_gpu

PASSES = "def test_passes():\n    pass\n"
SKIPS = "import pytest\n\ndef test_skips():\n    pytest.skip('needs two moons')\n"
FAILS = "def test_fails():\n    assert False\n"
BREAKS = "def test_breaks(nothing_by_this_name):\n    pass\n"
DIES = "import os\n\ndef test_dies():\n    os._exit(3)\n"
WAITS = "import threading\n\ndef test_waits():\n    threading.Event().wait()\n"
TOLD = "import os\n\ndef test_told():\n    assert os.environ['MILPY_TEST_GPU'] == '1'\n"


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


def test_a_process_that_does_not_end_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(test_gpu, "LIMIT_S", 1.0)
    it = outcome_of(tmp_path, WAITS)
    assert it.problems[-1] == f"{tmp_path}/test_it.py: ended after 1 s"


def test_files_are_added_up_with_all_that_is_wrong_in_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(test_gpu, "ROOT", tmp_path)
    texts = {"a": PASSES + SKIPS, "b": PASSES + FAILS, "c": DIES}
    paths = [tmp_path / f"test_{name}.py" for name in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        path.write_text(text)
    it = test_gpu.run_files(paths, [], dict(os.environ))
    assert (it.n_passed, it.n_failed, it.skips) == (2, 1, {"needs two moons": 1})
    assert sorted(it.problems) == [
        "test_b.py: pytest ended with 1",
        "test_b::test_fails",
        "test_c.py: pytest ended with 3",
    ]


# ---- sanitize ----


ROW = "racecheck  test_rope                {word}   30s 1 failed; 3 passed;\n"


@pytest.mark.parametrize(
    ("says", "status", "problems"),
    [
        (ROW.format(word="ok         "), 0, []),
        (ROW.format(word="ok         "), 1, ["tools/sanitize.sh ended with 1"]),
        (
            ROW.format(word="FAILED (9) "),
            123,
            ["racecheck  test_rope: FAILED (9)", "tools/sanitize.sh ended with 123"],
        ),
        ("found no tool\n", 1, ["tools/sanitize.sh ended with 1: found no tool"]),
        ("cannot run\n", 77, []),
    ],
)
def test_the_sanitizers_table_and_status_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str, status: int, problems: list[str]
) -> None:
    monkeypatch.setattr(test_gpu, "ROOT", tmp_path)
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/sanitize.sh").write_text(f"cat <<.\n{says}.\nexit {status}\n")
    it = test_gpu.sanitize([], dict(os.environ))
    assert it.problems == problems
    assert it.n_passed == (3 if "passed" in says else 0)
    assert it.n_failed == (1 if "FAILED" in says else 0)
    assert it.skips == ({"cannot run": 1} if status == 77 else {})


# ---- stages ----


@pytest.fixture
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What each stage's one file holds; "" is a stage that passes. The names are the real ones."""
    texts = dict.fromkeys(test_gpu.STAGES, "")

    def run(name: str, options: list[str], env: dict[str, str]) -> test_gpu.Outcome:
        if texts[name] == "":
            return test_gpu.Outcome(n_passed=1)
        path = tmp_path / f"test_{name}.py"
        path.write_text(texts[name])
        return test_gpu.run_pytest([str(path)], options, env, is_shown=False)

    for name in texts:
        monkeypatch.setitem(test_gpu.STAGES, name, partial(run, name))
    monkeypatch.setattr(test_gpu, "gpu_count", lambda: 1)
    return texts


def main(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["test_gpu.py", *words])
    return test_gpu.main()


@pytest.mark.parametrize(("text", "status"), [(PASSES, 0), (FAILS, 1), (DIES, 1), (SKIPS, 1)])
def test_one_stage_that_fails_is_the_scripts_status(
    stages: dict[str, str], monkeypatch: pytest.MonkeyPatch, text: str, status: int
) -> None:
    stages["models"] = text
    assert main(monkeypatch, "--only", "models,kernels") == status


def test_stages_are_told_that_there_is_a_gpu(
    stages: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MILPY_TEST_GPU", raising=False)
    stages["kernels"] = TOLD
    assert main(monkeypatch, "--only", "kernels") == 0


def test_a_stage_that_passes_nothing_fails(stages: dict[str, str]) -> None:
    stages["kernels"] = SKIPS
    assert test_gpu.run_stages(["kernels"], [])["kernels"].problems == ["no test passed"]


@pytest.mark.parametrize(("word", "status"), [("passes", 0), ("pases", 1)])
def test_options_may_empty_stages_but_not_all(
    stages: dict[str, str], monkeypatch: pytest.MonkeyPatch, word: str, status: int
) -> None:
    """The sanitizers' stage takes no options, so that what it passes says nothing of them."""
    stages |= {"kernels": FAILS, "models": PASSES}
    assert main(monkeypatch, "--only", "kernels,models,sanitize", "-k", word) == status


@pytest.mark.parametrize(
    ("text", "status"), [(SKIPS, 0), (PASSES, 1)], ids=["skips", "finds nothing to skip"]
)
def test_without_a_gpu_all_skips(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, status: int
) -> None:
    monkeypatch.setattr(test_gpu, "ROOT", tmp_path)
    monkeypatch.setattr(test_gpu, "MARKS", "not moon")
    monkeypatch.setattr(test_gpu, "gpu_count", lambda: 0)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_it.py").write_text(text)
    assert main(monkeypatch) == status


# ---- words of the command ----


@pytest.mark.parametrize(
    "words", ["tests/cpu", "-x tests/tools/test_devices.py::test_it", "setup.py -q"]
)
def test_a_path_is_refused(
    words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(monkeypatch, *words.split())
    assert "found the path " in capsys.readouterr().err


@pytest.mark.parametrize("words", ["-k tests", "-x -m docs", "--deselect tests/cpu/test_rope.py"])
def test_an_options_value_is_no_path(words: str) -> None:
    assert test_gpu.paths_in(words.split()) == []


def test_help_explains_each_stage() -> None:
    command = [sys.executable, "tools/test_gpu.py", "--help"]
    done = subprocess.run(command, cwd=test_gpu.ROOT, stdout=subprocess.PIPE, text=True, check=True)
    for name in test_gpu.STAGES:
        assert f"\n{name} " in done.stdout


def test_a_long_list_says_how_much_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    it = test_gpu.Outcome(problems=[f"test {n}" for n in range(1, 24)])
    test_gpu.show_table({"kernels": it})
    shown = capsys.readouterr().out
    assert "FAILED kernels: test 20\nFAILED kernels: ... and 3 more\n" in shown
    assert "test 21" not in shown


# ---- on milpy's own tests ----


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
