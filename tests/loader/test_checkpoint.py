"""A model folder's weights: found where the config says, or a named error."""

import json
import os
import pickle
import warnings

import numpy as np
import pytest
from helpers.safetensors_file import (
    file_bytes,
    layout,
    store,
    stored_floats,
    write_safetensors,
)
from helpers.tiny_llama import llama_config, random_weights, write_checkpoint, write_tiny_llama

from milpy.checkpoint import expected_tensors, open_checkpoint
from milpy.config import read_model_config
from milpy.errors import CheckpointError

NUMPY_DTYPES = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}
INDEX = "model.safetensors.index.json"


def opened(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return open_checkpoint(folder, read_model_config(folder))


def refusal(folder):
    with pytest.raises(CheckpointError) as info:
        opened(folder)
    assert len(str(info.value)) < 800
    return str(info.value)


def values(checkpoint, name):
    """A tensor's values by its byte range alone."""
    tensor = checkpoint.tensors[name]
    data = checkpoint.files[tensor.file_index].read_bytes()[tensor.begin : tensor.end]
    return stored_floats(np.frombuffer(data, NUMPY_DTYPES[tensor.dtype]).reshape(tensor.shape))


def rewrite(folder, change, **options):
    """A tiny model whose tensors went through `change(dict of stored arrays)`."""
    weights = write_tiny_llama(folder, **options)
    stored = {name: store(array, "BF16") for name, array in weights.items()}
    write_safetensors(folder / "model.safetensors", change(stored) or stored)
    return folder


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_byte_ranges_hold_the_stored_values(tmp_path, dtype, shards, tied, bias):
    weights = write_tiny_llama(tmp_path, dtype=dtype, shards=shards, tied=tied, bias=bias)
    checkpoint = opened(tmp_path)
    assert checkpoint.tensors.keys() == weights.keys()
    assert len(checkpoint.files) == shards
    assert checkpoint.file_sizes == tuple(path.stat().st_size for path in checkpoint.files)
    for name, expected in weights.items():
        assert checkpoint.tensors[name].dtype == dtype
        np.testing.assert_array_equal(values(checkpoint, name), expected)


def test_files_of_mixed_dtypes_are_read(tmp_path):
    def change(stored):
        stored["model.norm.weight"] = stored_floats(stored["model.norm.weight"])

    checkpoint = opened(rewrite(tmp_path, change))
    assert checkpoint.tensors["model.norm.weight"].dtype == "F32"
    assert checkpoint.tensors["lm_head.weight"].dtype == "BF16"


def test_expected_tensors_are_those_of_the_hugging_face_layout(tmp_path):
    write_tiny_llama(tmp_path, hidden=64, ffn=96, heads=4, kv_heads=2, head_dim=40, bias=True)
    shapes = expected_tensors(read_model_config(tmp_path))
    attention = "model.layers.1.self_attn"
    assert shapes[f"{attention}.q_proj.weight"] == (160, 64)
    assert shapes[f"{attention}.k_proj.weight"] == (80, 64)
    assert shapes[f"{attention}.o_proj.weight"] == (64, 160)
    assert shapes[f"{attention}.v_proj.bias"] == (80,)
    assert shapes[f"{attention}.o_proj.bias"] == (64,)
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (64, 96)


def test_symbolic_links_as_in_the_hub_cache_are_followed(tmp_path):
    write_tiny_llama(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "snapshot" / name).symlink_to(tmp_path / "blobs" / name)
    assert opened(tmp_path / "snapshot").tensors


# ---- folders ----


class Canary:
    def __reduce__(self):
        return os.mkdir, ("canary",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.gguf"])
def test_a_folder_of_pickles_is_refused_by_name_and_never_opened(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tiny_llama(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_bytes(pickle.dumps(Canary()))
    message = refusal(tmp_path)
    assert f'found "{name}"' in message
    assert "expected model.safetensors" in message
    assert not (tmp_path / "canary").exists()


def test_a_pickle_beside_safetensors_is_never_opened(tmp_path):
    write_tiny_llama(tmp_path)
    os.mkfifo(tmp_path / "pytorch_model.bin")
    assert opened(tmp_path).tensors


def test_folders_without_weights(tmp_path):
    config = write_tiny_llama(tmp_path) and read_model_config(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")
    assert 'found "weights.safetensors", expected model.safetensors' in refusal(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be listed"):
        open_checkpoint(tmp_path / "none", config)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="found no files"):
        open_checkpoint(tmp_path / "empty", config)
    (tmp_path / "model.safetensors").mkdir()
    assert "not a regular file" in refusal(tmp_path)


@pytest.mark.parametrize("n_bytes", [0, 7, 8, 100, -1])
def test_truncated_files(tmp_path, n_bytes):
    write_tiny_llama(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:n_bytes])
    message = refusal(tmp_path)
    assert str(path) in message
    assert "expected" in message


# ---- tensors ----


def test_missing_tensors_are_named_and_counted(tmp_path):
    def change(stored):
        del stored["lm_head.weight"], stored["model.layers.1.mlp.up_proj.weight"]

    message = refusal(rewrite(tmp_path, change))
    assert 'lacks 2 of 21 tensors: "lm_head.weight", "model.layers.1.mlp.up_proj.wei' in message


def test_missing_layers_are_counted(tmp_path):
    rewrite(tmp_path, lambda stored: None)
    (tmp_path / "config.json").write_text(json.dumps(llama_config(layers=3)))
    assert "lacks 9 of 30 tensors" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.embed_tokens.weight", (256, 65)),
        ("model.layers.0.self_attn.k_proj.weight", (64, 128)),
        ("model.layers.0.self_attn.k_proj.weight", (4096,)),
        ("model.norm.weight", (64, 1)),
        ("model.norm.weight", (0,)),
        ("lm_head.weight", (255, 64)),
    ],
)
def test_wrong_shapes_say_found_and_expected(tmp_path, name, shape):
    expected = {"embed": [256, 64], "layers": [64, 64], "norm": [64], "head": [256, 64]}
    wanted = next(value for key, value in expected.items() if key in name)

    def change(stored):
        stored[name] = np.zeros(shape, np.uint16)

    message = refusal(rewrite(tmp_path, change))
    assert name in message
    assert f"shape is {list(shape)}, expected {wanted} by config.json" in message


@pytest.mark.parametrize("dtype", [np.float64, np.int8, np.int64])
def test_other_dtypes_are_refused(tmp_path, dtype):
    def change(stored):
        stored["model.norm.weight"] = np.zeros(64, dtype)

    assert "expected one of BF16, F16, F32" in refusal(rewrite(tmp_path, change))


@pytest.mark.parametrize("prefix", ["model", "model.layers.0.self_attn"])
def test_rotary_buffers_of_old_files_are_ignored(tmp_path, prefix):
    def change(stored):
        stored[f"{prefix}.rotary_emb.inv_freq"] = np.zeros(16, np.float32)

    assert len(opened(rewrite(tmp_path, change)).tensors) == 21


@pytest.mark.parametrize(
    "name",
    ["model.layers.2.input_layernorm.weight", "model.layers.0.self_attn.q_proj.bias", "rotary_emb"],
)
def test_unexpected_tensors_are_refused_by_name(tmp_path, name):
    def change(stored):
        stored[name] = np.zeros(64, np.uint16)

    assert f'1 tensors that LlamaForCausalLM does not use: "{name}"' in refusal(
        rewrite(tmp_path, change)
    )


def test_a_stored_head_beside_tied_embeddings_must_be_the_same_bytes(tmp_path):
    def change(stored):
        stored["lm_head.weight"] = stored["model.embed_tokens.weight"].copy()

    checkpoint = opened(rewrite(tmp_path, change, tied=True))
    assert "lm_head.weight" not in checkpoint.tensors

    def differ(stored):
        change(stored)
        stored["lm_head.weight"][-1, -1] ^= 1

    assert "lm_head.weight differs from" in refusal(rewrite(tmp_path, differ, tied=True))

    def convert(stored):
        stored["lm_head.weight"] = stored_floats(stored["model.embed_tokens.weight"])

    assert "F32 [256, 64], expected BF16 [256, 64]" in refusal(
        rewrite(tmp_path, convert, tied=True)
    )


def test_hostile_names_cannot_bend_the_message(tmp_path):
    def change(stored):
        stored["\x1b[2J\u202e" * 50] = np.zeros(1, np.uint16)

    with pytest.raises(CheckpointError) as info:
        opened(rewrite(tmp_path, change))
    assert str(info.value).isascii()
    assert "\x1b" not in str(info.value)


# ---- shards ----


def shard_folder(tmp_path):
    write_tiny_llama(tmp_path, shards=2)
    return tmp_path, json.loads((tmp_path / INDEX).read_text())


def with_map(folder, index, weight_map):
    (folder / INDEX).write_text(json.dumps(index | {"weight_map": weight_map}))
    return refusal(folder)


@pytest.mark.parametrize(
    "file_name",
    ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "x.bin", ".safetensors\n",
     "x\0.safetensors", "", "é.safetensors", None, 1],
)  # fmt: skip
def test_shards_are_plain_names_in_the_same_folder(tmp_path, file_name):
    folder, index = shard_folder(tmp_path)
    message = with_map(folder, index, index["weight_map"] | {"lm_head.weight": file_name})
    assert "expected the name of a .safetensors file in the same folder" in message


def test_index_and_shards_must_list_the_same_tensors(tmp_path):
    folder, index = shard_folder(tmp_path)
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    weight_map = index["weight_map"]
    swapped = weight_map | {"lm_head.weight": first}
    assert f'{first}: lacks "lm_head.weight"' in with_map(folder, index, swapped)
    unlisted = {k: v for k, v in weight_map.items() if k != "lm_head.weight"}
    assert f'{second}: has "lm_head.weight", which' in with_map(folder, index, unlisted)
    extra = weight_map | {"ghost": second}
    assert f'{second}: lacks "ghost"' in with_map(folder, index, extra)
    (folder / second).rename(folder / "gone")
    (folder / INDEX).write_text(json.dumps(index))
    assert f"{second}: cannot be opened: No such file" in refusal(folder)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    folder, _ = shard_folder(tmp_path)
    weights = random_weights(llama_config())
    second = folder / "model-00002-of-00002.safetensors"
    stored = {name: store(array, "BF16") for name, array in list(weights.items())[9:]}
    write_safetensors(second, stored)
    assert f"{second}: has " in refusal(folder)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[]", "expected an object"),
        ("{}", "weight_map is absent"),
        ('{"weight_map": []}', "weight_map is []"),
        ('{"weight_map": {}}', "lists 0 files, expected 1..1000"),
        ('{"weight_map": {"a": "x.safetensors", "a": "x.safetensors"}}', "twice"),
        ('{"weight_map": {"a": [[[["x"]]]]}}', "deeper than 4"),
        (
            json.dumps({"weight_map": {f"t{n}": f"{n}.safetensors" for n in range(1001)}}),
            "lists 1001 files",
        ),
    ],
)
def test_bad_indexes(tmp_path, text, named):
    folder, _ = shard_folder(tmp_path)
    (folder / INDEX).write_text(text)
    assert named in refusal(folder)


