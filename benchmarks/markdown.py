"""Tables of figures, as results/ keeps them."""

from __future__ import annotations


class Table:
    """Markdown, for results/, printed line by line; the first column holds the names."""

    def __init__(self, title: str, *columns: str) -> None:
        print()
        self.row(title, *columns)
        print("| --- " * (1 + len(columns)) + "|")

    def row(self, name: str, *cells: str) -> None:
        print(f"| {name:28} |" + "".join(f" {cell:>11} |" for cell in cells), flush=True)


def number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def ratio(over: float | None, under: float | None) -> float | None:
    return None if over is None or under is None else over / under
