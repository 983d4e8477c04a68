"""Runs order_workload.py under another extension or environment, and compares what came out."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from helpers.gpu import need_file

ROOT = Path(__file__).parents[2]
WORKLOAD = Path(__file__).with_name("order_workload.py")
CANCELLED = 3  # _C.FINISH_CANCELLED; this process need not load the extension
TIMEOUT_S = 120  # for a device that hangs; no claim of a test

Found = dict[str, Any]


def extension(kind: str) -> Path:
    """What `make chaos` built: late, or late and broken: ring (one entry for all steps in flight),
    fence (pages go before their last step has retired)."""
    path = ROOT / "build/chaos" / kind / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    need_file(path, "make chaos")
    return path


def run(
    device: str, kind: str = "", *, page_size: int = 16, cancels: bool = True, **switches: str
) -> Found:
    """What the workload gave; `switches` are variables of the environment, without MILPY_.

    An engine that failed is in it under "error". What MILPY_CHAOS asks for must have happened.
    """
    command = [sys.executable, str(WORKLOAD), device, str(page_size)]
    command += ["--extension", str(extension(kind))] if kind else []
    command += ["--cancels"] if cancels else []
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MILPY_CHAOS")}
    switched = {f"MILPY_{name}": value for name, value in switches.items()}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command,
        env={**kept, "PYTHONPATH": path, "MILPY_POISON": "1", **switched},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    if done.returncode < 0:
        return {"error": f"signal {-done.returncode}: {done.stderr[-2000:]}"}
    assert done.returncode == 0, done.stderr[-2000:]
    happened = dict(re.findall(r"(\w+)=(\d+)", done.stderr.partition("chaos:")[2]))
    for what in filter(None, switches.get("CHAOS", "").split(",")):
        assert int(happened[what]) > 0, f"{what} never happened: {done.stderr}"
    found: Found = json.loads(done.stdout)
    return found


def difference(found: Found, expected: Found) -> str:
    """The first answer that is another, bit by bit; "" when there is none. `expected` ran without
    cancels: one that was cancelled must be the beginning of its answer."""
    if "error" in found:
        return str(found["error"])
    for part in ("settled", "live"):
        pairs = zip(found[part]["answers"], expected[part]["answers"], strict=True)
        for i, (ours, theirs) in enumerate(pairs):
            apart = _apart(ours, theirs, may_be_cut=part == "live")
            if apart:
                return f"{part} {i}: {apart}"
    return ""


def _apart(ours: Found, theirs: Found, *, may_be_cut: bool) -> str:
    found, expected = ours["samples"], theirs["samples"]
    for at, (mine, other) in enumerate(zip(found, expected, strict=False)):
        if mine != other:
            return f"token {at}: found {mine}, expected {other}"
    ends = (ours["finish"], len(found)), (theirs["finish"], len(expected))
    if may_be_cut and ours["finish"] == CANCELLED and len(found) <= len(expected):
        return ""
    return "" if ends[0] == ends[1] else f"found finish and length {ends[0]}, expected {ends[1]}"


def name_of(switches: dict[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in switches.items())


def check_worth(calm: Found) -> None:
    """The traffic does what it is for: it preempts, and ends by stop tokens and by limits."""
    assert "error" not in calm, calm["error"]
    assert calm["settled"]["stats"]["n_preemptions"] >= 4
    assert len({answer["finish"] for answer in calm["settled"]["answers"]}) == 2
