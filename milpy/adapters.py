"""A PEFT LoRA adapter folder, checked whole before its name means anything.

Reads adapter_config.json and adapter_model.safetensors, as peft writes them, and nothing else of
the folder. The tensors must be exactly those that the config selects, of the shapes that config and
base call for. Every value is read once, for the digest and to see that it is finite in bf16.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from os.path import exists
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from milpy.adapter_config import (
    CONFIG_FILE,
    PROJECTIONS,
    AdapterConfig,
    Projection,
    module_path,
    read_adapter_config,
)
from milpy.checkpoint import expected_tensors
from milpy.config import ModelConfig
from milpy.errors import AdapterError
from milpy.files import WINDOW_BYTES, ByteFile
from milpy.safetensors_header import WEIGHT_DTYPES, TensorInfo, read_header
from milpy.strict_json import show, show_names

WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
MAX_ADAPTER_BYTES = 8 << 30

# Bit type, mask of all but the sign, and the least bits that are not finite in bf16: for F32 the
# midpoint between bf16's largest number and the next power of two, which rounds up.
_FLOAT_BITS: dict[str, tuple[np.dtype[Any], int, int]] = {
    "BF16": (np.dtype("<u2"), 0x7FFF, 0x7F80),
    "F16": (np.dtype("<u2"), 0x7FFF, 0x7C00),
    "F32": (np.dtype("<u4"), 0x7FFFFFFF, 0x7F7F8000),
}

__all__ = ["PROJECTIONS", "Adapter", "AdapterModule", "Projection", "TensorInfo", "read_adapter"]


@dataclass(frozen=True, slots=True)
class AdapterModule:
    """y += scale * B (A x) at one projection of one layer."""

    layer: int
    projection: Projection
    rank: int
    scale: float
    a: TensorInfo  # [rank, in]
    b: TensorInfo  # [out, rank]


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter's content, without a name. Equal digests mean equal content."""

    digest: str  # sha256 over the weights file and what the config makes of it
    files: tuple[Path, ...]
    file_sizes: tuple[int, ...]
    modules: tuple[AdapterModule, ...]  # by layer, then in the order of PROJECTIONS
    max_abs: float  # largest magnitude among all A and B
    base_model_name: str | None  # as declared, for messages only

    @property
    def max_rank(self) -> int:
        return max(module.rank for module in self.modules)


def read_adapter(
    folder: str | Path,
    config: ModelConfig,
    *,
    allow_adapter_keys: Collection[str] = (),
    max_bytes: int = MAX_ADAPTER_BYTES,
) -> Adapter:
    """Read and check the adapter in `folder` for the base that `config` describes.

    AdapterError says which file, key or tensor was refused, what was found and what was expected.
    `allow_adapter_keys` names config keys that milpy does not know and the caller does.
    """
    folder = Path(folder)
    recipe = read_adapter_config(folder, config, allow_adapter_keys=allow_adapter_keys)
    path = folder / WEIGHTS_FILE
    with _open_weights(folder) as file:
        if file.size > max_bytes:
            raise AdapterError(f"{path}: is {file.size} bytes, expected at most {max_bytes}")
        tensors = read_header(file, error=AdapterError)
        modules = _match(path, tensors, recipe, config)
        content, max_abs = _read_values(file, tensors)
        size = file.size
    meaning = json.dumps([[m.layer, m.projection, m.rank, m.scale.hex()] for m in modules])
    return Adapter(
        digest=hashlib.sha256(content + meaning.encode()).hexdigest(),
        files=(path,),
        file_sizes=(size,),
        modules=modules,
        max_abs=max_abs,
        base_model_name=recipe.base_model_name,
    )


def _open_weights(folder: Path) -> ByteFile:
    path = folder / WEIGHTS_FILE
    if not exists(path) and exists(folder / PICKLE_FILE):
        raise AdapterError(
            f"{folder}: found {PICKLE_FILE}, expected {WEIGHTS_FILE}: pickles are never opened"
        )
    return ByteFile(path, AdapterError)


