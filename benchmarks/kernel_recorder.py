"""All that a GPU runs for this process, by torch's profiler.

Importing it fails where torch is missing. The profiler is kineto over CUPTI, which sits under every
copy of the CUDA runtime: it sees the core's kernels too, by the device's own stamps, in ns. It must
run before a graph is instantiated to see each kernel in it, so a model is made while a Recorder
records. Tracing has its price: kernels are stamped one by one, and launches take the host longer.
"""

from __future__ import annotations

import gzip
import json
import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.kernel_trace import Trace, read_trace


def is_usable() -> bool:
    return torch.cuda.is_available()


class Recorder:
    """Records from entering it to leaving it; then there is a trace. One in a process: the profiler
    may see nothing the second time."""

    trace: Trace

    def __init__(self, kept: Path | None = None) -> None:
        """kept: where the Chrome trace is left, gzipped, for chrome://tracing or Perfetto."""
        self._kept = kept

    def __enter__(self) -> Recorder:
        torch.cuda.init()  # a context before CUPTI asks for one
        self._profile = profile(activities=[ProfilerActivity.CUDA])
        self._profile.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._profile.stop()
        if kind is not None:
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(path))
            text = path.read_bytes()
        if self._kept is not None:
            self._kept.write_bytes(gzip.compress(text))
        self.trace = read_trace(json.loads(text)["traceEvents"])
