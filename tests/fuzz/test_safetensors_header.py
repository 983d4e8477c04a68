"""Mutated safetensors files: a named error or a sound result, never more than the reference takes.

Seeded, so that a failure repeats. MILPY_FUZZ_CASES runs more of them.
"""

import json
import os
import random
import struct
from pathlib import Path

import pytest
from helpers.safetensors_file import file_bytes

from milpy.errors import CheckpointError
from milpy.safetensors_header import ELEMENT_BYTES, read_header

N_CASES = int(os.environ.get("MILPY_FUZZ_CASES", "8000"))
EDGES = [0, 1, 2, 3, 4, 7, 8, 9, 255, 2**31, 2**32, 2**40, 2**40 + 1, 2**63, 2**64 - 1, 2**64]
ODD = [None, True, False, -1, 0.5, 4.0, 1e300, "", "4", [], {}, [0, 4], {"a": 1}, "F32"]
NAMES = ["a", "b", "", "__metadata__", "é", "a\0", "\ud800", "model.embed_tokens.weight", "x" * 600]
DTYPES = [*ELEMENT_BYTES, "F4", "F6_E2M3", "F128", "f32", ""]
SNIPPETS = [b'"', b"{", b"}", b"[", b"]", b",", b":", b" ", b"\n", b"\0", b"0", b"-", b"e5", b".5",
            b"null", b"\\u0061", b"\\ud800", b"\xff", b"\xc3\xa9", b"[" * 200]  # fmt: skip


class Bytes:
    """The part of ByteFile that the reader uses, without a file."""

    path = Path("fuzz.safetensors")

    def __init__(self, data):
        self.data, self.size = data, len(data)

    def read_at(self, begin, n_bytes):
        assert begin >= 0 and begin + n_bytes <= self.size
        return self.data[begin : begin + n_bytes]


def random_tensors(rng):
    """A valid header of a few tensors and the length of its buffer."""
    tensors, at = {}, 0
    for index in range(rng.randint(0, 4)):
        dtype = rng.choice(list(ELEMENT_BYTES))
        shape = [rng.randint(0, 3) for _ in range(rng.randint(0, 3))]
        n_bytes = ELEMENT_BYTES[dtype]
        for dimension in shape:
            n_bytes *= dimension
        tensors[f"t{index}"] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + n_bytes]}
        at += n_bytes
    return tensors, at


def is_whole(entry):
    """Whether an entry still has the form that mutate_entry works on."""
    return (
        isinstance(entry, dict)
        and entry.keys() == {"dtype", "shape", "data_offsets"}
        and isinstance(entry["shape"], list)
        and isinstance(entry["data_offsets"], list)
        and [type(x) for x in entry["data_offsets"]] == [int, int]
    )


def mutate_entry(rng, tensors, name):
    """Change one value somewhere in the entry of `name`."""
    entry = tensors[name]
    kind = rng.randrange(9)
    if kind == 0:
        entry["dtype"] = rng.choice(DTYPES)
    elif kind == 1 and entry["shape"]:
        entry["shape"][rng.randrange(len(entry["shape"]))] = rng.choice(EDGES)
    elif kind == 2:
        entry["shape"] = [rng.choice(EDGES) for _ in range(rng.randint(0, 10))]
    elif kind == 3:
        entry["data_offsets"][rng.randrange(2)] = rng.choice(EDGES)
    elif kind == 4:
        entry["data_offsets"] = [x + rng.choice([-1, 1]) for x in entry["data_offsets"]]
    elif kind == 5:
        tensors[rng.choice(NAMES)] = tensors.pop(name)
    elif kind == 6:
        entry[rng.choice([*entry, "extra"])] = rng.choice(ODD)
    elif kind == 7:
        del entry[rng.choice(list(entry))]
    else:
        tensors[rng.choice(NAMES)] = rng.choice([*ODD, entry])


def mutate_text(rng, header):
    """Insert, delete, repeat or replace a few bytes of the header."""
    at = rng.randint(0, len(header))
    end = min(len(header), at + rng.randint(0, 12))
    return rng.choice(
        [
            header[:at] + rng.choice(SNIPPETS) + header[at:],
            header[:at] + header[end:],
            header[:at] + header[at:end] * 2 + header[end:],
            header[:at] + bytes([rng.randrange(256)]) + header[at + 1 :],
            header + rng.choice([b" ", b"   ", b"\n", b"\0"]),
        ]
    )


def random_file(rng):
    tensors, n_buffer = random_tensors(rng)
    for _ in range(rng.choice([0, 0, 1, 1, 2])):
        whole = [name for name, entry in tensors.items() if is_whole(entry)]
        if whole:
            mutate_entry(rng, tensors, rng.choice(whole))
    header = json.dumps(tensors, ensure_ascii=rng.random() < 0.5).encode(errors="surrogatepass")
    for _ in range(rng.choice([0, 0, 0, 1, 2])):
        header = mutate_text(rng, header)
    data = file_bytes(header, b"\0" * n_buffer)
    shape = rng.randrange(12)
    if shape == 0:
        data = data[: rng.randint(0, len(data))]
    elif shape == 1:
        data += b"\0" * rng.randint(1, 9)
    elif shape == 2:
        n_header = rng.choice([*EDGES, len(header) - 1, len(header) + 1])
        data = struct.pack("<Q", max(0, min(n_header, 2**64 - 1))) + data[8:]
    return data


def read(data):
    """The tensors, or None where the file is refused by name; anything else escapes."""
    try:
        return read_header(Bytes(data), error=CheckpointError)
    except CheckpointError as problem:
        assert str(problem).startswith("fuzz.safetensors")
        assert len(str(problem)) < 1000
        return None


def test_mutants_are_refused_by_name_or_tile_their_file():
    rng = random.Random(20261123)
    n_accepted = 0
    for _ in range(N_CASES):
        data = random_file(rng)
        tensors = read(data)
        if tensors is None:
            continue
        n_accepted += 1
        at = 8 + int.from_bytes(data[:8], "little")
        for tensor in tensors.values():
            assert tensor.begin == at <= tensor.end <= len(data)
            at = tensor.end
        assert at == len(data)
    # Neither all nor nothing, or the mutator tests nothing.
    assert 0.1 * N_CASES < n_accepted < 0.7 * N_CASES


@pytest.mark.ref
def test_never_accepts_what_the_reference_rejects():
    import safetensors  # noqa: PLC0415

    rng = random.Random(20261124)
    n_both = n_stricter = 0
    for _ in range(N_CASES):
        data = random_file(rng)
        try:
            theirs = dict(safetensors.deserialize(data))
        except safetensors.SafetensorError:
            assert read(data) is None, data
            continue
        ours = read(data)
        if ours is None:
            n_stricter += 1
            continue
        n_both += 1
        assert {name: (t["dtype"], list(t["shape"])) for name, t in theirs.items()} == {
            name: (t.dtype, list(t.shape)) for name, t in ours.items()
        }
    assert n_both > 0.1 * N_CASES
    assert n_stricter > 0
