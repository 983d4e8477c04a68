"""config.json: what each family of files means, and that every odd value gets a named error."""

import copy
import json
import re
import warnings

import pytest
from helpers.tiny_llama import llama_config

from milpy.config import (
    HARMLESS,
    NEUTRAL,
    GenerationConfig,
    eos_token_ids,
    read_generation_config,
    read_model_config,
)
from milpy.errors import ConfigError, RequestError

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def write(folder, config, name="config.json"):
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / name).write_text(text)
    return folder


def read(folder, config, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return read_model_config(write(folder, config), **options)


def refusal(folder, config, **options):
    with pytest.raises(ConfigError) as info:
        read(folder, config, **options)
    return str(info.value)


def without(config, *keys):
    return {key: value for key, value in config.items() if key not in keys}


# ---- what a good file means ----


def test_reads_every_field(tmp_path):
    config = read(
        tmp_path,
        llama_config(
            hidden=96, ffn=200, layers=3, heads=6, kv_heads=3, head_dim=40, vocab=500,
            max_positions=777, bias=True, tied=True, dtype="F16",
        )
        | {"eos_token_id": [7, 9, 7], "bos_token_id": 0, "pad_token_id": 499},
        strict=True,
    )  # fmt: skip
    assert config.architecture == "LlamaForCausalLM"
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (96, 200, 3)
    assert (config.num_attention_heads, config.num_key_value_heads) == (6, 3)
    assert (config.head_dim, config.vocab_size, config.max_position_embeddings) == (40, 500, 777)
    assert (config.rms_norm_eps, config.hidden_act, config.dtype) == (1e-5, "silu", "float16")
    assert (config.tie_word_embeddings, config.attention_bias, config.mlp_bias) == (
        True,
        True,
        False,
    )
    assert config.eos_token_ids == (7, 9)
    assert (config.bos_token_id, config.pad_token_id) == (0, 499)
    assert config.kv_bytes_per_token() == 2 * 3 * 3 * 40 * 2


def test_absent_keys_take_llama_defaults(tmp_path):
    full = llama_config(hidden=128, heads=4, kv_heads=4, head_dim=32)
    optional = (
        "num_key_value_heads head_dim rms_norm_eps hidden_act tie_word_embeddings attention_bias "
        "mlp_bias dtype rope_parameters eos_token_id bos_token_id pad_token_id"
    ).split()
    config = read(tmp_path, without(full, *optional), strict=True)
    assert (config.num_key_value_heads, config.head_dim, config.rms_norm_eps) == (4, 32, 1e-6)
    assert (config.tie_word_embeddings, config.attention_bias, config.dtype) == (False, False, None)
    assert (config.eos_token_ids, config.bos_token_id, config.pad_token_id) == ((2,), 1, None)
    assert (config.rope.type, config.rope.theta) == ("default", 10000.0)


@pytest.mark.parametrize(
    "rope",
    [
        None,
        {"rope_theta": 1e6},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 2, "rope_theta": 5e5},
        LLAMA3_ROPE,
    ],
)
def test_old_and_new_keys_mean_the_same(tmp_path, rope):
    new = read(tmp_path, llama_config(rope=rope), strict=True)
    assert read(tmp_path, llama_config(rope=rope, old_keys=True), strict=True) == new
    wanted = {"rope_type": "default", "rope_theta": 10000.0, **(rope or {})}
    assert (new.rope.type, new.rope.theta) == (wanted["rope_type"], wanted["rope_theta"])
    assert new.rope.factor == wanted.get("factor", 1.0)
    assert new.rope.original_max_position_embeddings == wanted.get(
        "original_max_position_embeddings", 512
    )
    # Both generations in one file: the same, said twice.
    both = llama_config(rope=rope) | llama_config(rope=rope, old_keys=True)
    assert read(tmp_path, both, strict=True) == new


def test_first_name_of_rope_type_is_read(tmp_path):
    config = llama_config(old_keys=True) | {"rope_scaling": {"type": "linear", "factor": 2.0}}
    assert read(tmp_path, config).rope.type == "linear"
    config["rope_scaling"]["rope_type"] = "linear"
    assert read(tmp_path, config).rope.factor == 2.0


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        (None, 512),
        ({"rope_type": "linear", "factor": 2.5}, 1280),
        ({"rope_type": "dynamic", "factor": 4.0}, 512),
        (LLAMA3_ROPE, 512),
    ],
)
def test_context_length_is_what_the_rope_type_defines(tmp_path, rope, limit):
    config = read(tmp_path, llama_config(rope=rope, max_positions=512))
    assert config.max_context_length == limit
    assert config.context_length() == 512
    assert config.context_length(limit) == limit
    name = "rope type dynamic" if config.rope.type == "dynamic" else "expected 2.."
    with pytest.raises(RequestError, match=f"max_model_len is .*{name}"):
        config.context_length(limit + 1)
    with pytest.raises(RequestError, match=r"^max_model_len is 1, expected 2\.\."):
        config.context_length(1)


