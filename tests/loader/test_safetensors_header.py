"""The safetensors header: one case for each rule, and never more than the reference accepts."""

import json
import os
import struct

import numpy as np
import pytest
from helpers.safetensors_file import file_bytes, layout

from milpy.errors import MilpyError
from milpy.files import ByteFile
from milpy.safetensors_header import ELEMENT_BYTES, TensorInfo, read_header


class Refused(MilpyError):
    pass


def read(tmp_path, data, **options):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with ByteFile(path, Refused) as file:
        return read_header(file, error=Refused, **options)


def entry(begin, end, *, dtype="U8", shape=None):
    return {
        "dtype": dtype,
        "shape": [end - begin] if shape is None else shape,
        "data_offsets": [begin, end],
    }


def one(**fields):
    """A file of one tensor "a" of 4 bytes, with some fields changed."""
    return tiled(4, {"a": entry(0, 4) | fields})


def tiled(n_bytes, entries):
    """A file with this header and a buffer of `n_bytes`."""
    return file_bytes(entries, b"\0" * n_bytes)


def raw(header, data=b""):
    return file_bytes(header.encode() if isinstance(header, str) else header, data)


def numbers(shape, offsets="[0,4]"):
    return raw(f'{{"a":{{"dtype":"U8","shape":{shape},"data_offsets":{offsets}}}}}', b"\0" * 4)


EMPTY = {"dtype": "F32", "shape": [0, 3], "data_offsets": [4, 4]}
GOOD_ENTRY = json.dumps(entry(0, 4))

ACCEPTED = {
    "one tensor": one(),
    "no tensors": raw("{}"),
    "scalar": one(dtype="F32", shape=[]),
    "rank 8": one(shape=[1] * 7 + [4]),
    "spaces behind": raw("{}" + " " * 13),
    "white space inside": raw('{ "a" :\n\t' + GOOD_ENTRY + "\r}", b"\0" * 4),
    "metadata": tiled(4, {"__metadata__": {"format": "pt", "": "é"}, "a": entry(0, 4)}),
    "empty metadata": raw('{"__metadata__":{}}'),
    "name of 512 bytes": tiled(4, {"a" * 512: entry(0, 4)}),
    "name beyond ASCII": tiled(4, {"é\U0001f600": entry(0, 4)}),
    "any order": tiled(8, {"b": entry(4, 8), "a": entry(0, 4)}),
    "empty tensors share an offset": file_bytes(
        {"a": entry(0, 4), "e": EMPTY, "b": entry(4, 8), "f": EMPTY}, b"\0" * 8
    ),
    "unaligned": tiled(5, {"a": entry(0, 1), "b": entry(1, 5, dtype="F32", shape=[1])}),
    "zero beside large": one(shape=[0, 1 << 40], data_offsets=[0, 0])[:-4],
}  # fmt: skip

