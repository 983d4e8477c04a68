"""Writes tiny random Llamas and PEFT adapters as Hugging Face folders, with NumPy only.

Weights are drawn large enough that logits spread and that every part of the model matters; what is
returned is what was stored, as float32, so that a reference can be computed from it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .safetensors_file import store, stored_floats, write_safetensors

Weights = dict[str, NDArray[np.float32]]

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
PROJECTIONS = ATTENTION + MLP

_DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def module_path(layer: int, projection: str) -> str:
    """`model.layers.3.mlp.up_proj`, as Hugging Face's Llama names it."""
    block = "self_attn" if projection in ATTENTION else "mlp"
    return f"model.layers.{layer}.{block}.{projection}"


def llama_config(
    *,
    hidden: int = 64,
    ffn: int = 128,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    vocab: int = 256,
    max_positions: int = 512,
    rope: Mapping[str, Any] | None = None,
    tied: bool = False,
    bias: bool = False,
    dtype: str = "BF16",
    old_keys: bool = False,
) -> dict[str, Any]:
    """The content of config.json, as transformers 5 writes it, or with the older keys.

    `rope` holds transformers 5's fields: {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}.
    """
    rope_parameters = {"rope_type": "default", "rope_theta": 10000.0, **(rope or {})}
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "max_position_embeddings": max_positions,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
        "attention_bias": bias,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "pretraining_tp": 1,
        "use_cache": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    if old_keys:
        theta = rope_parameters.pop("rope_theta")
        is_default = rope_parameters["rope_type"] == "default"
        config |= {
            "torch_dtype": _DTYPE_NAMES[dtype],
            "rope_theta": theta,
            "rope_scaling": None if is_default else rope_parameters,
            "transformers_version": "4.46.0",
        }
    else:
        config |= {
            "dtype": _DTYPE_NAMES[dtype],
            "rope_parameters": rope_parameters,
            "transformers_version": "5.0.0",
        }
    return config


def projection_shape(config: Mapping[str, Any], projection: str) -> tuple[int, int]:
    """[out, in] of one projection's weight."""
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    q_width = config["num_attention_heads"] * config["head_dim"]
    kv_width = config["num_key_value_heads"] * config["head_dim"]
    shapes: dict[str, tuple[int, int]] = {
        "q_proj": (q_width, hidden),
        "k_proj": (kv_width, hidden),
        "v_proj": (kv_width, hidden),
        "o_proj": (hidden, q_width),
        "gate_proj": (ffn, hidden),
        "up_proj": (ffn, hidden),
        "down_proj": (hidden, ffn),
    }
    return shapes[projection]


def random_weights(config: Mapping[str, Any], seed: int = 0) -> Weights:
    """All tensors of the model, by Hugging Face's names, before rounding to the stored dtype."""
    rng = np.random.default_rng(seed)
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    weights: Weights = {}

    def draw(name: str, shape: Sequence[int], std: float, mean: float = 0.0) -> None:
        weights[name] = (mean + std * rng.standard_normal(shape)).astype(np.float32)

    draw("model.embed_tokens.weight", (vocab, hidden), 0.5)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        draw(f"{prefix}.input_layernorm.weight", (hidden,), 0.1, 1.0)
        draw(f"{prefix}.post_attention_layernorm.weight", (hidden,), 0.1, 1.0)
        for projection in PROJECTIONS:
            shape = projection_shape(config, projection)
            path = module_path(layer, projection)
            draw(f"{path}.weight", shape, shape[1] ** -0.5)
            if config["attention_bias"] and projection in ATTENTION:
                draw(f"{path}.bias", shape[:1], 0.2)
    draw("model.norm.weight", (hidden,), 0.1, 1.0)
    if not config["tie_word_embeddings"]:
        draw("lm_head.weight", (vocab, hidden), 3 * hidden**-0.5)
    return weights


def write_checkpoint(
    folder: Path, weights: Mapping[str, NDArray[Any]], *, dtype: str = "BF16", shards: int = 1
) -> Weights:
    """model.safetensors, or `shards` files and their index. Returns the stored values."""
    stored = {name: store(values, dtype) for name, values in weights.items()}
    folder.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        write_safetensors(folder / "model.safetensors", stored, metadata={"format": "pt"})
    else:
        names = list(stored)
        weight_map: dict[str, str] = {}
        for index in range(shards):
            file_name = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
            part = names[len(names) * index // shards : len(names) * (index + 1) // shards]
            write_safetensors(
                folder / file_name, {name: stored[name] for name in part}, metadata={"format": "pt"}
            )
            weight_map |= dict.fromkeys(part, file_name)
        total = sum(array.nbytes for array in stored.values())
        index_json = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index_json, indent=2))
    return {name: stored_floats(array) for name, array in stored.items()}


