"""A PEFT adapter folder: applied exactly as PEFT would, or refused by name."""

import json
import os
import pickle
import shutil
import struct

import numpy as np
import pytest
from helpers.safetensors_file import bf16_floats, store, write_safetensors
from helpers.tiny_llama import PROJECTIONS, module_path, write_adapter, write_tiny_llama

from milpy.adapter_config import HARMLESS, NEUTRAL
from milpy.adapters import read_adapter
from milpy.config import read_model_config
from milpy.errors import AdapterError

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    write_tiny_llama(folder, hidden=64, ffn=96, layers=2, heads=4, kv_heads=2, head_dim=40)
    return folder


@pytest.fixture
def model(base):
    return read_model_config(base)


@pytest.fixture
def adapter(base, tmp_path):
    """Writes an adapter folder and returns it."""

    def write(**options):
        write_adapter(tmp_path, base, **options)
        return tmp_path

    return write


def refusal(folder, model, **options):
    with pytest.raises(AdapterError) as info:
        read_adapter(folder, model, **options)
    assert str(info.value).startswith(str(folder))
    assert len(str(info.value)) < 1000
    return str(info.value)


def change_config(folder, **changes):
    config = json.loads((folder / CONFIG).read_text()) | changes
    config = {key: value for key, value in config.items() if value is not ...}
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def change_tensors(folder, stored, change):
    """Write the adapter's tensors again after `change(dict)`, as float32."""
    stored = {name: np.array(array) for name, array in stored.items()}
    change(stored)
    write_safetensors(folder / WEIGHTS, stored)
    return folder


def scales(adapter):
    return {(m.layer, m.projection): m.scale for m in adapter.modules}


# ---- what a good adapter means ----


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_byte_ranges_hold_the_stored_values(base, model, tmp_path, dtype):
    stored = write_adapter(tmp_path, base, rank=5, dtype=dtype)
    adapter = read_adapter(tmp_path, model)
    assert [(m.layer, m.projection) for m in adapter.modules] == [
        (layer, projection) for layer in range(2) for projection in PROJECTIONS
    ]
    data = (tmp_path / WEIGHTS).read_bytes()
    assert adapter.file_sizes == (len(data),)
    for module in adapter.modules:
        for side, tensor in (("A", module.a), ("B", module.b)):
            path = module_path(module.layer, module.projection)
            name = f"base_model.model.{path}.lora_{side}.weight"
            bits = data[tensor.begin : tensor.end]
            np.testing.assert_array_equal(
                np.frombuffer(bits, store(stored[name], dtype).dtype).reshape(tensor.shape),
                store(stored[name], dtype),
            )
    assert adapter.max_abs == max(np.abs(array).max() for array in stored.values())
    assert adapter.max_rank == 5


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"rank": 8, "alpha": 16}, 2.0),
        ({"rank": 3, "alpha": 16}, 16 / 3),
        ({"rank": 3, "alpha": 0.5}, 0.5 / 3),
        ({"rank": 8, "alpha": 16, "rslora": True}, 16 / 8**0.5),
    ],
)
def test_scale_is_alpha_over_rank_or_its_root(adapter, model, options, expected):
    found = scales(read_adapter(adapter(**options), model))
    assert set(found.values()) == {expected}


def test_patterns_take_suffixes_and_the_first_hit_in_the_file(adapter, model):
    folder = adapter(
        rank=8,
        alpha=16,
        rank_pattern={"layers.1.mlp.up_proj": 4, "up_proj": 2, "self_attn.k_proj": 6},
        alpha_pattern={"q_proj": 3, "model.layers.0.self_attn.q_proj": 5, "0.mlp.up_proj": 7.5},
    )
    adapter_read = read_adapter(folder, model)
    ranks = {(m.layer, m.projection): m.rank for m in adapter_read.modules}
    assert (ranks[0, "up_proj"], ranks[1, "up_proj"]) == (2, 4)
    assert (ranks[0, "k_proj"], ranks[1, "k_proj"], ranks[0, "down_proj"]) == (6, 6, 8)
    found = scales(adapter_read)
    assert (found[0, "q_proj"], found[1, "q_proj"]) == (3 / 8, 3 / 8)
    assert (found[0, "up_proj"], found[1, "up_proj"]) == (7.5 / 2, 16 / 4)
    assert (found[0, "k_proj"], found[1, "o_proj"]) == (16 / 6, 16 / 8)


