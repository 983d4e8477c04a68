"""Dummy weights (load_format="dummy") in torch: csrc/loader/source.c once more, a tensor at a time.

Element i of a tensor is a hash of (seed, name, i), so that any part of any model can be made where
it is needed, on a GPU too. torch has no unsigned 64-bit arithmetic: int64 wraps to the same bits,
and shifts to the right are masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

MASK = (1 << 64) - 1
GOLDEN_RATIO = 0x9E3779B97F4A7C15
FACTORS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
AT_ONCE = 1 << 26  # elements


def mix64(z: int) -> int:
    """base/hash.h's, on Python's integers."""
    z = (z + GOLDEN_RATIO) & MASK
    for shift, factor in FACTORS:
        z = ((z ^ (z >> shift)) * factor) & MASK
    return z ^ (z >> 31)


def stream_of(seed: int, name: str) -> int:
    digest = 0xCBF29CE484222325  # FNV-1a
    for byte in name.encode():
        digest = ((digest ^ byte) * 0x100000001B3) & MASK
    return mix64(mix64(seed) ^ digest)


def _signed(z: int) -> int:
    return z - (1 << 64) if z >> 63 else z


def _shifted(z: Any, n: int) -> Any:
    return (z >> n) & ((1 << (64 - n)) - 1)


def _upper_bits(stream: int, begin: int, end: int, device: str) -> Any:
    """The upper 16 bits of mix64(stream ^ i) for i in [begin, end)."""
    import torch  # noqa: PLC0415

    z = torch.arange(begin, end, dtype=torch.int64, device=device)
    z ^= _signed(stream)
    z += _signed(GOLDEN_RATIO)
    for shift, factor in FACTORS:
        z ^= _shifted(z, shift)
        z *= _signed(factor)
    z ^= _shifted(z, 31)
    return _shifted(z, 48)


def dummy_tensor(seed: int, name: str, shape: Sequence[int], device: str) -> Any:
    """In bfloat16, norms' ones too. There are no biases here, which are drawn otherwise."""
    import torch  # noqa: PLC0415

    if name.endswith("norm.weight"):
        return torch.ones(*shape, dtype=torch.bfloat16, device=device)
    out = torch.empty(*shape, dtype=torch.bfloat16, device=device)
    flat, stream = out.view(-1), stream_of(seed, name)
    for begin in range(0, len(flat), AT_ONCE):
        end = min(begin + AT_ONCE, len(flat))
        integers = 2 * _upper_bits(stream, begin, end, device) - 65535
        flat[begin:end] = integers.float() * 2.0**-21
    return out


def dummy_llama(folder: Path, seed: int, device: str) -> Any:
    """transformers' model of config.json with these weights, in float32."""
    import torch  # noqa: PLC0415
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder))
    for name, parameter in model.named_parameters():
        parameter.data = dummy_tensor(seed, name, parameter.shape, device).float()
    return model