def test_a_single_file_wins_over_a_leftover_index(tmp_path):
    folder, _ = shard_folder(tmp_path)
    write_checkpoint(folder, random_weights(llama_config()))
    with pytest.warns(UserWarning, match="the index is ignored") as caught:
        checkpoint = open_checkpoint(folder, read_model_config(folder))
    assert checkpoint.files == (folder / "model.safetensors",)
    assert caught[0].filename == __file__


def test_header_limit_is_an_option(tmp_path):
    write_tiny_llama(tmp_path)
    config = read_model_config(tmp_path)
    with pytest.raises(CheckpointError, match="expected at most 64"):
        open_checkpoint(tmp_path, config, max_header_bytes=64)


def test_a_sparse_file_of_64_gib_costs_nothing(tmp_path):
    """Sizes are compared with the file, never allocated: a header may claim what it likes."""
    write_tiny_llama(tmp_path)
    header, _ = layout({"model.norm.weight": np.zeros(64, np.uint16)})
    header["model.norm.weight"] |= {"shape": [1 << 35], "data_offsets": [0, 1 << 36]}
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_bytes(header))
    assert "truncated" in refusal(tmp_path)
    os.truncate(path, path.stat().st_size + (1 << 36))
    assert "lacks 20 of 21 tensors" in refusal(tmp_path)
    path.unlink()


@pytest.mark.ref
@pytest.mark.parametrize("max_shard_size", ["5GB", "40KB"])
@pytest.mark.parametrize("tied", [False, True])
def test_reads_what_transformers_saves(tmp_path, max_shard_size, tied):
    import torch  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, vocab_size=128, tie_word_embeddings=tied, attention_bias=True,
        )
    ).to(torch.bfloat16)  # fmt: skip
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    checkpoint = opened(tmp_path)
    assert (len(checkpoint.files) > 1) == (max_shard_size == "40KB")
    state = model.state_dict()
    for name in checkpoint.tensors:
        np.testing.assert_array_equal(values(checkpoint, name), state[name].float().numpy())
