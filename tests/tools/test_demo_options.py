"""The demo's tools where torch is missing: their help, and what to install."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
NAMES = ["train", "score", "goldens", "mutants"]


def run(name: str, path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Where there is no torch, whatever is installed."""
    (path / "torch.py").write_text("raise ModuleNotFoundError('none', name='torch')\n")
    return subprocess.run(
        [sys.executable, TOOLS / f"demo_{name}.py", *arguments],
        env={**os.environ, "PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("name", NAMES)
def test_help_needs_no_torch(name: str, tmp_path: Path) -> None:
    done = run(name, tmp_path, "--help")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith(f"usage: demo_{name}.py [-h]")
    assert f"python tools/demo_{name}.py" in done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_without_torch_a_tool_says_what_to_install(name: str, tmp_path: Path) -> None:
    arguments = ["--out", str(tmp_path / "out")] if name == "train" else []
    done = run(name, tmp_path, *arguments)
    says = "found no torch, expected the [ref] extra: pip install -e '.[ref]'"
    assert done.returncode == 1 and done.stderr == f"demo_{name}.py: {says}\n"


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_option_is_told_before_that(name: str, tmp_path: Path) -> None:
    done = run(name, tmp_path, "--epochs", "3")
    assert done.returncode == 2 and f"demo_{name}.py: error: " in done.stderr
