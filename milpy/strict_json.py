"""JSON from files nobody vouches for: one reader, as strict as RFC 8259 lets a reader be.

Refused: duplicate keys (after unescaping), nesting or size over the caller's cap, NaN, Infinity and
numbers that overflow to it, invalid UTF-8, lone surrogates, a byte order mark. An integer stays an
integer and a float a float, so that a caller who wants an integer can refuse 4.0. Fields are then
taken by name and type through `Fields`, whose messages name file, key, found and expected.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import NoReturn, TypeAlias, TypeGuard

from milpy.errors import MilpyError
from milpy.files import read_whole

Json: TypeAlias = "None | bool | int | float | str | list[Json] | dict[str, Json]"

# Neither repeats a group, so that time is linear and memory flat whatever the input. A string that
# never closes ends with the text; refusing it is left to the parser.
_ESCAPE = re.compile(rb"\\.", re.DOTALL)
_STRING = re.compile(rb'"[^"]*"?')
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[{]}"))
_STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

# Any 64-bit integer, and the 31 digits of int(1e30), which transformers writes into every
# tokenizer_config.json as model_max_length; Python's own int() is quadratic in the digits.
_MAX_INT_DIGITS = 31


def show(value: object, limit: int = 80) -> str:
    """`value` for a message: as JSON would write it, ASCII only, cut to `limit` characters."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return show_python(value, limit)
    return _cut(text, limit)


def show_python(value: object, limit: int = 80) -> str:
    """As `show`, but as Python would write it."""
    try:
        text = ascii(value)
    except Exception:  # an int of thousands of digits, or a __repr__ that fails: the caller's
        text = f"of type {type(value).__name__}"
    return _cut(text, limit)


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def show_names(names: Iterable[str], limit: int = 5) -> str:
    """The first few names, sorted, and how many more there are."""
    ordered = sorted(names)
    shown = ", ".join(show(name) for name in ordered[:limit])
    more = len(ordered) - limit
    return shown if more <= 0 else f"{shown} and {more} more"


def parse(
    data: bytes,
    *,
    source: str,
    max_depth: int,
    error: type[MilpyError],
    unsigned_only: bool = False,
) -> Json:
    """The value of one JSON text. `source` begins every message.

    With `unsigned_only` any number that is not plain digits of a u64 (4.0, 4e0, -0, -1) is refused.
    """

    def fail(found: str) -> NoReturn:
        raise error(f"{source}: {found}")

    def integer(digits: str) -> int:
        if len(digits) > _MAX_INT_DIGITS:
            fail(f"has a number of {len(digits)} digits, expected at most {_MAX_INT_DIGITS}")
        value = int(digits)
        if unsigned_only and (digits[0] == "-" or value >= 1 << 64):
            fail(f"has the number {digits}, expected an unsigned 64-bit integer")
        return value

    def real(digits: str) -> float:
        if unsigned_only:
            fail(f"has the number {digits[:32]}, expected an unsigned 64-bit integer")
        value = float(digits)
        if not math.isfinite(value):
            fail(f"has the number {digits[:32]}, expected one that is finite in 64 bits")
        return value

    def constant(name: str) -> NoReturn:
        fail(f"has {name}, expected a finite number")

    def pairs(items: list[tuple[str, Json]]) -> dict[str, Json]:
        result = dict(items)
        if len(result) != len(items):
            again = Counter(key for key, _ in items).most_common(1)[0][0]
            fail(f"has the key {show(again)} twice in one object")
        return result

    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as problem:
        fail(f"is not UTF-8: byte {problem.start} is 0x{data[problem.start]:02x}")
    _check_depth(data, source, max_depth, error)
    try:
        value: Json = json.loads(
            text,
            parse_int=integer,
            parse_float=real,
            parse_constant=constant,
            object_pairs_hook=pairs,
        )
    except json.JSONDecodeError as problem:
        message = f"{source}: is not JSON: {problem.msg} at character {problem.pos}"
        raise error(message) from problem
    if _ESCAPED_SURROGATE.search(data):
        _check_surrogates(value, source, error)
    return value


def parse_object(
    data: bytes,
    *,
    source: str,
    max_depth: int,
    error: type[MilpyError],
    unsigned_only: bool = False,
) -> dict[str, Json]:
    """As `parse`, and the value must be an object."""
    value = parse(
        data, source=source, max_depth=max_depth, error=error, unsigned_only=unsigned_only
    )
    if not isinstance(value, dict):
        raise error(f"{source}: is {kind_of(value)}, expected an object")
    return value