def test_minimal_config_takes_pefts_defaults(adapter, model):
    folder = adapter(rank=8, targets=["q_proj", "v_proj"])
    (folder / CONFIG).write_text('{"peft_type": "LORA"}')
    found = scales(read_adapter(folder, model))
    assert found == {(layer, name): 1.0 for layer in (0, 1) for name in ("q_proj", "v_proj")}


@pytest.mark.parametrize(
    ("targets", "options"),
    [
        ("all-linear", {}),
        (["self_attn.q_proj"], {"targets": ["q_proj"]}),
        ([module_path(layer, "o_proj") for layer in (0, 1)], {"targets": ["o_proj"]}),
        (["q_proj", "query_key_value"], {"targets": ["q_proj"]}),
        (["q_proj"], {"targets": ["q_proj"], "layers": [1]}),
    ],
)
def test_target_modules_select_as_in_peft(adapter, model, targets, options):
    folder = change_config(adapter(**options), target_modules=targets)
    assert read_adapter(folder, model).modules


def test_layers_to_transform_leaves_whole_paths_alone(base, model, tmp_path):
    write_adapter(tmp_path, base, targets=["q_proj"])
    change_config(
        tmp_path, target_modules=[module_path(0, "q_proj"), "q_proj"], layers_to_transform=[1]
    )
    assert len(read_adapter(tmp_path, model).modules) == 2
    change_config(tmp_path, target_modules=["q_proj"], layers_to_transform=1)
    assert "does not select" in refusal(tmp_path, model)


def test_excluded_modules_are_not_targets(adapter, model):
    folder = adapter(targets=["q_proj"], layers=[0])
    excluded = {"exclude_modules": [module_path(1, "q_proj")], "layers_to_transform": None}
    assert len(read_adapter(change_config(folder, **excluded), model).modules) == 1


