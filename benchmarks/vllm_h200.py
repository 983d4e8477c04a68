"""vLLM 0.26.0 on one H200, Llama-3-8B's shape: the peer's figures, measured 2026-11-22.

bf16 dummy weights, 1,024 in / 256 out, defaults otherwise; adapters of rank 16 on all seven
projections. engine_cuda.py measures ours by the same method.
"""

from __future__ import annotations

from typing import NamedTuple

DECODE = {1: 203.2, 8: 1514.0, 32: 5020.0, 64: 8256.0, 128: 11783.0, 256: 13993.0}  # tok/s
TTFT_MS = {128: 9.5, 1024: 27.7, 2048: 52.3, 8192: 217.4}
START_S = (24.0, 58.0)  # warm to empty compile cache
FIRST_TOKEN_S = 0.03  # after that
HOST_GAP_MS = {64: 0.26, 1: 0.27}  # by batch: 7.75 of which 7.49 busy, 5.07 of which 4.80
QUEUE_RATE = (9052.0, 9211.0)  # tok/s of 512 requests, 1,000 in / 1,000 out, all at once


class ByMode(NamedTuple):
    """With room for 64 adapters, for 8, and in the best of its optional modes; None: not run."""

    slots_64: float
    slots_8: float | None = None
    best_mode: float | None = None


# Decode, tok/s. "off" of these: DECODE.
LORA_RATE = {
    (64, "base only"): ByMode(8251.0, 8257.0),
    (64, "one adapter"): ByMode(5658.0, 6807.0, 7207.0),
    (64, "8 in turn"): ByMode(4631.0, 5334.0, 5762.0),
    (64, "64 distinct"): ByMode(1847.0, None, 2062.0),
    (1, "one adapter"): ByMode(128.4, 148.0, 166.2),
}
LORA_TTFT_MS = {
    (2048, "base"): ByMode(51.6, 51.4),
    (2048, "adapter"): ByMode(95.6, 67.1),
    (128, "resident"): ByMode(14.9, 12.9),
    (128, "from host memory"): ByMode(22.9),
    (128, "from disk"): ByMode(99.9, 82.0),
}
# Requests a second: 500 adapters of rank 8, 1,000 requests of 512 in / 128 out; adapters beyond the
# slots wait in host memory, but where they come from disk.
MANY_SLOTS = 32
MANY_ADAPTERS = {
    "base only": 55.0,
    "one adapter": 34.0,
    "zipf s=1": 17.7,
    "zipf s=1, from disk": 15.0,
}