# ---- one rule, one refusal ----

REFUSALS = [
    ({"architectures": ["MistralForCausalLM"]}, '"MistralForCausalLM"', "LlamaForCausalLM"),
    ({"architectures": []}, "architectures", "LlamaForCausalLM"),
    ({"architectures": ["LlamaForCausalLM"] * 2}, "architectures", "LlamaForCausalLM"),
    ({"model_type": "mistral"}, 'model_type is "mistral"', '"llama"'),
    ({"hidden_size": 64.0}, "hidden_size is 64.0", "an integer"),
    ({"hidden_size": "64"}, 'hidden_size is "64"', "an integer"),
    ({"hidden_size": 2**20 + 1}, "hidden_size", "1..1048576"),
    ({"intermediate_size": 2**21 + 1}, "intermediate_size", "1..2097152"),
    ({"num_hidden_layers": 513}, "num_hidden_layers is 513", "1..512"),
    ({"vocab_size": 2**21 + 1}, "vocab_size", "1..2097152"),
    ({"max_position_embeddings": 2**24 + 1}, "max_position_embeddings", "1..16777216"),
    ({"num_key_value_heads": 3}, "num_key_value_heads is 3", "num_attention_heads, 4"),
    ({"num_key_value_heads": 8}, "num_key_value_heads is 8", "1..4"),
    ({"head_dim": 36}, "head_dim is 36", "a multiple of 8 in 32..256"),
    ({"head_dim": 24}, "head_dim is 24", "32..256"),
    ({"head_dim": 264}, "head_dim is 264", "32..256"),
    ({"head_dim": None}, "hidden_size is 64", "64 / 4 is 16"),
    ({"head_dim": None, "hidden_size": 65}, "head_dim is null", "65 is no multiple of 4"),
    ({"rms_norm_eps": 0.1}, "rms_norm_eps is 0.1", "below 0.1"),
    ({"rms_norm_eps": 1e-300}, "rms_norm_eps", "above 0"),
    ({"hidden_act": "gelu"}, 'hidden_act is "gelu"', '"silu"'),
    ({"dtype": "float64"}, 'dtype is "float64"', "bfloat16"),
    ({"torch_dtype": "float16"}, 'dtype is "bfloat16"', 'torch_dtype, "float16"'),
    ({"eos_token_id": 256}, "eos_token_id is 256", "0..255"),
    ({"eos_token_id": [1, True]}, "eos_token_id", "0..255"),
    ({"eos_token_id": list(range(33))}, "eos_token_id", "at most 32"),
    ({"bos_token_id": [1, 2]}, "bos_token_id is [1, 2]", "one token id"),
    ({"pad_token_id": -2}, "pad_token_id is -2", "0..255"),
    ({"rope_theta": 20000.0}, "rope_theta is 10000.0", "20000"),
    ({"rope_theta": True}, "rope_theta is true", "a number"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_parameters", "rope_scaling"),
    ({"rope_scaling": {"factor": 2.0}}, "rope_type is absent", "rope type"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, '"yarn"', "llama3"),
    ({"rope_parameters": {"type": "su"}}, 'type is "su"', "llama3"),
    ({"rope_parameters": {"type": "linear", "rope_type": "default"}}, "rope_type", "one name"),
    ({"rope_parameters": {"rope_type": "linear"}}, "factor is absent", "a number in 1.."),
    ({"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, "factor is 0.5", "1.."),
    ({"rope_parameters": {"factor": 2.0}}, "factor is 2.0", "type default takes"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor", "null or 1"),
    ({"rope_parameters": {"full_attention": {}}}, "full_attention", "type default takes"),
    ({"rope_parameters": LLAMA3_ROPE | {"low_freq_factor": 4}}, "high_freq_factor is 4.0", "4"),
    ({"rope_parameters": LLAMA3_ROPE | {"low_freq_factor": 0}}, "low_freq_factor is 0", "number"),
    ({"rope_parameters": without(LLAMA3_ROPE, "original_max_position_embeddings")},
     "original_max_position_embeddings is absent", "an integer"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types", "full_attention"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config", "null"),
    ({"sliding_window": 4096}, "sliding_window is 4096", "null"),
    ({"pretraining_tp": 2}, "pretraining_tp is 2", "null or 1"),
    ({"mlp_bias": True}, "mlp_bias is true", "null or false"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "found", "expected"), REFUSALS)
def test_refusal_says_found_and_expected(tmp_path, change, found, expected):
    message = refusal(tmp_path, llama_config() | change)
    assert message.startswith(str(tmp_path / "config.json"))
    assert found in message.split(", expected ")[0]
    assert expected in message.split(", expected ")[1]


@pytest.mark.parametrize("key", sorted(NEUTRAL))
def test_a_key_that_changes_numerics_elsewhere_must_be_neutral(tmp_path, key):
    config = llama_config()
    for neutral in (None, *NEUTRAL[key]):
        read(tmp_path, config | {key: neutral}, strict=True)
    for value in (7, 0.5, "yes", [3], {"a": 1}):
        assert f"{key} is " in refusal(tmp_path, config | {key: value})


def test_harmless_keys_pass_whatever_they_hold(tmp_path):
    config = llama_config() | dict.fromkeys(HARMLESS, {"anything": [1]})
    read(tmp_path, config, strict=True)


def test_auto_map_runs_nothing(tmp_path):
    canary = tmp_path / "canary"
    (tmp_path / "modeling.py").write_text(f"open({str(canary)!r}, 'w')")
    config = llama_config() | {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}}
    read(tmp_path, config, strict=True)
    assert not canary.exists()


def test_unknown_keys_are_one_warning_or_an_error_when_strict(tmp_path):
    config = llama_config() | {"my_note": 1, "other_note": None}
    write(tmp_path, config)
    with pytest.warns(UserWarning, match='unknown keys: "my_note", "other_note"') as caught:
        read_model_config(tmp_path)
    assert len(caught) == 1
    assert '"my_note", "other_note"' in refusal(tmp_path, config, strict=True)


def test_bad_files(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json: cannot be opened"):
        read_model_config(tmp_path)
    assert "at most 1048576" in refusal(tmp_path, "{}" + " " * 2**20)
    assert "expected an object" in refusal(tmp_path, "[]")
    assert "deeper than 16" in refusal(tmp_path, "[" * 17 + "]" * 17)
    assert "twice" in refusal(tmp_path, '{"hidden_size": 1, "hidden_size": 1}')
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ConfigError, match="regular file"):
        read_model_config(tmp_path)


# ---- every field at every odd value ----

ABSENT = object()
ODD = {
    "absent": ABSENT, "null": None, "0": 0, "-1": -1, "2^31": 2**31, "2^63": 2**63, "1e309": None,
    '""': "", "[]": [], "{}": {}, "true": True,
}  # fmt: skip
OPTIONAL = {"absent", "null"}
# What is accepted, by key; every other pair must be refused with the key in the message.
ACCEPTED = {
    "num_key_value_heads": OPTIONAL,
    "head_dim": OPTIONAL,
    "rms_norm_eps": OPTIONAL,
    "hidden_act": OPTIONAL,
    "tie_word_embeddings": OPTIONAL | {"true"},
    "attention_bias": OPTIONAL | {"true"},
    "mlp_bias": OPTIONAL,
    "pretraining_tp": OPTIONAL,
    "dtype": OPTIONAL,
    "torch_dtype": OPTIONAL,
    "rope_theta": OPTIONAL | {"2^31", "2^63"},
    "rope_scaling": OPTIONAL,
    "rope_parameters": OPTIONAL | {"{}"},
    "rope_parameters.rope_type": OPTIONAL,
    "rope_parameters.rope_theta": OPTIONAL | {"2^31", "2^63"},
    "rope_scaling.rope_theta": OPTIONAL,
    # null and absent are no end at all; id 0 is a token.
    "eos_token_id": OPTIONAL | {"0", "[]"},
    "bos_token_id": OPTIONAL | {"0"},
    # -1 is how the first conversions wrote "none".
    "pad_token_id": OPTIONAL | {"0", "-1"},
}

CORPUS = [
    llama_config(hidden=hidden, ffn=ffn, layers=layers, heads=heads, kv_heads=kv_heads,
                 head_dim=hidden // heads, vocab=vocab, max_positions=positions, rope=rope,
                 tied=tied, old_keys=old)
    for hidden, ffn, layers, heads, kv_heads, vocab, positions, rope, tied in [
        (4096, 11008, 32, 32, 32, 32000, 4096, None, False),
        (5120, 13824, 40, 40, 40, 32000, 4096, {"rope_type": "linear", "factor": 4.0}, False),
        (8192, 28672, 80, 64, 8, 32000, 4096, {"rope_type": "dynamic", "factor": 2.0}, False),
        (4096, 14336, 32, 32, 8, 128256, 8192, {"rope_theta": 5e5}, False),
        (4096, 14336, 32, 32, 8, 128256, 131072, LLAMA3_ROPE, False),
        (2048, 8192, 16, 32, 8, 128256, 131072, LLAMA3_ROPE | {"factor": 32.0}, True),
        (3072, 8192, 28, 24, 8, 128256, 131072, LLAMA3_ROPE, True),
        (2048, 5632, 22, 32, 4, 32000, 2048, None, False),
        (576, 1536, 30, 9, 3, 49152, 2048, {"rope_theta": 1e5}, True),
        (16384, 53248, 126, 128, 8, 128256, 131072, LLAMA3_ROPE, False),
    ]
    for old in (False, True)
]  # fmt: skip


def paths(config):
    for key, value in config.items():
        yield (key,)
        if isinstance(value, dict):
            yield from ((key, inner) for inner in value)


def mutated(config, path, label):
    """The text of `config` with one field odd. 1e309 is written as text: no float holds it."""
    config = copy.deepcopy(config)
    *outer, last = path
    target = config[outer[0]] if outer else config
    if label == "absent":
        del target[last]
    else:
        target[last] = "@" if label == "1e309" else ODD[label]
    return json.dumps(config).replace('"@"', "1e309")


def is_accepted(path, label, config):
    if label == "1e309":
        return False
    name = ".".join(path)
    if name == "rope_scaling" and config[name] is None:
        return label in ACCEPTED[name]
    if path[-1] == "rope_type" and config[path[0]]["rope_type"] != "default":
        return False
    return path[-1] in HARMLESS or label in ACCEPTED.get(name, ())


@pytest.mark.parametrize("number", range(len(CORPUS)))
def test_each_field_at_each_odd_value_is_accepted_by_the_table_or_refused_by_name(tmp_path, number):
    config = CORPUS[number]
    read(tmp_path, config, strict=True)
    n_cases = 0
    for path in paths(config):
        for label in ODD:
            write(tmp_path, mutated(config, path, label))
            n_cases += 1
            try:
                read_model_config(tmp_path, strict=True)
                message = None
            except ConfigError as problem:
                message = str(problem)
            assert (message is None) == is_accepted(path, label, config), (path, label, message)
            if message is not None:
                named = "1e309" if label == "1e309" else path[-1]
                assert re.search(rf"\b{named}\b", message), (path, label, message)
                assert len(message) < 400
    assert n_cases >= 11 * 25


# ---- generation_config.json ----


def test_generation_config_gives_the_end_tokens(tmp_path):
    config = read(tmp_path, llama_config() | {"eos_token_id": 2})
    none = read_generation_config(tmp_path)
    assert none == GenerationConfig()
    assert eos_token_ids(config, none) == (2,)
    write(tmp_path, {"eos_token_id": [5, 2], "temperature": 0.6}, "generation_config.json")
    generation = read_generation_config(tmp_path, vocab_size=config.vocab_size)
    assert eos_token_ids(config, generation) == (5, 2)
    write(tmp_path, {"eos_token_id": None}, "generation_config.json")
    assert eos_token_ids(config, read_generation_config(tmp_path)) == (2,)


@pytest.mark.parametrize("value", [256, -1, True, "2", 2.0, {}, [300], list(range(33))])
def test_generation_config_ids_are_in_the_vocabulary(tmp_path, value):
    write(tmp_path, {"eos_token_id": value}, "generation_config.json")
    with pytest.raises(ConfigError, match=r"generation_config\.json: eos_token_id is "):
        read_generation_config(tmp_path, vocab_size=256)


# ---- what transformers writes today ----


@pytest.mark.ref
@pytest.mark.parametrize("rope", [None, {"rope_type": "linear", "factor": 2.0}, LLAMA3_ROPE])
def test_reads_what_transformers_saves_without_a_word(tmp_path, rope):
    import transformers  # noqa: PLC0415

    shape = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    saved = transformers.LlamaConfig(
        **shape, rope_parameters=rope, architectures=["LlamaForCausalLM"], dtype="bfloat16"
    )
    saved.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = read_model_config(tmp_path, strict=True)
    for key in (*shape, "head_dim", "vocab_size", "rms_norm_eps", "max_position_embeddings"):
        assert getattr(config, key) == getattr(saved, key)
    for key, value in saved.rope_parameters.items():
        assert getattr(config.rope, key.removeprefix("rope_")) == value
    assert (config.eos_token_ids, config.dtype) == ((saved.eos_token_id,), "bfloat16")