def test_digest_follows_content_not_bookkeeping(adapter, base, model, tmp_path):
    folder = adapter()
    first = read_adapter(folder, model).digest
    assert len(first) == 64
    change_config(folder, revision="x", base_model_name_or_path=None, peft_version="0.1")
    change_config(folder, target_modules=list(reversed(PROJECTIONS)))
    assert read_adapter(folder, model).digest == first
    other = tmp_path / "copy"
    other.mkdir()
    for name in (CONFIG, WEIGHTS):
        shutil.copy(folder / name, other)
    assert read_adapter(other, model).digest == first
    digests = {first}
    digests.add(read_adapter(change_config(folder, lora_alpha=17), model).digest)
    digests.add(read_adapter(change_config(folder, lora_alpha=16, use_rslora=True), model).digest)
    data = bytearray((other / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (other / WEIGHTS).write_bytes(data)
    digests.add(read_adapter(other, model).digest)
    assert len(digests) == 4


def test_nothing_else_of_the_folder_is_opened(adapter, model):
    folder = adapter()
    for name in ("adapter_model.bin", "tokenizer.json", "adapter.py", "README.md"):
        os.mkfifo(folder / name)
    assert read_adapter(folder, model).modules


# ---- config: one rule, one refusal ----

REFUSED_CONFIG = [
    ({"peft_type": "IA3"}, 'peft_type is "IA3"', '"LORA"'),
    ({"peft_type": "lora"}, 'peft_type is "lora"', '"LORA"'),
    ({"peft_type": ...}, "peft_type is absent", "a string"),
    ({"task_type": "SEQ_CLS"}, 'task_type is "SEQ_CLS"', "CAUSAL_LM"),
    ({"r": 0}, "r is 0", "1..512"),
    ({"r": 513}, "r is 513", "1..512"),
    ({"r": True}, "r is true", "1..512"),
    ({"r": 8.0}, "r is 8.0", "1..512"),
    ({"r": None}, "r is null", "1..512"),
    ({"lora_alpha": 0}, "lora_alpha is 0", "above 0 and at most 1e+06"),
    ({"lora_alpha": -16}, "lora_alpha is -16", "above 0"),
    ({"lora_alpha": 1000001}, "lora_alpha is 1000001", "at most 1e+06"),
    ({"lora_alpha": True}, "lora_alpha is true", "above 0"),
    ({"lora_alpha": 1e-40}, "lora_alpha is 1e-40", "above 0"),
    ({"lora_alpha": "16"}, 'lora_alpha is "16"', "above 0"),
    ({"use_rslora": 1}, "use_rslora is 1", "true or false"),
    ({"use_dora": True}, "use_dora is true", "does not apply it"),
    ({"bias": "all"}, 'bias is "all"', "does not apply it"),
    ({"bias": "lora_only"}, 'bias is "lora_only"', "does not apply it"),
    ({"lora_bias": True}, "lora_bias is true", "does not apply it"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save", "does not apply it"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices", "does not apply it"),
    ({"layer_replication": [[0, 2]]}, "layer_replication", "does not apply it"),
    ({"target_parameters": ["mlp.experts"]}, "target_parameters", "does not apply it"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out", "does not apply it"),
    ({"megatron_config": {"a": 1}}, "megatron_config", "does not apply it"),
    ({"use_qalora": True}, "use_qalora", "does not apply it"),
    ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens", "does not apply it"),
    ({"use_bdlora": {"nblocks": 2}}, "use_bdlora", "does not apply it"),
    ({"monteclora_config": {"a": 1}}, "monteclora_config", "does not apply it"),
    ({"velora_config": {"a": 1}}, "velora_config", "does not apply it"),
    ({"kasa_config": {"a": 1}}, "kasa_config", "does not apply it"),
    ({"arrow_config": {"a": 1}}, "arrow_config", "does not apply it"),
    ({"lora_ga_config": {"a": 1}}, "lora_ga_config", "does not apply it"),
    ({"ensure_weight_tying": True}, "ensure_weight_tying", "does not apply it"),
    ({"use_dora": 0}, "use_dora is 0", "does not apply it"),
    ({"init_lora_weights": "pissa"}, '"pissa"', "convert the adapter first"),
    ({"init_lora_weights": "pissa_niter_4"}, '"pissa_niter_4"', "convert"),
    ({"init_lora_weights": "olora"}, '"olora"', "convert"),
    ({"init_lora_weights": "corda"}, '"corda"', "convert"),
    ({"init_lora_weights": "loftq"}, '"loftq"', "convert"),
    ({"init_lora_weights": []}, "init_lora_weights is []", "convert"),
    ({"rank_pattern": []}, "rank_pattern is []", "an object"),
    ({"rank_pattern": {"q_proj": 0}}, "rank_pattern", "1..512, not 0"),
    ({"rank_pattern": {"q_proj": True}}, "rank_pattern", "1..512, not true"),
    ({"rank_pattern": {"^model.*q_proj": 8}}, "rank_pattern", "matches no module"),
    ({"rank_pattern": {".*": 8}}, "rank_pattern", "matches no module"),
    ({"rank_pattern": {"(a+)+": 8}}, "rank_pattern", "matches no module"),
    # As a regular expression PEFT's rule would match q_proj; as a name nothing does.
    ({"alpha_pattern": {"q.proj": 8}}, "alpha_pattern", '"q.proj" matches no module'),
    ({"alpha_pattern": {"layers.2.mlp.up_proj": 8}}, "alpha_pattern", "matches no module"),
    ({"alpha_pattern": {"q_proj": 0}}, "alpha_pattern", "above 0"),
    ({"target_modules": ".*_proj"}, 'target_modules is ".*_proj"', "all-linear"),
    ({"target_modules": ["q_proj", 1]}, "target_modules", "a list of names"),
    ({"target_modules": {}}, "target_modules is {}", "a list of names"),
    ({"target_modules": [*PROJECTIONS, "lm_head"]}, "target_modules", "lm_head is not served"),
    ({"target_modules": ["embed_tokens"]}, "target_modules", "embed_tokens is not served"),
    ({"target_modules": "all-linear", "layers_to_transform": [0]}, "target_modules", "a list"),
    ({"exclude_modules": ".*mlp.*"}, "exclude_modules", "a list of names"),
    ({"layers_to_transform": [2]}, "layers_to_transform is [2]", "0..1"),
    ({"layers_to_transform": -1}, "layers_to_transform is -1", "0..1"),
    ({"layers_to_transform": [True]}, "layers_to_transform is [true]", "0..1"),
    ({"layers_pattern": "h"}, 'layers_pattern is "h"', '"layers"'),
    ({"new_option": 1}, "new_option is 1", 'allow_adapter_keys=["new_option"]'),
    ({"new_option": "x"}, 'new_option is "x"', "allow_adapter_keys"),
]


@pytest.mark.parametrize(("change", "found", "expected"), REFUSED_CONFIG)
def test_config_refusal_says_found_and_expected(adapter, model, change, found, expected):
    message = refusal(change_config(adapter(), **change), model)
    assert CONFIG in message
    before, after = message.split(", expected ", 1)
    assert found in before
    assert expected in after


def test_neutral_values_pass(adapter, model):
    folder = adapter()
    for value in (None, False, [], {}, "", "none", ...):
        change_config(folder, use_dora=value, bias=value, modules_to_save=value, new_option=value)
        read_adapter(folder, model)
    for value in (True, False, None, "gaussian", "eva", "orthogonal", ...):
        read_adapter(change_config(folder, init_lora_weights=value), model)


def test_an_unknown_key_passes_only_by_its_name(adapter, model):
    folder = change_config(adapter(), new_option=1, other_option=2)
    assert "other_option" in refusal(folder, model, allow_adapter_keys=["new_option"])
    read_adapter(folder, model, allow_adapter_keys=["new_option", "other_option"])
    change_config(folder, use_dora=True)
    assert "use_dora" in refusal(folder, model, allow_adapter_keys=["use_dora", "new_option"])


ODD = {
    "absent": ..., "null": None, "0": 0, "-1": -1, "2^31": 2**31, "2^63": 2**63, "1e309": "1e309",
    '""': "", "[]": [], "{}": {}, "true": True,
}  # fmt: skip
# What is read, by key; HARMLESS keys take anything, NEUTRAL ones what is empty, others nothing.
READ = {
    "task_type": {"absent", "null"},
    "r": {"absent"},
    "lora_alpha": {"absent"},
    "use_rslora": {"absent", "null", "true"},
    "alpha_pattern": {"absent", "null", "{}"},
    "exclude_modules": {"absent", "null", "[]"},
    "layers_to_transform": {"absent", "null", "[]"},
    "layers_pattern": {"absent", "null", '""', "[]"},
    "init_lora_weights": {"absent", "null", "true"},
}
# What leaves a config that is sound by itself and does not fit the tensors.
UNFIT = {
    "rank_pattern": ({"absent", "null", "{}"}, "rank 8 by adapter_config.json"),
    "layers_to_transform": ({"0"}, "target_modules in adapter_config.json does not select"),
}


def is_read(key, label):
    if label == "1e309":
        return False
    if key in NEUTRAL:
        return label in {"absent", "null", '""', "[]", "{}"}
    return key in HARMLESS or key == "base_model_name_or_path" or label in READ.get(key, ())


def test_each_field_at_each_odd_value_is_read_by_the_table_or_refused_by_name(adapter, model):
    folder = adapter(rank_pattern={"q_proj": 4}, alpha_pattern={"q_proj": 4})
    text = (folder / CONFIG).read_text()
    for key in json.loads(text):
        for label, value in ODD.items():
            (folder / CONFIG).write_text(text)
            change_config(folder, **{key: value})
            raw = (folder / CONFIG).read_text().replace('"1e309"', "1e309")
            (folder / CONFIG).write_text(raw)
            try:
                read_adapter(folder, model)
                message = None
            except AdapterError as problem:
                message = str(problem)
            assert (message is None) == is_read(key, label), (key, label, message)
            if message is not None:
                labels, reason = UNFIT.get(key, ((), ""))
                named = "1e309" if label == "1e309" else reason if label in labels else key
                assert named in message, (key, label, message)


def test_bad_config_files(adapter, model):
    folder = adapter()
    for text, named in [
        ("[]", "expected an object"),
        ('{"r": 8, "r": 8}', "twice"),
        ("{" + " " * 2**20 + "}", "at most 1048576"),
        ('{"a":' * 17 + "0" + "}" * 17, "deeper than 16"),
    ]:
        (folder / CONFIG).write_text(text)
        assert named in refusal(folder, model)
    (folder / CONFIG).unlink()
    assert "adapter_config.json: cannot be opened" in refusal(folder, model)


# ---- tensors ----


class Canary:
    def __reduce__(self):
        return os.mkdir, ("canary",)


def test_a_pickle_alone_is_refused_by_name_and_never_opened(adapter, model, monkeypatch):
    folder = adapter()
    monkeypatch.chdir(folder)
    (folder / WEIGHTS).unlink()
    assert "adapter_model.safetensors: cannot be opened" in refusal(folder, model)
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Canary()))
    message = refusal(folder, model)
    assert f"found adapter_model.bin, expected {WEIGHTS}" in message
    assert not (folder / "canary").exists()


@pytest.mark.parametrize(
    ("shape", "named"),
    [
        ({"hidden": 128}, "shape is [8, 64], expected [8, 128]"),
        ({"heads": 2, "kv_heads": 2}, "shape is [160, 8], expected [80, 8]"),
        ({"kv_heads": 1}, "shape is [80, 8], expected [40, 8]"),
        ({"ffn": 64}, "shape is [96, 8], expected [64, 8]"),
    ],
)
def test_an_adapter_for_another_base_names_tensor_and_shapes(adapter, tmp_path, shape, named):
    other = tmp_path / "other"
    write_tiny_llama(other, **({"ffn": 96, "head_dim": 40} | shape))
    message = refusal(adapter(), read_model_config(other))
    assert named in message
    assert 'tensor "base_model.model.model.layers.0.' in message
    assert "width by the base model" in message


def test_an_adapter_of_a_deeper_base_matches_nothing(adapter, tmp_path):
    other = tmp_path / "other"
    write_tiny_llama(other, layers=1, ffn=96, head_dim=40)
    message = refusal(adapter(), read_model_config(other))
    assert "has 14 tensors that match no module" in message
    assert "layers 0..0" in message


@pytest.mark.parametrize(("r", "pattern"), [(4, {}), (8, {"q_proj": 4})])
def test_rank_of_tensors_must_be_the_configs(adapter, model, r, pattern):
    folder = change_config(adapter(rank=8), r=r, rank_pattern=pattern)
    message = refusal(folder, model)
    assert "shape is [8, 64], expected [4, 64]: rank 4 by adapter_config.json" in message


TENSOR_CHANGES = {
    "A without B": (lambda t: t.pop(f"{Q0}.lora_B.weight"), f'expected "{Q0}.lora_B.weight" too'),
    "B without A": (lambda t: t.pop(f"{Q0}.lora_A.weight"), f'expected "{Q0}.lora_A.weight" too'),
    "neither": (
        lambda t: [t.pop(f"{Q0}.lora_{side}.weight") for side in "AB"],
        'lacks "model.layers.0.self_attn.q_proj", which target_modules',
    ),
    "none at all": (lambda t: t.clear(), "has no tensors"),
    "foreign": (lambda t: t.update(x=np.zeros(1, "f4")), 'match no module: "x"; expected names'),
    "no prefix": (
        lambda t: t.update({"model.layers.0.self_attn.q_proj.lora_A.weight": np.zeros(1, "f4")}),
        "match no module",
    ),
    "leading zero": (
        lambda t: t.update({Q0.replace(".0.", ".00.") + ".lora_A.weight": np.zeros(1, "f4")}),
        "match no module",
    ),
    "adapter name kept": (
        lambda t: t.update({f"{Q0}.lora_A.default.weight": np.zeros(1, "f4")}),
        "match no module",
    ),
    "DoRA": (
        lambda t: t.update({f"{Q0}.lora_magnitude_vector": np.zeros(160, "f4")}),
        "DoRA is not served",
    ),
    "bias": (
        lambda t: t.update({f"{Q0}.lora_B.bias": np.zeros(160, "f4")}),
        "lora_bias is not served",
    ),
    "embedding": (
        lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": np.zeros(1)}),
        "LoRA on embeddings is not served",
    ),
    "head": (
        lambda t: t.update({"base_model.model.lm_head.lora_A.weight": np.zeros((8, 64), "f4")}),
        "LoRA on lm_head is not served",
    ),
    "full matrix": (
        lambda t: t.update({"base_model.model.lm_head.weight": np.zeros((8, 64), "f4")}),
        "match no module",
    ),
    "dtype": (
        lambda t: t.update({f"{Q0}.lora_A.weight": np.zeros((8, 64), "f8")}),
        "dtype is F64, expected one of BF16, F16, F32",
    ),
    "transposed": (
        lambda t: t.update({f"{Q0}.lora_A.weight": np.zeros((64, 8), "f4")}),
        "shape is [64, 8], expected [8, 64]",
    ),
    "three dimensions": (
        lambda t: t.update({f"{Q0}.lora_A.weight": np.zeros((8, 64, 1), "f4")}),
        "shape is [8, 64, 1], expected [8, 64]",
    ),
    "empty": (
        lambda t: t.update({f"{Q0}.lora_A.weight": np.zeros((0, 64), "f4")}),
        "shape is [0, 64], expected [8, 64]",
    ),
}


@pytest.mark.parametrize("case", TENSOR_CHANGES)
def test_tensor_refusal_names_the_tensor(base, model, tmp_path, case):
    change, named = TENSOR_CHANGES[case]
    stored = write_adapter(tmp_path, base)
    assert named in refusal(change_tensors(tmp_path, stored, change), model)


def test_tensors_the_config_does_not_select_are_refused(adapter, model):
    folder = change_config(adapter(), target_modules=["q_proj", "v_proj"])
    assert "which target_modules in adapter_config.json does not select" in refusal(folder, model)


def poison(folder, name, element, bits):
    """Put raw bits (2 or 4 bytes) into one element of a tensor in the file."""
    path = folder / WEIGHTS
    data = bytearray(path.read_bytes())
    (n_header,) = struct.unpack("<Q", data[:8])
    entry = json.loads(data[8 : 8 + n_header])[name]
    at = 8 + n_header + entry["data_offsets"][0] + element * len(bits)
    data[at : at + len(bits)] = bits
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("dtype", "bits", "is_finite"),
    [
        ("F32", 0x7FC00000, False),  # NaN
        ("F32", 0x7F800001, False),  # signalling NaN
        ("F32", 0xFFFFFFFF, False),  # negative NaN
        ("F32", 0x7F800000, False),  # infinity
        ("F32", 0xFF800000, False),
        ("F32", 0x7F7F8000, False),  # rounds to infinity in bf16
        ("F32", 0xFF7FFFFF, False),
        ("F32", 0x7F7F7FFF, True),  # rounds to bf16's largest
        ("F32", 0x80000001, True),
        ("F16", 0x7C00, False),
        ("F16", 0xFE00, False),
        ("F16", 0x7BFF, True),
        ("BF16", 0x7F80, False),
        ("BF16", 0xFFC0, False),
        ("BF16", 0x7F7F, True),
    ],
)
def test_values_are_finite_in_the_serving_dtype(adapter, model, dtype, bits, is_finite):
    folder = adapter(dtype=dtype)
    name = f"{Q0}.lora_B.weight"
    raw = struct.pack("<I" if dtype == "F32" else "<H", bits)
    poison(folder, name, 1279, raw)
    if is_finite:
        value = {
            "F32": lambda: np.array(bits, "u4").view("f4"),
            "F16": lambda: np.array(bits, "u2").view("f2"),
            "BF16": lambda: bf16_floats(np.array(bits, "u2")),
        }[dtype]()
        assert read_adapter(folder, model).max_abs == max(
            abs(float(value)), read_adapter(adapter(dtype=dtype), model).max_abs
        )
    else:
        assert f'"{name}": element 1279 is NaN, infinite or too large' in refusal(folder, model)


