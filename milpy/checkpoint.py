"""A model folder's safetensors files: which tensors there are, and where their bytes lie.

Reads headers only. What comes back names exactly the tensors that the config calls for, each of its
expected shape; the C core reads the ranges and checks them against the files once more. Pickles
(pytorch_model.bin and the like) are never opened.

Tensors that a model does not need are refused by name, with two exceptions. `rotary_emb.inv_freq`
buffers of old conversions are ignored: they are computed from the config. A stored `lm_head.weight`
beside tied embeddings is ignored only where its bytes equal the embedding's: transformers 4 would
tie over a differing one and transformers 5 would use it, so no reading of such a file is safe.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from os.path import exists
from pathlib import Path

from milpy.config import ModelConfig
from milpy.errors import CheckpointError
from milpy.files import WINDOW_BYTES, ByteFile
from milpy.safetensors_header import (
    MAX_HEADER_BYTES,
    WEIGHT_DTYPES,
    TensorInfo,
    read_header,
)
from milpy.strict_json import Fields, Json, read_object, show, show_names

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_INDEX_BYTES = 16 << 20
MAX_INDEX_DEPTH = 4
MAX_SHARDS = 1000

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

_SHARD_NAME = re.compile(r"[A-Za-z0-9._-]+\.safetensors")
_OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")

__all__ = ["Checkpoint", "TensorInfo", "expected_tensors", "open_checkpoint"]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where a model's weights are. `tensors` has exactly the names of `expected_tensors`."""

    files: tuple[Path, ...]
    file_sizes: tuple[int, ...]  # by fstat when the header was read
    tensors: dict[str, TensorInfo]


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model by Hugging Face's name, and its shape ([out, in] for a product)."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    q_width = config.num_attention_heads * config.head_dim
    kv_width = config.num_key_value_heads * config.head_dim
    attention = {
        "q_proj": (q_width, hidden),
        "k_proj": (kv_width, hidden),
        "v_proj": (kv_width, hidden),
        "o_proj": (hidden, q_width),
    }
    mlp = {"gate_proj": (ffn, hidden), "up_proj": (ffn, hidden), "down_proj": (hidden, ffn)}
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        for name, shape in attention.items():
            shapes[f"{prefix}.self_attn.{name}.weight"] = shape
            if config.attention_bias:
                shapes[f"{prefix}.self_attn.{name}.bias"] = shape[:1]
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        for name, shape in mlp.items():
            shapes[f"{prefix}.mlp.{name}.weight"] = shape
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, hidden)
    return shapes


def open_checkpoint(
    folder: str | Path, config: ModelConfig, *, max_header_bytes: int = MAX_HEADER_BYTES
) -> Checkpoint:
    """Read the headers of `folder`'s weights and match them with what `config` calls for.

    CheckpointError names the file and tensor, what was found and what was expected.
    """
    folder = Path(folder)
    weight_map = _read_index(folder)
    names = [SINGLE_FILE] if weight_map is None else sorted(set(weight_map.values()))
    files = tuple(folder / name for name in names)
    sizes: list[int] = []
    tensors: dict[str, TensorInfo] = {}
    for index, path in enumerate(files):
        with ByteFile(path, CheckpointError) as file:
            found = read_header(
                file, error=CheckpointError, file_index=index, max_header_bytes=max_header_bytes
            )
            sizes.append(file.size)
        if weight_map is not None:
            listed = {name for name, shard in weight_map.items() if shard == path.name}
            _check_shard(path, found, listed)
        tensors |= found
    return Checkpoint(files, tuple(sizes), _match(folder, files, tensors, config))


def _read_index(folder: Path) -> dict[str, str] | None:
    """The index's map from tensor to shard, or None where there is one file."""
    has_single, has_index = exists(folder / SINGLE_FILE), exists(folder / INDEX_FILE)
    if has_single:
        if has_index:
            # As transformers does; most often the index was left behind by an earlier save.
            warnings.warn(
                f"{folder}: has both {SINGLE_FILE} and {INDEX_FILE}; the index is ignored",
                stacklevel=3,
            )
        return None
    if not has_index:
        raise CheckpointError(_nothing_found(folder))
    path = folder / INDEX_FILE
    values = read_object(
        path, max_bytes=MAX_INDEX_BYTES, max_depth=MAX_INDEX_DEPTH, error=CheckpointError
    )
    weight_map = Fields(values, str(path), CheckpointError).object("weight_map")
    result: dict[str, str] = {}
    for name, shard in weight_map.items():
        result[name] = _shard_name(path, name, shard)
    n_shards = len(set(result.values()))
    if not 1 <= n_shards <= MAX_SHARDS:
        raise CheckpointError(f"{path}: lists {n_shards} files, expected 1..{MAX_SHARDS}")
    return result