# Bytes, and what the message must say.
REFUSED = {
    "nothing": (b"", "at least 8"),
    "seven bytes": (b"\0" * 7, "at least 8"),
    "length beyond file": (struct.pack("<Q", 3) + b"{}", "truncated inside its header"),
    "length 2^63": (struct.pack("<Q", 1 << 63) + b"{}", "expected at most"),
    "length 2^64-1": (struct.pack("<Q", (1 << 64) - 1) + b"{}", "expected at most"),
    "length 0": (struct.pack("<Q", 0), "not one JSON object"),
    "leading space": (raw(" {}"), "not one JSON object"),
    "leading newline": (raw("\n{}"), "not one JSON object"),
    "newline behind": (raw("{}\n"), "not one JSON object"),
    "NUL behind": (raw("{}\0\0"), "not one JSON object"),
    "list": (raw("[]"), "not one JSON object"),
    "null": (raw("null"), "not one JSON object"),
    "two objects": (raw("{}{}"), "not JSON"),
    "not UTF-8": (raw(b'{"\xff":1}'), "not UTF-8"),
    "lone surrogate": (raw('{"\\ud800":' + GOOD_ENTRY + "}", b"\0" * 4), "surrogate"),
    "same name twice": (raw(f'{{"a":{GOOD_ENTRY},"a":{GOOD_ENTRY}}}', b"\0" * 4), "twice"),
    "same name, escaped": (raw(f'{{"a":{GOOD_ENTRY},"\\u0061":{GOOD_ENTRY}}}', b"\0" * 4), "twice"),
    "metadata twice": (raw('{"__metadata__":{},"__metadata__":{}}'), "twice"),
    "metadata key twice": (raw('{"__metadata__":{"a":"1","a":"2"}}'), "twice"),
    "field twice": (numbers('[4],"dtype":"U8"'), "twice"),
    "metadata null": (raw('{"__metadata__":null}'), "__metadata__ is null"),
    "metadata list": (raw('{"__metadata__":[]}'), "__metadata__ is a list"),
    "metadata number": (raw('{"__metadata__":{"a":1}}'), "is an integer, expected a string"),
    "metadata nested": (raw('{"__metadata__":{"a":{}}}'), "is an object, expected a string"),
    "metadata too big": (file_bytes({"__metadata__": {"a": "b" * 65536}}), "65537 bytes"),
    "entry as a list": (raw('{"a":["U8",[4],[0,4]]}', b"\0" * 4), "is a list, expected an object"),
    "entry null": (raw('{"a":null}'), "is null, expected an object"),
    "no dtype": (raw('{"a":{"shape":[4],"data_offsets":[0,4]}}', b"\0" * 4), "has fields"),
    "extra field": (one(strides=[1]), "has fields"),
    "empty name": (tiled(4, {"": entry(0, 4)}), "1..512 bytes"),
    "name of 513 bytes": (tiled(4, {"é" * 256 + "a": entry(0, 4)}), "1..512 bytes"),
    "NUL in name": (tiled(4, {"a\0b": entry(0, 4)}), "control characters"),
    "newline in name": (tiled(4, {"a\nb": entry(0, 4)}), "control characters"),
    "dtype lower case": (one(dtype="u8"), 'dtype is "u8"'),
    "dtype unknown": (one(dtype="F128"), 'dtype is "F128"'),
    "dtype number": (one(dtype=8), "dtype is 8"),
    "dtype F4": (one(dtype="F4", shape=[8]), 'dtype is "F4"'),
    "dtype F6": (one(dtype="F6_E2M3", shape=[4], data_offsets=[0, 3])[:-1], 'dtype is "F6_E2M3"'),
    "shape null": (one(shape=None), "shape is null"),
    "shape a number": (one(shape=4), "shape is 4"),
    "shape of rank 9": (one(shape=[1] * 8 + [4]), "at most 8"),
    "shape true": (one(shape=[4, True]), "expected integers"),
    "shape string": (one(shape=["4"]), "expected integers"),
    "shape 4.0": (numbers("[4.0]"), "4.0, expected an unsigned"),
    "shape 4e0": (numbers("[4e0]"), "4e0, expected an unsigned"),
    "shape 04": (numbers("[04]"), "not JSON"),
    "shape -0": (numbers("[4,-0]", "[0,0]"), "-0, expected an unsigned"),
    "shape -4": (numbers("[-4]"), "-4, expected an unsigned"),
    "shape over u64": (numbers("[18446744073709551616]"), "unsigned"),
    "shape of 400 digits": (numbers("[" + "9" * 400 + "]"), "400 digits"),
    "shape NaN": (numbers("[NaN]"), "NaN"),
    "dimension over 2^40": (one(shape=[0, (1 << 40) + 1], data_offsets=[0, 0])[:-4], "0..1099"),
    "product overflows": (one(shape=[1 << 40, 1 << 40]), "fit 64 bits"),
    "product overflows to 0": (one(shape=[1 << 32, 1 << 32], data_offsets=[0, 0])[:-4], "fit 64"),
    "zero, then overflow": (one(shape=[0, 1 << 40, 1 << 40], data_offsets=[0, 0])[:-4], "fit 64"),
    "overflow, then zero": (one(shape=[1 << 40, 1 << 40, 0], data_offsets=[0, 0])[:-4], "fit 64"),
    "offsets reversed": (one(data_offsets=[4, 0]), "begin <= end"),
    "one offset": (one(data_offsets=[4]), "two integers"),
    "three offsets": (one(data_offsets=[0, 4, 4]), "two integers"),
    "offset null": (one(data_offsets=[None, 4]), "two integers"),
    "size too small": (one(shape=[5]), "spans 4 bytes, expected 5"),
    "size too large": (one(shape=[3]), "spans 4 bytes, expected 3"),
    "size in elements": (one(dtype="F32", shape=[4]), "spans 4 bytes, expected 16"),
    "hole at the front": (tiled(5, {"a": entry(1, 5)}), "a hole"),
    "hole between": (tiled(4, {"a": entry(0, 2), "b": entry(3, 4)}), "a hole"),
    "overlap": (tiled(4, {"a": entry(0, 3), "b": entry(2, 4)}), "an overlap"),
    "alias": (tiled(4, {"a": entry(0, 4), "b": entry(0, 4)}), "an overlap"),
    "empty tensor inside another": (
        tiled(4, {"a": entry(0, 4), "e": EMPTY | {"data_offsets": [2, 2]}}), "an overlap"
    ),
    "trailing byte": (one() + b"\0", "trailing bytes"),
    "truncated": (one()[:-1], "truncated"),
    "no buffer": (one()[:-4], "truncated"),
    "buffer without tensors": (raw("{}", b"\0"), "trailing bytes"),
    "offsets near 2^64": (tiled(4, {"a": entry(0, 4), "b": entry(2**64 - 2, 2**64 - 1)}), "a hole"),
    "terabytes": (tiled(0, {"a": entry(0, 1 << 40), "b": entry(1 << 40, 1 << 41)}), "truncated"),
    "depth 5": (raw('{"a":{"shape":[[[[4]]]]}}'), "deeper than 4"),
    "depth 100,000": (raw('{"a":' * 100_000), "not one JSON object"),
    "depth 100,000, closed": (raw("{" + "[" * 100_000 + "}"), "deeper than 4"),
}  # fmt: skip


