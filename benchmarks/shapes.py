"""The models that figures are given for, as config.json, and what a token of each costs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from milpy.adapters import PROJECTIONS, Adapter, AdapterModule
from milpy.checkpoint import expected_tensors
from milpy.config import ModelConfig
from milpy.safetensors_header import TensorInfo


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama's sizes."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    tied: bool
    max_position: int = 4096
    rope_theta: float = 10000.0

    def write_config(self, folder: Path) -> Path:
        """Make `folder` with a config.json and nothing else."""
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.max_position,
            "rms_norm_eps": 1e-5,
            "rope_theta": self.rope_theta,
            "hidden_act": "silu",
            "tie_word_embeddings": self.tied,
            "attention_bias": False,
            "torch_dtype": "bfloat16",
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        (folder / "config.json").write_text(json.dumps(config, indent=1))
        return folder

    @property
    def layer_weights(self) -> int:
        """Weights of one layer's seven projections."""
        q = self.heads * self.head_dim
        kv = self.kv_heads * self.head_dim
        return self.hidden * (2 * q + 2 * kv + 3 * self.ffn)

    @property
    def linear_weights(self) -> int:
        """Weights of all products that every token passes, the head apart."""
        return self.layers * self.layer_weights

    @property
    def lora_columns(self) -> int:
        """Values of adapters on all seven projections, for each unit of rank."""
        q = self.heads * self.head_dim
        kv = self.kv_heads * self.head_dim
        return self.layers * (2 * (self.hidden + q) + 2 * (self.hidden + kv)
                              + 3 * (self.hidden + self.ffn))  # fmt: skip

    @property
    def head_weights(self) -> int:
        return self.hidden * self.vocab

    @property
    def bytes_per_step(self) -> int:
        """bf16 weights that one decode step reads, however many rows it has."""
        return 2 * (self.linear_weights + self.head_weights)

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim


# What llama.cpp was measured on (engine_cpu.py); 1B is Llama-3.2-1B's shape.
HALF_B = Shape("0.5B", 1024, 24, 16, 8, 64, 4096, 32000, tied=True)
ONE_B = Shape("1B", 2048, 16, 32, 8, 64, 8192, 128256, tied=True)
# Llama-3-8B, with room for the context that vLLM was measured with (vllm_h200.py).
EIGHT_B = Shape("8B", 4096, 32, 32, 8, 128, 14336, 128256, False, 16384, 500000.0)
TINY = Shape("tiny", 256, 4, 4, 2, 64, 640, 2048, tied=True)
SHAPES = {shape.name: shape for shape in (HALF_B, ONE_B, EIGHT_B, TINY)}


def dummy_adapter(config: ModelConfig, rank: int) -> Adapter:
    """An adapter on all seven projections whose values the core draws; it has no files."""
    shapes = expected_tensors(config)
    modules = []
    for layer in range(config.num_hidden_layers):
        for projection in PROJECTIONS:
            block = "self_attn" if projection in PROJECTIONS[:4] else "mlp"
            base = f"model.layers.{layer}.{block}.{projection}"
            out, into = shapes[f"{base}.weight"]
            a = TensorInfo(f"{base}.lora_A.weight", "BF16", (rank, into), 0, 0, 0)
            b = TensorInfo(f"{base}.lora_B.weight", "BF16", (out, rank), 0, 0, 0)
            modules.append(AdapterModule(layer, projection, rank, 1.0, a, b))
    return Adapter(f"dummy-{rank}", (), (), tuple(modules), 1.0, None)
