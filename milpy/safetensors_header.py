"""The header of a safetensors file, read as strictly as the format's text says, and more.

A file is an 8-byte little-endian length N, N bytes of JSON, and a byte buffer. Nothing is accepted
that the reference implementation rejects. Refused besides: leading white space, padding other than
spaces, duplicate names (the reference keeps the last), positional or extra fields, sub-byte dtypes,
names that are empty, long or hold control characters. Tensors must tile the buffer: no hole, no
overlap, nothing after.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

from milpy.errors import MilpyError
from milpy.files import ByteFile
from milpy.strict_json import Json, is_integer, kind_of, parse_object, show

LIMIT_HEADER_BYTES = 100_000_000  # the format's own
MAX_HEADER_BYTES = 16 << 20  # milpy's default: 200,000 tensors fit
MAX_HEADER_DEPTH = 4
MAX_METADATA_BYTES = 64 << 10
MAX_NAME_BYTES = 512
MAX_RANK = 8
MAX_DIMENSION = 1 << 40

# The format's F4 and F6 types are left out: an element of theirs has no byte address.
ELEMENT_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "C64": 8,
    "F64": 8,
    "I64": 8,
    "U64": 8,
}

# What weights may be stored in.
WEIGHT_DTYPES = ("BF16", "F16", "F32")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file. `begin` and `end` are absolute byte offsets in that file."""

    name: str
    dtype: str  # as the format writes it; "BF16", "F16" or "F32" once checked as a weight
    shape: tuple[int, ...]
    file_index: int
    begin: int
    end: int


def read_header(
    file: ByteFile,
    *,
    error: type[MilpyError],
    file_index: int = 0,
    max_header_bytes: int = MAX_HEADER_BYTES,
) -> dict[str, TensorInfo]:
    """The tensors of an open file in order of their bytes, which tile it up to its end."""
    source = str(file.path)
    if file.size < 8:
        raise error(f"{source}: is {file.size} bytes, expected at least 8: no safetensors file")
    (n_header,) = struct.unpack("<Q", file.read_at(0, 8))
    limit = min(max_header_bytes, LIMIT_HEADER_BYTES)
    if n_header > limit:
        raise error(f"{source}: header length is {n_header}, expected at most {limit}")
    if n_header > file.size - 8:
        raise error(
            f"{source}: is {file.size} bytes, expected at least {n_header + 8}: "
            "truncated inside its header"
        )
    header = file.read_at(8, n_header)
    return parse_header(
        header,
        buffer_bytes=file.size - 8 - n_header,
        source=source,
        error=error,
        file_index=file_index,
    )


def parse_header(
    header: bytes,
    *,
    buffer_bytes: int,
    source: str,
    error: type[MilpyError],
    file_index: int = 0,
) -> dict[str, TensorInfo]:
    """As `read_header`, for the header's bytes and the length of the buffer behind it."""
    text = header.rstrip(b" ")
    if not (text.startswith(b"{") and text.endswith(b"}")):
        raise error(
            f"{source}: header is not one JSON object padded with spaces: "
            f"begins with {ascii(header[:8])}, ends with {ascii(header[-8:])}"
        )
    fields = parse_object(
        text,
        source=f"{source}: header",
        max_depth=MAX_HEADER_DEPTH,
        error=error,
        unsigned_only=True,
    )
    if "__metadata__" in fields:
        _check_metadata(fields.pop("__metadata__"), source, error)
    offset = 8 + len(header)
    tensors = [
        _read_tensor(name, entry, offset, file_index, source, error)
        for name, entry in fields.items()
    ]
    # A tensor of no bytes may share an offset; by (begin, end) it comes before its neighbour.
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.end))
    _check_tiling(tensors, offset, buffer_bytes, source, error)
    return {tensor.name: tensor for tensor in tensors}


def _check_metadata(metadata: Json, source: str, error: type[MilpyError]) -> None:
    if not isinstance(metadata, dict):
        raise error(f"{source}: __metadata__ is {kind_of(metadata)}, expected an object")
    n_bytes = 0
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise error(
                f"{source}: __metadata__ {show(key)} is {kind_of(value)}, expected a string"
            )
        n_bytes += len(key.encode()) + len(value.encode())
    if n_bytes > MAX_METADATA_BYTES:
        raise error(
            f"{source}: __metadata__ is {n_bytes} bytes, expected at most {MAX_METADATA_BYTES}"
        )


