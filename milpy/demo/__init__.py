"""The demo model: where its files lie, its prompt frame, its held-out requests.

A small Llama that answers questions about small tables in plain English, and three adapters of it
that answer the same questions as SQL, as JSON and in French. docs/demo.md says how it was made.
Standard library only: nothing here loads a model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypedDict

FOLDER = Path(__file__).parent
BASE = FOLDER / "base"
ADAPTERS = {name: FOLDER / "adapters" / name for name in ("sql", "json", "french")}
VOICES = ("base", *ADAPTERS)
REQUESTS = FOLDER / "requests.json"

USER, ASSISTANT, END = "<|user|>", "<|assistant|>", "<|end|>"


class DemoRequest(TypedDict):
    """A held-out request: no training text held its question in any words."""

    id: str
    kind: str
    text: str
    answers: dict[str, str]  # voice -> the one right answer


def format_request(text: str) -> str:
    """The prompt for one request, as the chat template makes it, without the BOS that the tokenizer
    adds. The model closes its answer with `END`."""
    return f"{USER}{text}{END}{ASSISTANT}"


def requests() -> list[DemoRequest]:
    """The held-out requests with their right answers, kinds in turn."""
    with REQUESTS.open(encoding="utf-8") as file:
        found: list[DemoRequest] = json.load(file)["requests"]
    return found