def _match(
    path: Path,
    tensors: Mapping[str, TensorInfo],
    recipe: AdapterConfig,
    config: ModelConfig,
) -> tuple[AdapterModule, ...]:
    """Every tensor used, every A with its B, the modules exactly those the config selects."""
    base = expected_tensors(config)
    modules: list[AdapterModule] = []
    used: set[str] = set()
    for layer in range(config.num_hidden_layers):
        for projection in PROJECTIONS:
            module = module_path(layer, projection)
            names = [f"base_model.model.{module}.lora_{side}.weight" for side in "AB"]
            present = [name for name in names if name in tensors]
            if not present:
                continue
            if len(present) == 1:
                (absent,) = set(names) - set(present)
                raise AdapterError(f"{path}: has {show(present[0])}, expected {show(absent)} too")
            used.update(names)
            a, b = (tensors[name] for name in names)
            n_out, n_in = base[f"{module}.weight"]
            rank = recipe.rank(module)
            _check_shape(path, a, (rank, n_in), rank)
            _check_shape(path, b, (n_out, rank), rank)
            modules.append(AdapterModule(layer, projection, rank, recipe.scale(module), a, b))
    if len(used) != len(tensors):
        _refuse_unused(path, tensors.keys() - used, config)
    if not modules:
        raise AdapterError(f"{path}: has no tensors, expected lora_A and lora_B of some module")
    _check_targets(path, {module_path(m.layer, m.projection) for m in modules}, set(recipe.targets))
    return tuple(modules)


def _check_shape(path: Path, tensor: TensorInfo, shape: tuple[int, int], rank: int) -> None:
    where = f"{path}: tensor {show(tensor.name, 200)}"
    if tensor.shape != shape:
        raise AdapterError(
            f"{where}: shape is {list(tensor.shape)}, expected {list(shape)}: rank {rank} by "
            f"{CONFIG_FILE}, width by the base model"
        )
    if tensor.dtype not in WEIGHT_DTYPES:
        raise AdapterError(
            f"{where}: dtype is {tensor.dtype}, expected one of {', '.join(WEIGHT_DTYPES)}"
        )


def _refuse_unused(path: Path, names: Collection[str], config: ModelConfig) -> NoReturn:
    example = f"base_model.model.{module_path(0, 'q_proj')}.lora_A.weight"
    reason = f"expected names like {example} in layers 0..{config.num_hidden_layers - 1}"
    unserved = {
        "lora_magnitude_vector": "DoRA is not served",
        "lora_embedding_": "LoRA on embeddings is not served",
        ".lm_head.lora_": "LoRA on lm_head is not served",
        ".lora_B.bias": "lora_bias is not served",
    }
    for part, why in unserved.items():
        if any(part in name for name in names):
            reason = why
            break
    raise AdapterError(
        f"{path}: has {len(names)} tensors that match no module: {show_names(names, 3)}; {reason}"
    )


def _check_targets(path: Path, found: set[str], targets: set[str]) -> None:
    if targets - found:
        raise AdapterError(
            f"{path}: lacks {show_names(targets - found)}, which target_modules in {CONFIG_FILE} "
            "selects"
        )
    if found - targets:
        raise AdapterError(
            f"{path}: has {show_names(found - targets)}, which target_modules in {CONFIG_FILE} "
            "does not select"
        )


def _read_values(file: ByteFile, tensors: Mapping[str, TensorInfo]) -> tuple[bytes, float]:
    """One pass over the file: its sha256, and the largest magnitude among finite values."""
    digest = hashlib.sha256()
    largest = 0.0
    header_end = min(tensor.begin for tensor in tensors.values())
    digest.update(file.read_at(0, header_end))
    # The header was checked to tile the rest of the file, in this order.
    for tensor in tensors.values():
        for begin in range(tensor.begin, tensor.end, WINDOW_BYTES):
            window = file.read_at(begin, min(WINDOW_BYTES, tensor.end - begin))
            digest.update(window)
            largest = max(largest, _largest_magnitude(file.path, tensor, window, begin))
    return digest.digest(), largest


def _largest_magnitude(path: Path, tensor: TensorInfo, window: bytes, begin: int) -> float:
    """The largest |x| of a window; AdapterError if one is not finite once rounded to bf16.

    Without their sign bit, floats are in the order of their bits, so integers do.
    """
    bits_type, mask, limit = _FLOAT_BITS[tensor.dtype]
    bits = np.frombuffer(window, dtype=bits_type) & bits_type.type(mask)
    peak = int(bits.max())
    if peak >= limit:
        element = (begin - tensor.begin) // bits_type.itemsize + int(np.argmax(bits >= limit))
        raise AdapterError(
            f"{path}: tensor {show(tensor.name, 200)}: element {element} is NaN, infinite or too "
            "large for bfloat16, expected finite values"
        )
    if tensor.dtype == "F16":
        return float(np.array(peak, dtype=np.uint16).view(np.float16))
    shift = 16 if tensor.dtype == "BF16" else 0
    return float(np.array(peak << shift, dtype=np.uint32).view(np.float32))
