"""tools/sanitize.sh with a compute-sanitizer that prints what it is told: which of its findings are
a failure. Those that racecheck has inside cuBLAS's own kernels, and nothing else, are none.

And which of its files reaches each kernel that there is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILE = "tests/kernels/test_linear.py"
HEAD = "========= COMPUTE-SANITIZER\n"
PASSED = "4 passed, 20 deselected in 30.15s\n"
NVJET = "nvjet_sm90_tst_64x8_64x16_4x1_v_bz_TNT"
SAID = {
    "clean": (0, "....  [100%]\n" + PASSED + "========= RACECHECK SUMMARY: 0 hazards displayed\n"),
    "deaf": (1, "========= Error: Device not supported. Please refer to the documentation\n"),
}


def race(one: str, other: str, dots: str = "") -> str:
    """As racecheck prints it; pytest's dots may stand before."""
    return (
        f"{dots}========= Error: Race reported between Write access at {one}+0x1a30\n"
        f"=========     and Read access at {other}+0x1b40 [256 hazards]\n=========\n"
    )


def sanitize(folder: Path, status: int, log: str, **variables: str) -> tuple[int, str]:
    """Its status and table, where each process prints `log` and ends with `status`."""
    (folder / "log").write_text(HEAD + log)
    tool = folder / "compute-sanitizer"
    opens = SAID["deaf"][1] if variables.pop("deaf", "") else ""
    tool.write_text(f'#!/bin/sh\n[ "$1" = --tool ] || {{ echo "{opens}"; exit; }}\n')
    with tool.open("a") as file:
        file.write(f"cat {folder}/log\nexit {status}\n")
    tool.chmod(0o755)
    return run(f"{folder}:{os.environ['PATH']}", **variables)


def run(path: str, **variables: str) -> tuple[int, str]:
    env = {**os.environ, "TOOLS": "racecheck", "PATH": path, "PYTHON": sys.executable, **variables}
    done = subprocess.run(
        ["sh", "tools/sanitize.sh", FILE], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True
    )
    return done.returncode, done.stdout


def test_a_clean_file_is_ok(tmp_path: Path) -> None:
    status, table = sanitize(tmp_path, *SAID["clean"])
    assert status == 0
    assert table.startswith("racecheck  test_linear              ok ") and "4 passed" in table


@pytest.mark.parametrize("dots", ["", "..."])
def test_hazards_inside_cublas_are_told_and_do_not_count(tmp_path: Path, dots: str) -> None:
    found = race(NVJET, NVJET, dots) + race(NVJET, NVJET) + PASSED
    status, table = sanitize(tmp_path, 9, found)
    assert status == 0
    assert " ok " in table and "all inside cuBLAS" in table


CRASH = "========= Error: process didn't terminate successfully\n"
FAULT = "========= Program hit cudaErrorIllegalAddress (error 700) due to an illegal address\n"


@pytest.mark.parametrize(
    "found",
    [
        race("norm_kernel", "norm_kernel") + PASSED,
        race("norm_kernel", "norm_kernel", "...") + PASSED,
        race(NVJET, "norm_kernel") + PASSED,
        race(NVJET, NVJET) + race("norm_kernel", "norm_kernel", ".") + PASSED,
        CRASH,
        race(NVJET, NVJET) + CRASH,
        race(NVJET, NVJET) + CRASH + PASSED,
        race(NVJET, NVJET) + FAULT + PASSED,
        race(NVJET, NVJET),
        race(NVJET, NVJET) + "1 failed, 3 passed, 20 deselected in 30.15s\n",
        race(NVJET, NVJET) + "3 passed, 20 deselected, 1 error in 30.15s\n",
        PASSED,
    ],
)
def test_anything_else_is_a_failure(tmp_path: Path, found: str) -> None:
    status, table = sanitize(tmp_path, 9, found)
    assert status != 0
    assert table.startswith("racecheck  test_linear              FAILED (9) ")
    assert "== racecheck-test_linear.failed\n" in table


@pytest.mark.parametrize(
    ("tool", "status"), [("racecheck", 1), ("racecheck", 139), ("memcheck", 9)]
)
def test_another_status_or_tool_has_no_excuse(tmp_path: Path, tool: str, status: int) -> None:
    found = race(NVJET, NVJET) + PASSED
    ended, table = sanitize(tmp_path, status, found, TOOLS=tool)
    assert ended != 0
    assert f"FAILED ({status})" in table