def write_tiny_llama(
    folder: Path,
    *,
    hidden: int = 64,
    ffn: int = 128,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    vocab: int = 256,
    max_positions: int = 512,
    rope: Mapping[str, Any] | None = None,
    tied: bool = False,
    bias: bool = False,
    dtype: str = "BF16",
    shards: int = 1,
    seed: int = 0,
    old_keys: bool = False,
    config_extra: Mapping[str, Any] | None = None,
) -> Weights:
    """A whole model folder: config.json, generation_config.json and safetensors.

    Returns the stored values as float32. With `tied` there is no lm_head.weight. No tokenizer.
    """
    config = llama_config(
        hidden=hidden,
        ffn=ffn,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=vocab,
        max_positions=max_positions,
        rope=rope,
        tied=tied,
        bias=bias,
        dtype=dtype,
        old_keys=old_keys,
    )
    config |= config_extra or {}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    generation = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2))
    return write_checkpoint(folder, random_weights(config, seed), dtype=dtype, shards=shards)


def adapter_config(
    *,
    rank: int = 8,
    alpha: float = 16,
    targets: Sequence[str] | str | None = PROJECTIONS,
    rslora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """adapter_config.json with every key that peft 0.21 writes."""
    return {
        "alora_invocation_tokens": None,
        "alpha_pattern": dict(alpha_pattern or {}),
        "arrow_config": None,
        "auto_mapping": None,
        "base_model_name_or_path": "tiny-random-llama",
        "bias": "none",
        "corda_config": None,
        "ensure_weight_tying": False,
        "eva_config": None,
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "kasa_config": None,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": alpha,
        "lora_bias": False,
        "lora_dropout": 0.0,
        "lora_ga_config": None,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "monteclora_config": None,
        "peft_type": "LORA",
        "peft_version": "0.21.0",
        "qalora_group_size": 16,
        "r": rank,
        "rank_pattern": dict(rank_pattern or {}),
        "revision": None,
        "target_modules": targets if targets is None or isinstance(targets, str) else list(targets),
        "target_parameters": None,
        "task_type": "CAUSAL_LM",
        "trainable_token_indices": None,
        "use_bdlora": None,
        "use_dora": False,
        "use_qalora": False,
        "use_rslora": rslora,
        "velora_config": None,
    }


def _base_config(base: Path | Mapping[str, Any] | object) -> Mapping[str, Any]:
    if isinstance(base, Path):
        config: Mapping[str, Any] = json.loads((base / "config.json").read_text())
        return config
    if isinstance(base, Mapping):
        return base
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    )
    return {name: getattr(base, name) for name in names}


def pattern_value(pattern: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """The value of the first key that is `path` or a dotted suffix of it."""
    for key, value in (pattern or {}).items():
        if path == key or path.endswith("." + key):
            return value
    return default


def write_adapter(
    folder: Path,
    base: Path | Mapping[str, Any] | object,
    *,
    rank: int = 8,
    alpha: float = 16,
    targets: Sequence[str] = PROJECTIONS,
    rslora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    layers: Sequence[int] | None = None,
    dtype: str = "F32",
    seed: int = 0,
    gain: float = 1.0,
    config_extra: Mapping[str, Any] | None = None,
) -> Weights:
    """A PEFT LoRA folder for `base` (a model folder, config.json's content, or a ModelConfig).

    `layers` limits it as layers_to_transform does. `gain` multiplies B, so that tests can make an
    adapter that surely changes the output. Returns the stored tensors by their full names
    ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", ...) as float32.
    """
    model = _base_config(base)
    rng = np.random.default_rng(seed)
    stored = {}
    for layer in range(model["num_hidden_layers"]) if layers is None else layers:
        for projection in targets:
            path = module_path(layer, projection)
            n_out, n_in = projection_shape(model, projection)
            r = pattern_value(rank_pattern, path, rank)
            a = rng.standard_normal((r, n_in)) * n_in**-0.5
            b = rng.standard_normal((n_out, r)) * (gain * r**-0.5)
            stored[f"base_model.model.{path}.lora_A.weight"] = store(a, dtype)
            stored[f"base_model.model.{path}.lora_B.weight"] = store(b, dtype)
    config = adapter_config(
        rank=rank,
        alpha=alpha,
        targets=targets,
        rslora=rslora,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
    )
    if layers is not None:
        config["layers_to_transform"] = list(layers)
    config |= config_extra or {}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    write_safetensors(folder / "adapter_model.safetensors", stored, metadata={"format": "pt"})
    return {name: stored_floats(array) for name, array in stored.items()}
