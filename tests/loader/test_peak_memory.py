"""Loading holds one copy of the weights and the readers' windows, never a file beside the copy."""

import subprocess
import sys
from pathlib import Path

from helpers.tiny_llama import write_tiny_llama

# In a process of its own, whose high-water mark nothing else has raised.
LOAD = """
import sys
from pathlib import Path
from milpy import _C
from milpy.checkpoint import open_checkpoint
from milpy.config import read_model_config

def peak_bytes():
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in l)
    return int(line.split()[1]) * 1024

config = read_model_config(sys.argv[1])
checkpoint = open_checkpoint(sys.argv[1], config)
before = peak_bytes()
model = _C.Model(config, checkpoint, max_position=64, n_threads=2)
print(model.report()["weight_bytes"], peak_bytes() - before)
"""
# Two readers' windows of at most 8 MiB, thread stacks, rounding of slabs to huge pages.
WINDOWS_BYTES = 24 << 20


def test_loading_holds_one_copy_and_windows(tmp_path: Path) -> None:
    write_tiny_llama(
        tmp_path, hidden=1024, ffn=4096, layers=4, heads=8, kv_heads=8, head_dim=128, vocab=8192
    )
    result = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path)], check=True, capture_output=True, text=True
    )
    weight_bytes, grown = map(int, result.stdout.split())
    assert weight_bytes > 128 << 20
    assert grown < weight_bytes + WINDOWS_BYTES
