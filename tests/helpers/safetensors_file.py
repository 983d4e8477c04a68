"""Writes safetensors files by hand, for tests: valid ones from arrays, and any bytes one likes.

Nothing here is shared with milpy's reader, so that a mistake in one cannot hide in the other.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# bf16 has no NumPy dtype; its bits travel as uint16, and milpy's tests never need a real U16.
_NAMES = {
    np.dtype(np.uint16): "BF16",
    np.dtype(np.float16): "F16",
    np.dtype(np.float32): "F32",
    np.dtype(np.float64): "F64",
    np.dtype(np.int8): "I8",
    np.dtype(np.uint8): "U8",
    np.dtype(np.int64): "I64",
}


def bf16_bits(values: Array) -> NDArray[np.uint16]:
    """float32 values to bf16 bits, rounded to nearest even. NaN stays NaN."""
    x = np.ascontiguousarray(values, dtype=np.float32)
    bits = x.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def bf16_floats(bits: Array) -> NDArray[np.float32]:
    """bf16 bits (uint16) to float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def store(values: Array, dtype: str) -> Array:
    """float values as they are stored: "BF16" gives uint16 bits, "F16" and "F32" floats."""
    if dtype == "BF16":
        return bf16_bits(values)
    return np.ascontiguousarray(values, dtype={"F16": np.float16, "F32": np.float32}[dtype])


def stored_floats(stored: Array) -> NDArray[np.float32]:
    """What `store` kept, as float32."""
    if stored.dtype == np.uint16:
        return bf16_floats(stored)
    return stored.astype(np.float32)


def layout(tensors: Mapping[str, Array]) -> tuple[dict[str, Any], bytes]:
    """The header object and the byte buffer of a valid file, in the mapping's order."""
    header: dict[str, Any] = {}
    parts: list[bytes] = []
    begin = 0
    for name, array in tensors.items():
        data = np.ascontiguousarray(array).tobytes()
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [begin, begin + len(data)],
        }
        parts.append(data)
        begin += len(data)
    return header, b"".join(parts)


def file_bytes(header: bytes | Mapping[str, Any], data: bytes = b"", *, pad: bool = True) -> bytes:
    """Length, header, buffer. A mapping is dumped; bytes are taken as they are, never padded."""
    if not isinstance(header, bytes):
        header = json.dumps(header, separators=(",", ":")).encode()
        if pad:
            header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + data


def write_safetensors(
    path: Path, tensors: Mapping[str, Array], *, metadata: Mapping[str, str] | None = None
) -> None:
    """A valid file. uint16 arrays are written as BF16."""
    header, data = layout(tensors)
    if metadata is not None:
        header = {"__metadata__": dict(metadata), **header}
    path.write_bytes(file_bytes(header, data))
