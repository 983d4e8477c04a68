"""A PEFT adapter of random values as files, where what is timed begins with reading them."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np

from milpy.adapter_config import CONFIG_FILE
from milpy.adapters import PROJECTIONS, WEIGHTS_FILE
from milpy.checkpoint import expected_tensors
from milpy.config import ModelConfig

SCALE = 0.01


def write_adapter(folder: Path, config: ModelConfig, rank: int) -> Path:
    """Rank `rank` on all seven projections of every layer, bf16, as peft saves it."""
    folder.mkdir(parents=True)
    weights = expected_tensors(config)
    shapes: dict[str, tuple[int, int]] = {}
    for name, shape in weights.items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in PROJECTIONS:
            out, into = shape
            shapes[f"base_model.model.{module}.lora_A.weight"] = (rank, into)
            shapes[f"base_model.model.{module}.lora_B.weight"] = (out, rank)
    header: dict[str, object] = {}
    end = 0
    for name, (n_rows, n_columns) in shapes.items():
        begin, end = end, end + 2 * n_rows * n_columns
        header[name] = {"dtype": "BF16", "shape": [n_rows, n_columns], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    values = np.random.default_rng(1).uniform(-SCALE, SCALE, end // 2).astype(np.float32)
    halves = (values.view(np.uint32) >> 16).astype(np.uint16)
    (folder / WEIGHTS_FILE).write_bytes(struct.pack("<Q", len(text)) + text + halves.tobytes())
    (folder / CONFIG_FILE).write_text(
        json.dumps(
            {
                "peft_type": "LORA",
                "r": rank,
                "lora_alpha": rank,
                "target_modules": list(PROJECTIONS),
                "task_type": "CAUSAL_LM",
            }
        )
    )
    return folder
