"""One small case of every op of milpy.ops, and the libraries whose arrays it is tried with.

A case: its arrays by name, the names of the written ones, the function. The result is the CPU's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helpers.cuda_arrays import DeviceArray, synchronize
from helpers.gpu import need_cupy, need_torch
from milpy import ops
from milpy.ops import bfloat16, from_bfloat16

Array = NDArray[Any]
EPS = 2.0**-8


def normal(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape).astype(np.float32)


def int32(*values: int) -> Array:
    return np.array(values, np.int32)


def near(got: Array, want: Array) -> None:
    """Both may be bits of bfloat16; two roundings apart, sums a little more."""
    wide = [from_bfloat16(x) if x.dtype == np.uint16 else x for x in (got, want)]
    np.testing.assert_allclose(wide[0], wide[1], rtol=3 * EPS, atol=2e-2)


Case = tuple[dict[str, Any], list[str], Callable[..., Any]]


def batch(rng: np.random.Generator, K: int, P: int, D: int) -> dict[str, Array]:
    return {
        "k_cache": bfloat16(normal(rng, 8, K, P, D)),
        "v_cache": bfloat16(normal(rng, 8, K, P, D)),
        "page_table": rng.permutation(8).astype(np.int32)[:6].reshape(2, 3),
        "query_indptr": int32(0, 1, 6),
        "kv_lengths": int32(2 * P + 3, P + 5),
    }


def case(name: str, rng: np.random.Generator) -> Case:
    T, H, F, N, K, P, D, V = 6, 256, 64, 4, 2, 64, 64, 1000
    segments = {
        "segment_indptr": int32(0, 2, 5),
        "segment_adapter": int32(1, 0),
        "rows": int32(4, 0, 1, 5, 2),
        "scale": normal(rng, 2),
    }
    x, a, b = (bfloat16(normal(rng, *s)) for s in [(T, 2048), (2, 16, 2048), (2, H, 16)])
    cos, sin = ops.rope_tables(512, D)
    angles = {"positions": np.arange(T, dtype=np.int32), "cos": cos, "sin": sin}
    bits = np.uint16
    cases: dict[str, Case] = {
        "rms_norm": (
            {"x": normal(rng, T, H), "weight": normal(rng, H), "eps": 1e-5,
             "residual": bfloat16(normal(rng, T, H)), "out": np.zeros((T, H), bits)},
            ["x", "out"], ops.rms_norm),
        "silu_and_mul": (
            {"gate_up": bfloat16(normal(rng, T, 2 * F)), "interleave": 8,
             "out": np.zeros((T, F), bits)}, ["out"], ops.silu_and_mul),
        "linear": (
            {"x": x, "weight": bfloat16(normal(rng, H, 2048) / 40), "bias": normal(rng, H),
             "out": np.zeros((T, H), np.float32)}, ["out"], ops.linear),
        "linear_bf16": (
            {"x": x, "weight": bfloat16(normal(rng, H, 2048) / 40),
             "out": np.zeros((T, H), bits), "deterministic": True}, ["out"], ops.linear),
        "embedding": (
            {"tokens": int32(5, -1, V, 0), "weight": bfloat16(normal(rng, V, H)),
             "out": np.zeros((4, H), np.float32)}, ["out"], ops.embedding),
        "sample": (
            {"logits": normal(rng, T, V), "params": ops.sampling_params(T, top_k=3),
             "positions": np.zeros(T, np.int32), "out": np.zeros(T, np.int32)},
            ["out"], ops.sample),
        "sample_logprobs": (
            {"logits": normal(rng, T, V), "params": ops.sampling_params(T, n_logprobs=5),
             "positions": np.zeros(T, np.int32), "out": np.zeros(T, np.int32),
             "logprobs": np.zeros(T, np.float32), "ranks": np.zeros(T, np.int32),
             "top_tokens": np.zeros((T, 5), np.int32),
             "top_logprobs": np.zeros((T, 5), np.float32)},
            ["out", "logprobs", "ranks", "top_tokens", "top_logprobs"], ops.sample_logprobs),
        "rope": (
            {"x": bfloat16(normal(rng, T, N, D)), **angles, "out": np.zeros((T, N, D), bits)},
            ["out"], ops.rope),
        "rope_and_cache": (
            {"qkv": bfloat16(normal(rng, T, (N + 2 * K) * D)), **angles, **batch(rng, K, P, D),
             "out": np.zeros((T, N, D), bits)}, ["out", "k_cache", "v_cache"], ops.rope_and_cache),
        "attention": (
            {"q": bfloat16(normal(rng, T, N, D)), **batch(rng, K, P, D),
             "out": np.zeros((T, N, D), bits)}, ["out"], ops.attention),
        "lora": (
            {"y": bfloat16(normal(rng, T, H)), "x": x, "a": bfloat16(from_bfloat16(a) / 40), "b": b,
             **segments}, ["y"], ops.lora),
        "lora_shrink": (
            {"x": x, "a": bfloat16(from_bfloat16(a) / 40), **segments,
             "out": np.zeros((5, 16), np.float32)}, ["out"], ops.lora_shrink),
        "lora_expand": (
            {"y": bfloat16(normal(rng, T, H)), "v": normal(rng, 5, 16), "b": b,
             **{k: v for k, v in segments.items() if k != "scale"}}, ["y"], ops.lora_expand),
    }  # fmt: skip
    return cases[name]


NAMES = (
    "rms_norm silu_and_mul linear linear_bf16 embedding sample sample_logprobs rope rope_and_cache "
    "attention lora lora_shrink lora_expand"
).split()


def copied(arrays: dict[str, Any]) -> dict[str, Any]:
    return {k: v.copy() if isinstance(v, np.ndarray) else v for k, v in arrays.items()}


def on_cpu(arrays: dict[str, Any], written: list[str], call: Callable[..., Any]) -> list[Array]:
    arrays = copied(arrays)
    call(**arrays)
    return [arrays[name] for name in written]


def put(arrays: dict[str, Any], make: Callable[[Array], Any]) -> dict[str, Any]:
    return {k: make(v) if isinstance(v, np.ndarray) else v for k, v in arrays.items()}


# ---- libraries ----


class Driver:
    put = DeviceArray

    @staticmethod
    def get(x: DeviceArray) -> Array:
        return x.get()


class Torch:
    def __init__(self, device: str = "cuda") -> None:
        self.torch = need_torch()
        self.device = device

    def put(self, x: Array) -> Any:
        if x.dtype == np.uint16:
            return self.torch.from_numpy(x.view(np.int16)).view(self.torch.bfloat16).to(self.device)
        return self.torch.from_numpy(x).to(self.device)

    def get(self, x: Any) -> Array:
        self.torch.cuda.synchronize(x.device)
        if x.dtype == self.torch.bfloat16:
            return np.asarray(x.view(self.torch.int16).cpu().numpy().view(np.uint16))
        return np.asarray(x.cpu().numpy())


class Cupy:
    def __init__(self) -> None:
        self.cupy = need_cupy()

    def put(self, x: Array) -> Any:
        return self.cupy.asarray(x)

    def get(self, x: Any) -> Array:
        synchronize()
        return np.asarray(self.cupy.asnumpy(x))
