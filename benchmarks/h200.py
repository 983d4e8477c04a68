"""What an H200 takes at least for a model's step, and what ours must reach there."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.markdown import Table
from benchmarks.shapes import Shape

READ_TBS, PEAK_TFLOPS = 4.55, 790.0
PROMPT, NEW, RANK = 1024, 256, 16  # of the peer's method

# ---- roofs ----


def decode_bytes(shape: Shape, n_seqs: int, n_adapters: int = 0) -> float:
    """What a step must read: weights, KV, and the adapters in use."""
    context = PROMPT + NEW / 2
    adapters = 2 * RANK * n_adapters * shape.lora_columns
    return shape.bytes_per_step + n_seqs * context * shape.kv_bytes_per_token + adapters


def decode_roof_ms(shape: Shape, n_seqs: int) -> float:
    return decode_bytes(shape, n_seqs) / READ_TBS / 1e9


def prompt_roof_ms(shape: Shape, length: int) -> float:
    """One prompt's products and attention, or its weights where that is more."""
    width = shape.heads * shape.head_dim
    products = 2.0 * length * shape.linear_weights + 2.0 * shape.head_weights
    attention = 2.0 * length * (length + 1) * width * shape.layers
    flops_ms = (products + attention) / PEAK_TFLOPS / 1e9
    return max(flops_ms, shape.bytes_per_step / READ_TBS / 1e9)


# ---- floors ----


@dataclass(frozen=True, slots=True)
class Floor:
    """What the first landing on a GPU has to reach, on an H200."""

    name: str
    bound: float
    is_least: bool
    vllm: str
    roof: str

    def is_met_by(self, value: float) -> bool:
        return value >= self.bound if self.is_least else value <= self.bound


FLOORS = {
    "decode 1": Floor("batch 1 decode, tok/s", 195.0, True, "203", "300"),
    "decode 64": Floor("batch 64 decode, tok/s", 7400.0, True, "8256", "11800"),
    "ttft 8192": Floor("TTFT of 8,192 tokens, ms", 270.0, False, "217", "-"),
    "base only": Floor("base only, 64 resident", 0.99, True, "0.999", "1"),
    "one adapter": Floor("one adapter for all", 0.85, True, "0.69-0.82", "0.997"),
    "64 distinct": Floor("64 distinct", 0.65, True, "0.22", "0.82"),
    "gap": Floor("host gap, batch 64, ms", 0.02, False, "0.26", "-"),
    "worst gap": Floor("the same at worst, ms", 0.05, False, "-", "-"),
    "start": Floor("start to first token, s", 5.0, False, "24-58", "-"),
    "capture": Floor("capture of all graphs, s", 2.0, False, "-", "-"),
}


def show_floors(found: dict[str, float]) -> int:
    """The table of what was measured; how many floors were missed."""
    table = Table("floors", "ours", "floor", "verdict", "vLLM 0.26", "bytes alone")
    n_missed = 0
    for key, floor in FLOORS.items():
        if key not in found:
            table.row(floor.name, "-", "", "not run", floor.vllm, floor.roof)
            continue
        is_met = floor.is_met_by(found[key])
        n_missed += not is_met
        bound = f"{'>=' if floor.is_least else '<='} {floor.bound:g}"
        table.row(
            floor.name,
            f"{found[key]:.0f}" if found[key] >= 1000 else f"{found[key]:.3g}",
            bound,
            "ok" if is_met else "MISSED",
            floor.vllm,
            floor.roof,
        )
    return n_missed
