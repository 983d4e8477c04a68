"""A peer beside us: its process, which is asked between our own runs and asleep otherwise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def available_bytes() -> int:
    """What the kernel says a new process may take without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, value = line.split(":")
        if name == "MemAvailable":
            return int(value.split()[0]) << 10
    raise ValueError("/proc/meminfo: found no MemAvailable")


class TorchPeer:
    """A process of benchmarks.peer_torch; where it cannot be, rates are NaN and `note` says why."""

    def __init__(self) -> None:
        self.note = "not asked"
        self._process: subprocess.Popen[str] | None = None

    def start(self, folder: Path, n_threads: int, needed_bytes: int) -> None:
        """Make the model whose config.json lies in `folder`; back when it is ready."""
        if needed_bytes > available_bytes():
            self.note = "no memory for torch"
            return
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.peer_torch", str(folder), str(n_threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"},
            text=True,
        )
        self._read()

    def _read(self) -> float:
        assert self._process is not None and self._process.stdout is not None
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {}
        if "rate" in answer:
            return float(answer["rate"])
        if "ready" in answer:
            self.note = ""
        else:
            code = self._process.wait()
            self.note = answer.get("note", f"torch ended with {code}")
            self._process = None
        return float("nan")

    def _ask(self, request: str) -> float:
        if self._process is None:
            return float("nan")
        assert self._process.stdin is not None
        print(request, file=self._process.stdin, flush=True)
        return self._read()

    def decode(self, n_seqs: int, context: int, n_steps: int) -> float:
        """Tokens a second of n_seqs together."""
        return self._ask(f"decode {n_seqs} {context} {n_steps}")

    def prefill(self, length: int) -> float:
        """Prompt tokens a second."""
        return self._ask(f"prefill {length}")

    def close(self) -> None:
        if self._process is not None:
            self._process.communicate()
