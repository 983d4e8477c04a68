"""What milpy raises. Each message says what was found and what was expected.

Every class is a MilpyError; most are also the built-in exception that a caller would expect, so
that `except ValueError` and `except MemoryError` work without importing milpy. The C core's status
codes are mapped to these in one table (csrc/python/convert.c).
"""

from __future__ import annotations


class MilpyError(Exception):
    """Base of every error that milpy raises on purpose."""


class ConfigError(MilpyError, ValueError):
    """config.json or generation_config.json is not one that milpy can honour, or not with these
    options: several ranks on a GPU, say."""


class CheckpointError(MilpyError, ValueError):
    """A weights file is missing, malformed, or not of the model its config describes."""


class AdapterError(MilpyError, ValueError):
    """An adapter folder that would not apply exactly as its author meant."""


class TokenizerError(MilpyError, ValueError):
    """A tokenizer or chat template is missing, malformed, or not for the model beside it."""


class HubError(MilpyError):
    """A model or adapter is neither a local folder nor to be had from the Hugging Face Hub."""


class RequestError(MilpyError, ValueError):
    """An option, prompt, parameter, array or name that milpy does not take."""


class EngineError(MilpyError, RuntimeError):
    """The engine failed or is closed; the request that saw this was not to blame."""


class AnswerError(MilpyError, RuntimeError):
    """One answer could not go on, its logits not being finite, say. The engine and others do."""


class OutOfMemoryError(MilpyError, MemoryError):
    """An allocation failed, or a memory budget is too small for what was asked."""
