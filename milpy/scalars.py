"""Scalars that a caller gives: which count, the error for those that do not, and how it shows them.

NumPy's scalars, and its arrays without dimensions, stand for the value that they hold. True is no
number here, and 1 is no flag: either is more often a mistake than meant. Limits are tested as `not
low <= x` rather than `x < low`, so that NaN passes none of them.
"""

from __future__ import annotations

import operator
from numbers import Real
from typing import NoReturn

import numpy as np

from milpy.errors import RequestError
from milpy.strict_json import show, show_python

MAX_INT32 = (1 << 31) - 1
MAX_UINT64 = (1 << 64) - 1

_NUMPYS = (np.generic, np.ndarray)


def show_argument(value: object) -> str:
    """`value` for a message: as Python would write it, a string in double quotes as the core does.
    What files hold is strict_json's to show."""
    value = _plain(value)
    return show(value) if isinstance(value, str) else show_python(value)


def kind_of_argument(value: object) -> str:
    """Its type for a message: a string, a dict, None."""
    if value is None or isinstance(value, bool):
        return repr(value)
    kinds = {int: "an integer", float: "a float", str: "a string", list: "a list", dict: "a dict"}
    return kinds.get(type(value), type(value).__name__)


def refuse(name: str, value: object, expected: str) -> NoReturn:
    raise RequestError(f"{name} is {show_argument(value)}, expected {expected}")


def check_integer(name: str, value: object, low: int, high: int) -> int:
    """`value` as an int where it is one in low..high; True and 4.0 are not."""
    expected = f"an integer in {low}..{high}"
    value = _plain(value)
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        refuse(name, value, expected)
    try:
        number = operator.index(value)
    except TypeError:  # an array's, which has the method and no one value
        refuse(name, value, expected)
    if not low <= number <= high:
        refuse(name, number, expected)
    return number


def check_real(name: str, value: object, expected: str) -> float:
    """`value` as a float where it is a number, NaN and infinity among them."""
    if type(value) is float:  # nearly always, and an op's call takes a few microseconds
        return value
    value = _plain(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        refuse(name, value, expected)
    try:
        return float(value)
    except OverflowError:
        refuse(name, value, expected)


def check_flag(name: str, value: object) -> bool:
    value = _plain(value)
    if not isinstance(value, bool):
        refuse(name, value, "True or False")
    return value


def _plain(value: object) -> object:
    return value.item() if isinstance(value, _NUMPYS) and value.ndim == 0 else value