@pytest.mark.parametrize("case", ACCEPTED)
def test_accepts(tmp_path, case):
    data = ACCEPTED[case]
    (n_header,) = struct.unpack("<Q", data[:8])
    at = 8 + n_header
    for tensor in read(tmp_path, data).values():
        assert tensor.begin == at
        at = tensor.end
    assert at == len(data)


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(tmp_path, case):
    data, named = REFUSED[case]
    with pytest.raises(Refused, match=r"x\.safetensors: ") as info:
        read(tmp_path, data)
    assert named in str(info.value)
    assert len(str(info.value)) < 500 + len(str(tmp_path))


def test_offsets_are_absolute(tmp_path):
    data = file_bytes({"b": entry(3, 4), "a": entry(0, 3)}, b"abcd")
    tensors = read(tmp_path, data, file_index=7)
    base = len(data) - 4
    assert list(tensors.values()) == [
        TensorInfo("a", "U8", (3,), 7, base, base + 3),
        TensorInfo("b", "U8", (1,), 7, base + 3, base + 4),
    ]
    assert data[tensors["a"].begin : tensors["a"].end] == b"abc"


@pytest.mark.parametrize("dtype", ELEMENT_BYTES)
def test_every_whole_byte_dtype_has_its_size(tmp_path, dtype):
    n_bytes = 6 * ELEMENT_BYTES[dtype]
    good = {"a": entry(0, n_bytes, dtype=dtype, shape=[2, 3])}
    assert read(tmp_path, file_bytes(good, b"\0" * n_bytes))["a"].dtype == dtype


def test_header_limit_can_be_raised_but_not_past_the_format(tmp_path):
    data = raw("{" + " " * 98 + "}")
    with pytest.raises(Refused, match="header length is 100, expected at most 99"):
        read(tmp_path, data, max_header_bytes=99)
    assert read(tmp_path, data, max_header_bytes=100) == {}
    data = struct.pack("<Q", 100_000_001)
    with pytest.raises(Refused, match="expected at most 100000000"):
        read(tmp_path, data, max_header_bytes=1 << 62)


def test_default_header_limit_is_16_mib(tmp_path):
    limit = 16 << 20
    assert read(tmp_path, raw("{}" + " " * (limit - 2))) == {}
    with pytest.raises(Refused, match=f"header length is {limit + 1}"):
        read(tmp_path, raw("{}" + " " * (limit - 1)))


def test_only_regular_files_are_opened(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (fifo, tmp_path, "/dev/zero"):
        with pytest.raises(Refused, match="not a regular file"):
            ByteFile(path, Refused)
    with pytest.raises(Refused, match="cannot be opened: No such file"):
        ByteFile(tmp_path / "none", Refused)
    with pytest.raises(Refused, match="cannot be opened"):
        ByteFile("a\0b", Refused)


def test_a_file_cut_while_open_is_a_named_error(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(one())
    with ByteFile(path, Refused) as file:
        os.truncate(path, 10)
        with pytest.raises(Refused, match="cut while being read"):
            read_header(file, error=Refused)


def test_refused_files_leave_no_descriptor_open(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    for data, _ in REFUSED.values():
        with pytest.raises(Refused):
            read(tmp_path, data)
    with pytest.raises(Refused):
        ByteFile(tmp_path, Refused)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.ref
def test_reference_accepts_all_that_we_accept(tmp_path):
    import safetensors  # noqa: PLC0415

    for case, data in ACCEPTED.items():
        theirs = dict(safetensors.deserialize(data))
        ours = read(tmp_path, data)
        assert ours.keys() == theirs.keys(), case
        for name, tensor in ours.items():
            assert theirs[name]["dtype"] == tensor.dtype
            assert tuple(theirs[name]["shape"]) == tensor.shape
            assert bytes(theirs[name]["data"]) == data[tensor.begin : tensor.end]


@pytest.mark.ref
def test_reads_what_the_reference_writes(tmp_path):
    from safetensors.numpy import save  # noqa: PLC0415

    rng = np.random.default_rng(0)
    arrays = {
        f"t{index}": rng.standard_normal(shape).astype(dtype)
        for index, (shape, dtype) in enumerate(
            [((3, 5), "f4"), ((7,), "f2"), ((), "f8"), ((0, 4), "f4"), ((2, 2, 2), "i1")]
        )
    }
    data = save(arrays, metadata={"format": "np"})
    for name, tensor in read(tmp_path, data).items():
        assert tensor.shape == arrays[name].shape
        assert data[tensor.begin : tensor.end] == arrays[name].tobytes()
    # And the tests' own writer is read by the reference.
    header, buffer = layout({"x": arrays["t0"]})
    theirs = dict(safetensors_deserialize(file_bytes(header, buffer)))
    assert bytes(theirs["x"]["data"]) == arrays["t0"].tobytes()


def safetensors_deserialize(data):
    import safetensors  # noqa: PLC0415

    return safetensors.deserialize(data)