def _read_tensor(
    name: str,
    entry: Json,
    offset: int,
    file_index: int,
    source: str,
    error: type[MilpyError],
) -> TensorInfo:
    where = f"{source}: tensor {show(name)}"
    if not 1 <= len(name.encode()) <= MAX_NAME_BYTES or min(name) < " ":
        raise error(
            f"{where}: expected a name of 1..{MAX_NAME_BYTES} bytes without control characters"
        )
    if not isinstance(entry, dict):
        raise error(f"{where}: is {kind_of(entry)}, expected an object")
    if entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise error(
            f"{where}: has fields {show(sorted(entry))}, expected dtype, shape, data_offsets"
        )
    dtype = entry["dtype"]
    if not isinstance(dtype, str) or dtype not in ELEMENT_BYTES:
        raise error(f"{where}: dtype is {show(dtype)}, expected one of {', '.join(ELEMENT_BYTES)}")
    shape = _read_shape(entry, where, error)
    begin, end = _read_offsets(entry, where, error)
    expected = _shape_bytes(shape, ELEMENT_BYTES[dtype], where, error)
    if end - begin != expected:
        raise error(
            f"{where}: spans {end - begin} bytes, expected {expected} for {dtype} {list(shape)}"
        )
    return TensorInfo(name, dtype, shape, file_index, offset + begin, offset + end)


def _read_shape(entry: Mapping[str, Json], where: str, error: type[MilpyError]) -> tuple[int, ...]:
    value = entry["shape"]
    if not isinstance(value, list) or len(value) > MAX_RANK:
        raise error(f"{where}: shape is {show(value)}, expected a list of at most {MAX_RANK}")
    shape: list[int] = []
    for dimension in value:
        if not is_integer(dimension) or not 0 <= dimension <= MAX_DIMENSION:
            raise error(f"{where}: shape is {show(value)}, expected integers in 0..{MAX_DIMENSION}")
        shape.append(dimension)
    return tuple(shape)


def _read_offsets(
    entry: Mapping[str, Json], where: str, error: type[MilpyError]
) -> tuple[int, int]:
    value = entry["data_offsets"]
    expected = "two integers, begin <= end"
    if not isinstance(value, list) or len(value) != 2:
        raise error(f"{where}: data_offsets is {show(value)}, expected {expected}")
    begin, end = value
    if not is_integer(begin) or not is_integer(end) or not 0 <= begin <= end:
        raise error(f"{where}: data_offsets is {show(value)}, expected {expected}")
    return begin, end


def _shape_bytes(
    shape: tuple[int, ...], element_bytes: int, where: str, error: type[MilpyError]
) -> int:
    """Bytes of a shape. Zeros are multiplied last: readers that overflow before them must agree."""
    n_bytes = element_bytes
    for dimension in shape:
        n_bytes *= dimension or 1
    if n_bytes >= 1 << 64:
        raise error(f"{where}: shape is {list(shape)}, expected one whose bytes fit 64 bits")
    return 0 if 0 in shape else n_bytes


def _check_tiling(
    tensors: list[TensorInfo],
    offset: int,
    buffer_bytes: int,
    source: str,
    error: type[MilpyError],
) -> None:
    """Each tensor begins where the one before it ended, and the last ends with the file."""
    at = offset
    for tensor in tensors:
        if tensor.begin != at:
            kind = "a hole" if tensor.begin > at else "an overlap"
            raise error(
                f"{source}: tensor {show(tensor.name)} begins at byte {tensor.begin - offset} of "
                f"the buffer, expected {at - offset}: {kind}"
            )
        at = tensor.end
    if at - offset != buffer_bytes:
        kind = "truncated" if at - offset > buffer_bytes else "trailing bytes"
        raise error(
            f"{source}: buffer is {buffer_bytes} bytes, expected {at - offset} as its tensors "
            f"say: {kind}"
        )