def _shard_name(path: Path, name: str, shard: Json) -> str:
    if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
        raise CheckpointError(
            f"{path}: tensor {show(name)} is in {show(shard)}, expected the name of a "
            ".safetensors file in the same folder"
        )
    return shard


def _nothing_found(folder: Path) -> str:
    expected = f"expected {SINGLE_FILE} or {INDEX_FILE}"
    try:
        entries = sorted(entry.name for entry in folder.iterdir())
    except OSError as problem:
        return f"{folder}: cannot be listed: {problem.strerror}; {expected}"
    others = [name for name in entries if name.endswith(_OTHER_FORMATS)]
    if others:
        return (
            f"{folder}: found {show_names(others)}, {expected}: pickles and other formats are "
            "never opened"
        )
    loose = [name for name in entries if name.endswith(".safetensors")]
    return f"{folder}: found {show_names(loose or entries) or 'no files'}, {expected}"


def _check_shard(path: Path, found: Iterable[str], listed: set[str]) -> None:
    """The index and a shard's header must name the same tensors."""
    stored = set(found)
    if listed - stored:
        raise CheckpointError(
            f"{path}: lacks {show_names(listed - stored)}, expected here by {INDEX_FILE}"
        )
    if stored - listed:
        raise CheckpointError(
            f"{path}: has {show_names(stored - listed)}, which {INDEX_FILE} does not list here"
        )


def _match(
    folder: Path,
    files: tuple[Path, ...],
    tensors: dict[str, TensorInfo],
    config: ModelConfig,
) -> dict[str, TensorInfo]:
    """Exactly the tensors that the model needs, in its own order."""
    expected = expected_tensors(config)
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise CheckpointError(
            f"{folder}: lacks {len(missing)} of {len(expected)} tensors: {show_names(missing)}"
        )
    for name, shape in expected.items():
        _check_weight(files, tensors[name], shape)
    surplus = {name for name in tensors if name not in expected and not _is_inv_freq(name)}
    if HEAD in surplus and config.tie_word_embeddings:
        surplus.discard(HEAD)
        _check_tied_head(files, tensors[EMBEDDING], tensors[HEAD])
    if surplus:
        raise CheckpointError(
            f"{folder}: has {len(surplus)} tensors that {config.architecture} does not use: "
            f"{show_names(surplus)}"
        )
    return {name: tensors[name] for name in expected}


def _is_inv_freq(name: str) -> bool:
    return name.endswith(".rotary_emb.inv_freq")


def _check_weight(files: tuple[Path, ...], tensor: TensorInfo, shape: tuple[int, ...]) -> None:
    where = f"{files[tensor.file_index]}: tensor {show(tensor.name)}"
    if tensor.shape != shape:
        raise CheckpointError(
            f"{where}: shape is {list(tensor.shape)}, expected {list(shape)} by config.json"
        )
    if tensor.dtype not in WEIGHT_DTYPES:
        raise CheckpointError(
            f"{where}: dtype is {tensor.dtype}, expected one of {', '.join(WEIGHT_DTYPES)}"
        )


def _check_tied_head(files: tuple[Path, ...], embedding: TensorInfo, head: TensorInfo) -> None:
    """A stored head beside tied embeddings must be the same bytes; see the top of this file."""
    where = f"{files[head.file_index]}: {HEAD}"
    if (head.dtype, head.shape) != (embedding.dtype, embedding.shape):
        raise CheckpointError(
            f"{where} is {head.dtype} {list(head.shape)}, expected {embedding.dtype} "
            f"{list(embedding.shape)} as {EMBEDDING}: tie_word_embeddings is true"
        )
    with (
        ByteFile(files[head.file_index], CheckpointError) as head_file,
        ByteFile(files[embedding.file_index], CheckpointError) as embedding_file,
    ):
        for at in range(0, head.end - head.begin, WINDOW_BYTES):
            n_bytes = min(WINDOW_BYTES, head.end - head.begin - at)
            found = head_file.read_at(head.begin + at, n_bytes)
            if found != embedding_file.read_at(embedding.begin + at, n_bytes):
                raise CheckpointError(
                    f"{where} differs from {EMBEDDING}, expected the same bytes or none: "
                    "tie_word_embeddings is true"
                )