@pytest.mark.parametrize(("asked", "bare"), [("", "11  "), ("1", "1111"), ("0", "0000")])
def test_guards_and_fills_hide_nothing_from_memcheck_and_initcheck(
    tmp_path: Path, asked: str, bare: str
) -> None:
    """Their arrays are bare, and memcheck's have no neighbour."""
    calls, tool = tmp_path / "calls", tmp_path / "compute-sanitizer"
    says = f'echo "$2 ${{MILPY_SHIM_BARE:- }} $3" >>{calls}'
    tool.write_text(f'#!/bin/sh\n[ "$1" != --tool ] || {says}\n')
    tool.chmod(0o755)
    tools = ["memcheck", "initcheck", "racecheck", "synccheck"]
    path = f"{tmp_path}:{os.environ['PATH']}"
    status, _ = run(path, TOOLS=" ".join(tools), JOBS="1", MILPY_SHIM_BARE=asked)
    assert status == 0
    assert calls.read_text().splitlines() == [
        f"{name} {is_bare} {'--padding' if name == 'memcheck' else '--error-exitcode'}"
        for name, is_bare in zip(tools, bare, strict=True)
    ]


def test_a_long_log_says_how_much_is_not_shown(tmp_path: Path) -> None:
    _, table = sanitize(tmp_path, 1, "a line\n" * 99)
    assert table.count("a line\n") == 59
    assert table.endswith("... and 40 more lines\n")


def test_a_device_that_it_does_not_know_is_a_skip(tmp_path: Path) -> None:
    status, says = sanitize(tmp_path, *SAID["clean"], deaf="1", MILPY_TEST_GPU="1")
    assert (status, says) == (77, "compute-sanitizer says here: Device not supported\n")


@pytest.mark.parametrize(("must", "ends"), [("0", 77), ("1", 1)])
def test_its_absence_is_a_failure_where_a_gpu_must_be(tmp_path: Path, must: str, ends: int) -> None:
    for name in ("sh", "dirname"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    status, says = run(str(tmp_path), MILPY_TEST_GPU=must, CUDA_HOME="/nonexistent")
    assert status == ends
    assert says.startswith("found no compute-sanitizer on PATH")


# ---- what it reaches ----

# Kernels of each source, and the file of tests/kernels whose tests marked `sanitize` launch them.
# Whoever adds a kernel is made to look for such a test; that one launches it is not seen here.
KERNELS = {
    "act.cu": ("act_kernel act_any_kernel", "test_act.py"),
    "attention.cu": ("attention_kernel", "test_attention_small.py"),
    "attention_chunk_sm90.cu": ("chunk_kernel", "test_attention_small.py"),
    "attention_decode_sm90.cu": ("decode_kernel", "test_attention_small.py"),
    "attention_plan.cu": ("plan_kernel", "test_attention_small.py"),
    "begin.cu": ("copy_kernel apply_kernel", "test_begin.py"),
    "borrow.cu": (
        "fill_kernel modules_kernel gather_kernel spread_kernel samples_kernel",
        "test_python_ops.py",
    ),
    "dummy.cu": ("dummy_kernel", "test_dummy.py"),
    "embed.cu": ("embed_kernel embed_any_kernel", "test_embed.py"),
    "fill.cu": ("fill_kernel", "test_rope.py"),  # a bucket's padding, bare or not
    "linear.cu": ("round_bias_kernel", "test_linear.py"),
    "lora_expand.cu": ("expand_kernel", "test_lora.py"),
    "lora_shrink.cu": ("shrink_kernel", "test_lora.py"),
    "norm.cu": ("norm_kernel norm_any_kernel", "test_norm.py"),
    "product.cu": ("few_rows_kernel combine_kernel many_rows_kernel", "test_linear.py"),
    "rope.cu": ("rope_kernel rope_any_kernel", "test_rope.py"),
    "sample.cu": ("maxima_kernel masses_kernel choose_kernel", "test_sample.py"),
    "send.cu": ("send_kernel", "test_send.py"),
}
KERNEL = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\([^()]*\)\s*)?(\w+)\(")


def test_every_kernel_is_in_the_table() -> None:
    found = {}
    for path in sorted((ROOT / "csrc").rglob("*.cu*")):
        source = path.read_text()
        names = KERNEL.findall(source)
        assert len(names) == source.count("__global__"), path
        if names:
            found[path.name] = " ".join(names)
    assert found == {name: kernels for name, (kernels, _) in KERNELS.items()}


@pytest.mark.parametrize("name", sorted({test for _, test in KERNELS.values()}))
def test_the_files_that_launch_them_hold_such_tests(name: str) -> None:
    """By the words that tools/sanitize.sh looks for."""
    source = (ROOT / "tests/kernels" / name).read_text()
    assert re.search(r"mark\.sanitize|small\(", source)
