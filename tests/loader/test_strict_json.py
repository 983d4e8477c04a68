"""The JSON reader takes what RFC 8259 defines and refuses what parsers disagree about."""

import json

import pytest

from milpy.errors import MilpyError
from milpy.strict_json import parse, read_object, show, show_names


class Refused(MilpyError):
    pass


def read(data, **options):
    options = {"max_depth": 8, **options}
    return parse(data, source="x.json", error=Refused, **options)


@pytest.mark.parametrize(
    "value",
    [None, True, 0, -7, 2**63, 1.5, -1e300, "", "ü \U0001f600 \n", [], {}, [1, [2.0, {"a": None}]]],
)
@pytest.mark.parametrize("ascii_only", [True, False])
def test_reads_what_json_writes(value, ascii_only):
    assert read(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


def test_integers_and_floats_stay_apart():
    assert [type(x) for x in read(b"[4, 4.0, 4e0]")] == [int, float, float]


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b'{"a": 1, "a": 1}', 'the key "a" twice'),
        (b'{"a": 1, "\\u0061": 2}', 'the key "a" twice'),
        (b'[{"b": {"c": 1, "c": 2}}]', 'the key "c" twice'),
        (b"[NaN]", "NaN"),
        (b"[Infinity]", "Infinity"),
        (b"[-Infinity]", "-Infinity"),
        (b"1e309", "1e309"),
        (b"-1e309", "-1e309"),
        (b"1" * 32, "32 digits"),
        (b"1" * 5000, "5000 digits"),
        (b'"\xff"', "not UTF-8: byte 1 is 0xff"),
        (b'"\xc0\x80"', "not UTF-8"),
        (b'"\xed\xa0\x80"', "not UTF-8"),
        (b'"\\ud800"', "lone surrogate"),
        (b'{"\\uDC00x": 1}', "lone surrogate"),
        (b'[{"a": "\\udc00\\ud800"}]', "lone surrogate"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        ("{}".encode("utf-16"), "not UTF-8"),
        ("{}".encode("utf-32-le"), "not JSON"),
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"{} {}", "not JSON"),
        (b'{"a": 1,}', "not JSON"),
        (b"[01]", "not JSON"),
        (b"[+1]", "not JSON"),
        (b"[.5]", "not JSON"),
        (b"{'a': 1}", "not JSON"),
        (b'"\t"', "not JSON"),
        (b'"\\x41"', "not JSON"),
        (b"\x0b1", "not JSON"),
        (b'"abc', "not JSON"),
        (b'"abc\\', "not JSON"),
    ],
)
def test_refuses_by_name(data, named):
    with pytest.raises(Refused, match="^x.json: ") as info:
        read(data)
    assert named in str(info.value)


def test_escaped_surrogate_pair_is_one_character():
    assert read(b'"\\ud83d\\ude00"') == "\U0001f600"


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'["[[[[", ', b'["\\"[[", '])
def test_depth_is_capped_exactly_and_brackets_in_strings_do_not_count(opening):
    closing = {b"[": b"]", b"{": b"}"}[opening[:1]]
    read(opening * 8 + b"0" + closing * 8)
    with pytest.raises(Refused, match="deeper than 8"):
        read(opening * 9 + b"0" + closing * 9)


@pytest.mark.parametrize("data", [b"[" * 1_000_000, b'{"a":' * 200_000, b"]" * 9 + b"[" * 100_000])
def test_deep_nesting_is_an_error_not_a_crash(data):
    with pytest.raises(Refused):
        read(data)


def test_scan_is_linear_in_unclosed_strings():
    # A quote that never closes, then escaped quotes: each could begin a scan to the end.
    with pytest.raises(Refused, match="not JSON"):
        read(b'["' + b'\\"' * 2_000_000)


@pytest.mark.parametrize("number", [b"4.0", b"4e0", b"-0", b"-1", b"18446744073709551616"])
def test_unsigned_only_has_no_float_and_no_sign(number):
    with pytest.raises(Refused, match="unsigned 64-bit"):
        read(number, unsigned_only=True)
    assert read(b"18446744073709551615", unsigned_only=True) == 2**64 - 1


def test_file_over_the_cap_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "big.json"
    path.write_bytes(b"{}" + b" " * 98)
    options = {"max_depth": 2, "error": Refused}
    assert read_object(path, max_bytes=100, **options) == {}
    with pytest.raises(Refused, match="is 100 bytes, expected at most 99"):
        read_object(path, max_bytes=99, **options)
    path.write_bytes(b"[]")
    with pytest.raises(Refused, match="is a list, expected an object"):
        read_object(path, max_bytes=99, **options)


def test_messages_stay_short_and_ascii():
    assert show("é" * 200) == '"' + "\\u00e9" * 12 + "\\u00..."
    assert len(show(list(range(10_000)))) == 80
    assert show_names("cabfde", 3) == '"a", "b", "c" and 3 more'
