"""Which scalars count as integers, numbers and flags, and what is said of the others."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from milpy.errors import RequestError
from milpy.scalars import check_flag, check_integer, check_real


class Unspeakable:
    def __repr__(self) -> str:
        raise RuntimeError("none of your business")


@pytest.mark.parametrize("value", [7, np.int64(7), np.uint8(7), np.array(7), np.array(7, "i2")])
def test_an_integer_of_any_kind_is_pythons(value: Any) -> None:
    found = check_integer("n", value, 0, 7)
    assert type(found) is int and found == 7


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (True, "True"),
        (np.True_, "True"),
        (np.array(True), "True"),
        (7.0, "7.0"),
        (np.float32(7), "7.0"),
        (float("nan"), "nan"),
        ("7", '"7"'),
        (None, "None"),
        (np.array([7]), r"array\(\[7\]\)"),
        (-1, "-1"),
        (np.int64(8), "8"),
        pytest.param(10**5000, "of type int", id="long"),
        (Unspeakable(), "of type Unspeakable"),
    ],
)
def test_what_is_no_integer_in_range_is_named(value: Any, shown: str) -> None:
    with pytest.raises(RequestError, match=rf"^n is {shown}, expected an integer in 0\.\.7$"):
        check_integer("n", value, 0, 7)


@pytest.mark.parametrize(
    "value",
    [
        2,
        2.0,
        Fraction(2),
        np.float16(2),
        np.float64(2),
        np.longdouble(2),
        np.int32(2),
        np.array(2.0),
        ml_dtypes.bfloat16(2),
    ],
)
def test_a_number_of_any_kind_is_a_float(value: Any) -> None:
    found = check_real("x", value, "a number")
    assert type(found) is float and found == 2


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (True, "True"),
        (np.False_, "False"),
        ("2", '"2"'),
        (None, "None"),
        (2j, "2j"),
        (np.complex64(2), r"\(2\+0j\)"),
        (np.array([2.0]), r"array\(\[2\.\]\)"),
        (10**400, r"10+\.\.\."),
    ],
)
def test_what_is_no_number_is_named(value: Any, shown: str) -> None:
    with pytest.raises(RequestError, match=f"^x is {shown}, expected a number$"):
        check_real("x", value, "a number")


def test_a_flag_is_true_or_false() -> None:
    assert check_flag("f", np.True_) is True and check_flag("f", False) is False
    for value in (1, 0, 1.0, "yes", None, np.int8(1), np.array([True])):
        with pytest.raises(RequestError, match="^f is .*, expected True or False$"):
            check_flag("f", value)
