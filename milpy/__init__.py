"""milpy: one large language model and many of its LoRA adapters, in one batch.

Importing this loads nothing heavy: the names below are fetched when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from milpy import errors, ops
    from milpy.engine import AsyncEngine
    from milpy.llm import LLM
    from milpy.outputs import CompletionOutput, Logprob, LoRARequest, RequestOutput
    from milpy.sampling import SamplingParams

# pyproject.toml reads it from here, without importing.
__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncEngine",
    "CompletionOutput",
    "LoRARequest",
    "Logprob",
    "RequestOutput",
    "SamplingParams",
    "__version__",
    "errors",
    "ops",
]

_HOMES = {
    "LLM": "milpy.llm",
    "AsyncEngine": "milpy.engine",
    "CompletionOutput": "milpy.outputs",
    "LoRARequest": "milpy.outputs",
    "Logprob": "milpy.outputs",
    "RequestOutput": "milpy.outputs",
    "SamplingParams": "milpy.sampling",
}


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name in ("errors", "ops"):  # the module itself; importing it sets the attribute
        return import_module(f"milpy.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'milpy' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