def test_nan_past_the_first_window_is_found(tmp_path, monkeypatch, adapter, model):
    monkeypatch.setattr("milpy.adapters.WINDOW_BYTES", 64)
    folder = adapter()
    whole = read_adapter(folder, model)
    poison(folder, f"{Q0}.lora_B.weight", 1279, struct.pack("<I", 0x7FC00000))
    assert "element 1279 is NaN" in refusal(folder, model)
    monkeypatch.undo()
    adapter()
    assert read_adapter(folder, model) == whole


def test_size_is_capped_before_anything_is_read(adapter, model):
    folder = adapter()
    size = (folder / WEIGHTS).stat().st_size
    read_adapter(folder, model, max_bytes=size)
    assert f"is {size} bytes, expected at most {size - 1}" in refusal(
        folder, model, max_bytes=size - 1
    )


@pytest.mark.parametrize("n_bytes", [0, 8, 300, -1])
def test_truncated_weights(adapter, model, n_bytes):
    folder = adapter()
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:n_bytes])
    assert WEIGHTS in refusal(folder, model)


# ---- PEFT itself ----

PEFT_CASES = [
    {},
    {"r": 16, "lora_alpha": 24},
    {"use_rslora": True},
    {"target_modules": None},
    {"target_modules": "all-linear"},
    {"target_modules": ["self_attn.q_proj", "model.layers.1.mlp.down_proj"]},
    {"target_modules": ["o_proj", "model.layers.0.mlp.up_proj"], "layers_to_transform": [1]},
    {"target_modules": ["o_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    {"exclude_modules": ["k_proj", "model.layers.0.mlp.up_proj"]},
    {
        "rank_pattern": {"self_attn.q_proj": 2, "model.layers.0.mlp.up_proj": 6, "up_proj": 10},
        "alpha_pattern": {"mlp.up_proj": 3, "q_proj": 5, "1.self_attn.v_proj": 7},
    },
    {
        "use_rslora": True,
        "rank_pattern": {"layers.1.self_attn.k_proj": 3},
        "alpha_pattern": {"k_proj": 2, "layers.1.self_attn.k_proj": 9},
    },
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": "orthogonal"},
]


@pytest.mark.ref
@pytest.mark.parametrize("options", PEFT_CASES)
def test_scales_ranks_and_modules_are_pefts(base, model, tmp_path, options):
    """PEFT builds and saves the adapter, then loads its own file; its layers are the oracle."""
    import torch  # noqa: PLC0415
    from peft import LoraConfig, PeftModel, get_peft_model  # noqa: PLC0415
    from transformers import LlamaForCausalLM  # noqa: PLC0415

    torch.manual_seed(0)
    options = {"r": 8, "lora_alpha": 12, "target_modules": list(PROJECTIONS)} | options
    built = get_peft_model(
        LlamaForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **options)
    )
    built.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), tmp_path)
    theirs = {
        name.removeprefix("base_model.model."): (layer.r["default"], layer.scaling["default"])
        for name, layer in loaded.named_modules()
        if hasattr(layer, "lora_A")
    }
    adapter = read_adapter(tmp_path, model)
    assert theirs == {
        module_path(m.layer, m.projection): (m.rank, m.scale) for m in adapter.modules
    }
    state = loaded.state_dict()
    data = (tmp_path / WEIGHTS).read_bytes()
    for module in adapter.modules:
        for tensor in (module.a, module.b):
            expected = state[tensor.name.replace(".weight", ".default.weight")].numpy()
            found = np.frombuffer(data[tensor.begin : tensor.end], "<f4").reshape(tensor.shape)
            np.testing.assert_array_equal(found, expected)


@pytest.mark.ref
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "lora_only"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
    ],
)
def test_what_peft_saves_and_milpy_does_not_serve_is_refused(base, model, tmp_path, options, named):
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415
    from transformers import LlamaForCausalLM  # noqa: PLC0415

    options = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | options
    built = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(**options))
    built.save_pretrained(tmp_path)
    assert named in refusal(tmp_path, model)


@pytest.mark.ref
def test_the_tests_own_adapters_are_loaded_by_peft(base, tmp_path):
    """helpers.write_adapter stands in for PEFT elsewhere: PEFT must read the same from it."""
    from peft import PeftModel  # noqa: PLC0415
    from transformers import LlamaForCausalLM  # noqa: PLC0415

    patterns = {"rank_pattern": {"mlp.up_proj": 4}, "alpha_pattern": {"q_proj": 3}}
    stored = write_adapter(tmp_path, base, rank=6, alpha=9, rslora=True, **patterns)
    loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), tmp_path)
    state = loaded.state_dict()
    for name, array in stored.items():
        theirs = state[name.replace(".weight", ".default.weight")].numpy()
        np.testing.assert_array_equal(theirs, array)
    assert sum(".lora_A." in name or ".lora_B." in name for name in state) == len(stored)