def read_object(
    path: Path, *, max_bytes: int, max_depth: int, error: type[MilpyError]
) -> dict[str, Json]:
    """The object in a file of at most `max_bytes`."""
    data = read_whole(path, max_bytes, error)
    return parse_object(data, source=str(path), max_depth=max_depth, error=error)


def kind_of(value: object) -> str:
    """The value's JSON type for a message: a string, an integer, null."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    kinds = {
        int: "an integer",
        float: "a number with a fraction",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return kinds.get(type(value), type(value).__name__)


def is_integer(value: Json) -> TypeGuard[int]:
    """Whether JSON wrote an integer: neither true nor 4.0."""
    return type(value) is int


def is_number(value: Json) -> TypeGuard[int | float]:
    return type(value) in (int, float)


def _check_depth(data: bytes, source: str, max_depth: int, error: type[MilpyError]) -> None:
    """Count brackets outside strings before the parser recurses over them.

    Up to the first byte that is not JSON, where the parser stops, the count is exact.
    """
    brackets = _STRING.sub(b"", _ESCAPE.sub(b"", data)).translate(None, _NOT_BRACKETS)
    if max(accumulate(map(_STEPS.__getitem__, brackets)), default=0) > max_depth:
        raise error(f"{source}: is nested deeper than {max_depth} levels")


def _check_surrogates(value: Json, source: str, error: type[MilpyError]) -> None:
    """No string may hold half of a surrogate pair: it has no UTF-8. Depth is already capped."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as problem:
            raise error(f"{source}: has a lone surrogate in {show(value)}") from problem
    elif isinstance(value, list):
        for item in value:
            _check_surrogates(item, source, error)
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_surrogates(key, source, error)
            _check_surrogates(item, source, error)


class Fields:
    """One JSON object, read field by field; each method checks one type and one range.

    A key is required by the methods that take it; `has` tells beforehand whether it is there, and
    null counts as absent. `taken` grows with every key asked for, so that the rest can be named.
    """

    __slots__ = ("_error", "source", "taken", "values")

    def __init__(self, values: Mapping[str, Json], source: str, error: type[MilpyError]) -> None:
        self.values = values
        self.taken: set[str] = set()
        self.source = source
        self._error = error

    def fail(self, key: str, expected: str) -> NoReturn:
        """Refuse the value of `key`."""
        found = show(self.values[key]) if key in self.values else "absent"
        raise self._error(f"{self.source}: {key} is {found}, expected {expected}")

    def raw(self, key: str) -> Json:
        """The value as it is; None when absent."""
        self.taken.add(key)
        return self.values.get(key)

    def has(self, key: str) -> bool:
        return self.raw(key) is not None

    def left_over(self, known: Collection[str] = ()) -> list[str]:
        """Keys never asked for and not in `known`, in the file's order."""
        return [key for key in self.values if key not in self.taken and key not in known]

    def integer(self, key: str, low: int, high: int) -> int:
        """An integer in low..high; true and 4.0 are not integers."""
        value = self.raw(key)
        if not is_integer(value) or not low <= value <= high:
            self.fail(key, f"an integer in {low}..{high}")
        return value

    def number(self, key: str, low: float, high: float) -> float:
        """An integer or a float in low..high."""
        value = self.raw(key)
        # Compared before the conversion, since float() of a long integer may raise.
        if not is_number(value) or not low <= value <= high:
            self.fail(key, f"a number in {low:g}..{high:g}")
        return float(value)

    def boolean(self, key: str) -> bool:
        value = self.raw(key)
        if not isinstance(value, bool):
            self.fail(key, "true or false")
        return value

    def string(self, key: str, choices: Collection[str] | None = None) -> str:
        """A string, one of `choices` if given."""
        value = self.raw(key)
        if not isinstance(value, str):
            self.fail(key, "a string")
        if choices is not None and value not in choices:
            self.fail(key, "one of " + ", ".join(map(show, choices)))
        return value

    def object(self, key: str) -> dict[str, Json]:
        value = self.raw(key)
        if not isinstance(value, dict):
            self.fail(key, "an object")
        return value
