"""Runs order_workload.py under another extension or environment, and compares what came out."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.gpu import need_file
from helpers.tiny_llama import write_adapter, write_tiny_llama

ROOT = Path(__file__).parents[2]
WORKLOAD = Path(__file__).with_name("order_workload.py")
CANCELLED = 3  # _C.FINISH_CANCELLED; this process need not load the extension
TIMEOUT_S = 120  # for a device that hangs; no claim of a test
SPLIT_KEYS = 512  # csrc/kernels/attention.cuh's MIL_ATTENTION_MIN_SPLIT
# The wide scene's model. A GPU cuts every K of its products (our own from 1,024 on, LoRA's shrink
# above it) but shrink's for o_proj, and its head size is one that Hopper has kernels for. The CPU's
# ops leave each other nothing and run one after another (late_cpu.c), so that texts are as long
# there, and the model is narrow.
WIDE: dict[str, dict[str, int]] = {
    "cuda": {"hidden": 1088, "ffn": 2112, "heads": 8, "kv_heads": 2, "head_dim": 128},
    "cpu": {"hidden": 64, "ffn": 128, "heads": 4, "kv_heads": 2, "head_dim": 32},
}
RANKS = (8, 64)

Found = dict[str, Any]


def extension(kind: str) -> Path:
    """What `make chaos` built: late, or late and broken: ring (one entry for all steps in flight),
    fence (pages go before their last step has retired)."""
    path = ROOT / "build/chaos" / kind / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    need_file(path, "make chaos")
    return path


@dataclass(frozen=True)
class Workload:
    """order_workload.py on a device: each run is a process."""

    device: str
    wide: Path  # the wide scene's folder
    has_pdl: bool = False  # programmatic launch, unless it is switched off

    def run(
        self, kind: str = "", *, page_size: int = 16, cancels: bool = True, **switches: str
    ) -> Found:
        """What came out; `switches` are variables of the environment, without MILPY_.

        An engine that failed is in it under "error". What MILPY_CHAOS asks for must have happened,
        and on a GPU launches in the ways that are on, and in no other.
        """
        command = [sys.executable, str(WORKLOAD), self.device, str(page_size), str(self.wide)]
        command += ["--extension", str(extension(kind))] if kind else []
        command += ["--cancels"] if cancels else []
        kept = {
            key: value for key, value in os.environ.items() if not key.startswith("MILPY_CHAOS")
        }
        switched = {f"MILPY_{name}": value for name, value in switches.items()}
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        env = {**kept, "PYTHONPATH": path, "MILPY_POISON": "1", **switched}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=TIMEOUT_S)
        if done.returncode < 0:
            return {"error": f"signal {-done.returncode}: {done.stderr[-2000:]}"}
        assert done.returncode == 0, done.stderr[-2000:]
        said = done.stderr.partition("chaos:")[2]
        happened = {what: int(n) for what, n in re.findall(r"(\w+)=(\d+)", said)}
        for what in filter(None, switches.get("CHAOS", "").split(",")):
            assert happened[what] > 0, f"{what} never happened: {done.stderr}"
        found: Found = json.loads(done.stdout)
        if kind and "error" not in found:
            self._check_launches(happened, env)
        return found

    def _check_launches(self, happened: Mapping[str, int], env: Mapping[str, str]) -> None:
        """Of the builds that count them; the ordinary one has the same switches and kernels."""
        is_gpu = self.device == "cuda"
        expected = {
            "pdl": self.has_pdl and env.get("MILPY_CUDA_PDL") != "0",
            "side": is_gpu and env.get("MILPY_CUDA_SIDE") != "0",
            "splits": is_gpu,
            "bias": is_gpu,
        }
        found = {what: happened[what] > 0 for what in expected}
        assert found == expected, f"launches: found {happened}, expected {expected}"


def write_workload(folder: Path, device: str, *, has_pdl: bool = False) -> Workload:
    base = folder / "base"
    write_tiny_llama(base, vocab=5003, bias=True, max_positions=2048, **WIDE[device])  # type: ignore[arg-type]
    for rank in RANKS:
        write_adapter(folder / f"adapters/{rank}", base, rank=rank, seed=rank, gain=0.3)
    return Workload(device, folder, has_pdl)


def difference(found: Found, expected: Found) -> str:
    """The first answer that is another, bit by bit; "" when there is none. `expected` ran without
    cancels: one that was cancelled must be the beginning of its answer."""
    if "error" in found:
        return str(found["error"])
    for scene, parts in expected.items():
        for part in parts:
            pairs = zip(found[scene][part]["answers"], parts[part]["answers"], strict=True)
            for i, (ours, theirs) in enumerate(pairs):
                apart = _apart(ours, theirs, may_be_cut=part == "live")
                if apart:
                    return f"{scene} {part} {i}: {apart}"
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
    """The traffic does what it is for: it preempts, ends by stop tokens and by limits, and of long
    texts decodes rows whose keys a GPU cuts, some of which were not cut before."""
    assert "error" not in calm, calm["error"]
    for scene, parts in calm.items():
        answers = parts["settled"]["answers"]
        assert parts["settled"]["stats"]["n_preemptions"] >= 4, scene
        assert len({answer["finish"] for answer in answers}) == 2, scene
        assert 2 * len({str(answer["samples"]) for answer in answers}) > len(answers), scene
    for part in calm["wide"].values():
        # A token that is decoded sees the prompt, and those before it.
        spans = [(a["n_prompt"], a["n_prompt"] + len(a["samples"]) - 1) for a in part["answers"]]
        assert sum(end - max(begin, SPLIT_KEYS) for begin, end in spans if end > SPLIT_KEYS) >= 500
        assert sum(begin <= SPLIT_KEYS < end for begin, end in spans) >= 3
