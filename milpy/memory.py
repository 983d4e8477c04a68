"""What a device's memory went to: rows that sum up to all of it."""

from __future__ import annotations

from dataclasses import dataclass

_UNITS = ("KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """Bytes of the memory where a model lies, over all ranks, at one moment.

    graph_bytes was measured when the engine was made: CUDA graphs, kernels, libraries with their
    workspace, and the driver's rounding. other_bytes is all that is not this engine's: the CUDA
    context, other engines, other processes. On the CPU total_bytes is what this process may use,
    and what is promised to a row is not free, touched or not. pinned_bytes, in no sum, is host
    memory that a GPU reads and writes in place.
    """

    device: str
    weight_bytes: int
    kv_bytes: int
    adapter_bytes: int
    workspace_bytes: int
    graph_bytes: int
    other_bytes: int
    free_bytes: int
    total_bytes: int
    pinned_bytes: int

    def rows(self) -> list[tuple[str, int]]:
        """Name and bytes of each row; together they are total_bytes."""
        return [
            ("weights", self.weight_bytes),
            ("KV pages", self.kv_bytes),
            ("adapters", self.adapter_bytes),
            ("workspace", self.workspace_bytes),
            ("graphs and libraries", self.graph_bytes),
            ("other", self.other_bytes),
            ("free", self.free_bytes),
        ]

    def line(self) -> str:
        """The rows that hold something, on one line."""
        rows = ", ".join(f"{name} {show_bytes(n)}" for name, n in self.rows() if n > 0)
        return f"memory of {self.device}, {show_bytes(self.total_bytes)}: {rows}"

    def __str__(self) -> str:
        """A table of the rows and their shares, with the total below."""
        rows = [*self.rows(), (f"total of {self.device}", self.total_bytes)]
        return "\n".join(
            f"{name:<22} {show_bytes(n):>12} {n / max(self.total_bytes, 1):7.1%}"
            for name, n in rows
        )


def show_bytes(n: int) -> str:
    """n for people: "640 bytes", "1.50 MiB"."""
    if n < 1024:
        return f"{n} bytes"
    value = n / 1024
    unit = 0
    while value >= 1023.995 and unit < len(_UNITS) - 1:  # 1023.995 would be shown as 1024.00
        value /= 1024
        unit += 1
    return f"{value:.2f} {_UNITS[unit]}"
