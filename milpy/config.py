"""config.json and generation_config.json, read by name into plain frozen structs for the C core.

A model config decides numerics, so nothing in it is skipped in silence. Every key of a family is on
one of three lists: used; known to be harmless; must be neutral (it would change the result in some
family, so any value but its neutral one is refused). A key on no list is named in one warning, and
refused under `strict`. Code named by a config (`auto_map`) is never looked at.

Both generations of keys are read: `rope_theta` + `rope_scaling` + `torch_dtype`, and transformers
5's `rope_parameters` + `dtype`; a file that has both must mean the same by both. Defaults of absent
keys are those of transformers' LlamaConfig, and only where guessing cannot change a shape.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from os.path import exists
from pathlib import Path
from typing import Literal

from milpy.errors import ConfigError, RequestError
from milpy.strict_json import Fields, Json, is_integer, is_number, read_object, show, show_names

MAX_CONFIG_BYTES = 1 << 20
MAX_CONFIG_DEPTH = 16
MAX_POSITION = 1 << 24
MIN_CONTEXT = 2  # a token of a prompt and one of its answer
MAX_VOCAB = 1 << 21
MAX_TOKEN_IDS = 32

# architectures[0] -> model_type. The one place in Python that lists what is served.
ARCHITECTURES = {"LlamaForCausalLM": "llama"}

RopeType = Literal["default", "linear", "dynamic", "llama3"]
ROPE_FIELDS: dict[RopeType, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}

DTYPES = ("float32", "float16", "bfloat16")

# Training, bookkeeping, or generation defaults that old transformers wrote into every config.
# fmt: off
HARMLESS = frozenset({
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_flash_attn_2_enabled",
    "_name_or_path", "attn_implementation", "attention_dropout", "auto_map", "bad_words_ids",
    "begin_suppress_tokens", "classifier_dropout", "decoder_start_token_id", "diversity_penalty",
    "do_sample", "early_stopping", "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id",
    "forced_eos_token_id", "gradient_checkpointing", "hidden_dropout", "id2label",
    "initializer_range", "is_decoder", "keys_to_ignore_at_inference", "label2id", "length_penalty",
    "max_length", "max_sequence_length", "min_length", "no_repeat_ngram_size", "num_beam_groups",
    "num_beams", "num_labels", "num_return_sequences", "output_attentions", "output_hidden_states",
    "output_scores", "prefix", "problem_type", "remove_invalid_values", "repetition_penalty",
    "resid_pdrop", "return_dict", "return_dict_in_generate", "sep_token_id", "suppress_tokens",
    "task_specific_params", "temperature", "tf_legacy_loss", "tokenizer_class", "top_k", "top_p",
    "torchscript", "transformers_version", "typical_p", "unsloth_fixed", "unsloth_version",
    "use_bfloat16", "use_cache",
})
# fmt: on

# Keys that change numerics in some family, with the values that change nothing in Llama; null is
# neutral for all of them.
NEUTRAL: dict[str, tuple[Json, ...]] = {
    "add_cross_attention": (False,),
    "alibi": (False,),
    "attention_multiplier": (),
    "attn_logit_softcapping": (),
    "attn_temperature_tuning": (False,),
    "bias": (False,),
    "chunk_size_feed_forward": (0,),
    "clip_qkv": (),
    "cross_attention_hidden_size": (),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (),
    "is_encoder_decoder": (False,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "mlp_bias": (False,),
    "n_routed_experts": (0,),
    "no_rope_layers": ([],),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "original_max_position_embeddings": (),
    "parallel_residual": (False,),
    "partial_rotary_factor": (1,),
    "per_layer_config": (),
    "pretraining_tp": (1,),
    "pruned_heads": ({},),
    "qk_layernorm": (False,),
    "qk_norm": (False,),
    "qkv_bias": (False,),
    "quantization_config": (),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1,),
    "scale_emb": (1,),
    "sliding_window": (),
    "tie_encoder_decoder": (False,),
    "use_alibi": (False,),
    "use_parallel_residual": (False,),
    "use_qk_norm": (False,),
    "use_sliding_window": (False,),
}


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding. Fields that the type does not use hold neutral values."""

    type: RopeType
    theta: float
    factor: float  # linear, dynamic, llama3
    low_freq_factor: float  # llama3
    high_freq_factor: float  # llama3
    original_max_position_embeddings: int  # llama3; max_position_embeddings otherwise


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What the C core needs to know of a model; names as Hugging Face has them."""

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    hidden_act: str
    tie_word_embeddings: bool
    attention_bias: bool  # q, k, v and o carry a bias
    mlp_bias: bool
    dtype: str | None  # as declared: "float32", "float16", "bfloat16", or None
    rope: RopeConfig
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    pad_token_id: int | None

    @property
    def max_context_length(self) -> int:
        """The longest context whose positions this rope type defines without change of frequencies.

        `linear` divides positions by its factor, so it reaches factor times the declared length.
        `dynamic` equals `default` up to the declared length and changes with every longer context.
        """
        if self.rope.type == "linear":
            return min(int(self.max_position_embeddings * self.rope.factor), MAX_POSITION)
        return self.max_position_embeddings

    def context_length(self, requested: int | None = None) -> int:
        """The context to serve: `requested` where it fits, the declared length where it is None.

        What is requested is an option, max_model_len, and not of the file.
        """
        if requested is None:
            return self.max_position_embeddings
        limit = self.max_context_length
        if requested > limit and self.rope.type == "dynamic":
            raise RequestError(
                f"max_model_len is {requested}, expected at most {limit}: rope type dynamic is "
                "served up to max_position_embeddings, where it equals default"
            )
        if not MIN_CONTEXT <= requested <= limit:
            raise RequestError(f"max_model_len is {requested}, expected {MIN_CONTEXT}..{limit}")
        return requested

    def kv_bytes_per_token(self, element_bytes: int = 2) -> int:
        """Bytes of K and V over all layers and KV heads for one token."""
        width = self.num_key_value_heads * self.head_dim
        return 2 * self.num_hidden_layers * width * element_bytes


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """generation_config.json's say on special tokens; None where it says nothing."""

    eos_token_ids: tuple[int, ...] | None = None
    bos_token_id: int | None = None
    pad_token_id: int | None = None


def read_model_config(folder: str | Path, *, strict: bool = False) -> ModelConfig:
    """`folder`/config.json. ConfigError says what was found and what was expected.

    A key that milpy does not know is named in one warning line, or refused with `strict`.
    """
    path = Path(folder) / "config.json"
    fields = Fields(_read(path), str(path), ConfigError)
    architecture = _read_architecture(fields)
    _check_neutral(fields)
    heads = fields.integer("num_attention_heads", 1, 1 << 14)
    kv_heads = heads
    if fields.has("num_key_value_heads"):
        kv_heads = fields.integer("num_key_value_heads", 1, heads)
    if heads % kv_heads:
        fields.fail("num_key_value_heads", f"a divisor of num_attention_heads, {heads}")
    hidden = fields.integer("hidden_size", 1, 1 << 20)
    vocab = fields.integer("vocab_size", 1, MAX_VOCAB)
    max_position = fields.integer("max_position_embeddings", 1, MAX_POSITION)
    config = ModelConfig(
        architecture=architecture,
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size", 1, 1 << 21),
        num_hidden_layers=fields.integer("num_hidden_layers", 1, 512),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=_read_head_dim(fields, hidden, heads),
        vocab_size=vocab,
        max_position_embeddings=max_position,
        rms_norm_eps=_read_eps(fields),
        hidden_act=fields.string("hidden_act", ("silu",)) if fields.has("hidden_act") else "silu",
        tie_word_embeddings=_read_flag(fields, "tie_word_embeddings"),
        attention_bias=_read_flag(fields, "attention_bias"),
        mlp_bias=False,
        dtype=_read_dtype(fields),
        rope=_read_rope(fields, max_position),
        eos_token_ids=_read_eos(fields, vocab),
        bos_token_id=_read_token(fields, "bos_token_id", vocab, absent=1),
        pad_token_id=_read_pad(fields, vocab),
    )
    unknown = fields.left_over(HARMLESS)
    if unknown and strict:
        raise ConfigError(
            f"{path}: has {show_names(unknown)}, expected only keys that milpy knows (strict)"
        )
    if unknown:
        warnings.warn(f"{path}: ignored unknown keys: {show_names(unknown, 20)}", stacklevel=2)
    return config


def read_generation_config(folder: str | Path, *, vocab_size: int = MAX_VOCAB) -> GenerationConfig:
    """`folder`/generation_config.json; all None where there is no such file."""
    path = Path(folder) / "generation_config.json"
    if not exists(path):
        return GenerationConfig()
    fields = Fields(_read(path), str(path), ConfigError)
    return GenerationConfig(
        eos_token_ids=(
            _token_ids(fields, "eos_token_id", vocab_size) if fields.has("eos_token_id") else None
        ),
        bos_token_id=_read_token(fields, "bos_token_id", vocab_size, absent=None),
        pad_token_id=_read_pad(fields, vocab_size),
    )


def eos_token_ids(config: ModelConfig, generation: GenerationConfig) -> tuple[int, ...]:
    """The tokens that end an answer: generation_config.json's list, else config.json's."""
    if generation.eos_token_ids is not None:
        return generation.eos_token_ids
    return config.eos_token_ids


def _read(path: Path) -> dict[str, Json]:
    return read_object(
        path, max_bytes=MAX_CONFIG_BYTES, max_depth=MAX_CONFIG_DEPTH, error=ConfigError
    )


def _read_architecture(fields: Fields) -> str:
    expected = "a list of one of " + ", ".join(map(show, ARCHITECTURES))
    names = fields.raw("architectures")
    if not isinstance(names, list) or len(names) != 1:
        fields.fail("architectures", expected)
    name = names[0]
    if not isinstance(name, str) or name not in ARCHITECTURES:
        fields.fail("architectures", expected)
    fields.string("model_type", (ARCHITECTURES[name],))
    return name


def _check_neutral(fields: Fields) -> None:
    for key, values in NEUTRAL.items():
        value = fields.raw(key)
        if value is None or any(_same(value, neutral) for neutral in values):
            continue
        fields.fail(key, " or ".join(map(show, (None, *values))))
    layer_types = fields.raw("layer_types")
    if layer_types is not None and (
        not isinstance(layer_types, list)
        or not all(_same(kind, "full_attention") for kind in layer_types)
    ):
        fields.fail("layer_types", 'null or a list of "full_attention"')


def _same(value: Json, other: Json) -> bool:
    """Equal as JSON values: 1 is 1.0, but true is not 1."""
    if is_number(value) and is_number(other):
        return value == other
    return type(value) is type(other) and value == other


def _read_head_dim(fields: Fields, hidden: int, heads: int) -> int:
    if fields.has("head_dim"):
        head_dim = fields.integer("head_dim", 32, 256)
    elif hidden % heads:
        fields.fail("head_dim", f"given: hidden_size {hidden} is no multiple of {heads} heads")
    else:
        head_dim = hidden // heads
    if head_dim % 8 or not 32 <= head_dim <= 256:
        expected = "a multiple of 8 in 32..256"
        if fields.has("head_dim"):
            fields.fail("head_dim", expected)
        fields.fail("hidden_size", f"head_dim {expected}, and {hidden} / {heads} is {head_dim}")
    return head_dim


def _read_eps(fields: Fields) -> float:
    if not fields.has("rms_norm_eps"):
        return 1e-6
    eps = fields.number("rms_norm_eps", 0, 0.1)
    # The core holds it in fp32; below the smallest normal number it would be no guard at all.
    if not 1.2e-38 < eps < 0.1:
        fields.fail("rms_norm_eps", "above 0 and below 0.1")
    return eps


def _read_flag(fields: Fields, key: str) -> bool:
    return fields.boolean(key) if fields.has(key) else False


def _read_dtype(fields: Fields) -> str | None:
    old = fields.string("torch_dtype", DTYPES) if fields.has("torch_dtype") else None
    new = fields.string("dtype", DTYPES) if fields.has("dtype") else None
    if old is not None and new is not None and old != new:
        fields.fail("dtype", f"the same as torch_dtype, {show(old)}")
    return new or old


def _token_ids(fields: Fields, key: str, vocab: int) -> tuple[int, ...]:
    """One id or a list of them, each inside the vocabulary."""
    expected = f"an integer in 0..{vocab - 1} or a list of at most {MAX_TOKEN_IDS} of them"
    value = fields.raw(key)
    ids = value if isinstance(value, list) else [value]
    if len(ids) > MAX_TOKEN_IDS:
        fields.fail(key, expected)
    tokens: list[int] = []
    for token in ids:
        if not is_integer(token) or not 0 <= token < vocab:
            fields.fail(key, expected)
        tokens.append(token)
    return tuple(dict.fromkeys(tokens))


def _read_eos(fields: Fields, vocab: int) -> tuple[int, ...]:
    # LlamaConfig's default where the key is absent; null says that there is none.
    if "eos_token_id" not in fields.values:
        return (2,) if vocab > 2 else ()
    return _token_ids(fields, "eos_token_id", vocab) if fields.has("eos_token_id") else ()


def _read_token(fields: Fields, key: str, vocab: int, *, absent: int | None) -> int | None:
    if key not in fields.values:
        return absent if absent is not None and absent < vocab else None
    if not fields.has(key):
        return None
    ids = _token_ids(fields, key, vocab)
    if len(ids) != 1:
        fields.fail(key, "one token id")
    return ids[0]


def _read_pad(fields: Fields, vocab: int) -> int | None:
    # The first Llama conversions wrote -1 for "no padding token".
    if _same(fields.raw("pad_token_id"), -1):
        return None
    return _read_token(fields, "pad_token_id", vocab, absent=None)


def _read_rope(fields: Fields, max_position: int) -> RopeConfig:
    """RoPE by either generation of keys; where both are there, they must mean the same."""
    theta = _read_theta(fields) if fields.has("rope_theta") else None
    found = [
        _read_rope_object(fields, key, theta, max_position)
        for key in ("rope_parameters", "rope_scaling")
        if fields.has(key)
    ]
    if not found:
        return _rope("default", 10000.0 if theta is None else theta, max_position)
    if found[0] != found[-1]:
        fields.fail("rope_parameters", "the same meaning as rope_scaling and rope_theta")
    return found[0]


def _read_theta(fields: Fields) -> float:
    theta = fields.number("rope_theta", 0, 1e30)
    if theta == 0:
        fields.fail("rope_theta", "a number above 0")
    return theta


def _read_rope_object(
    outer: Fields, key: str, outer_theta: float | None, max_position: int
) -> RopeConfig:
    fields = Fields(outer.object(key), f"{outer.source}: {key}", ConfigError)
    kind = _read_rope_type(fields, has_default=key == "rope_parameters")
    theta = _read_theta(fields) if fields.has("rope_theta") else outer_theta
    if outer_theta is not None and theta != outer_theta:
        fields.fail("rope_theta", f"the same as the config's own rope_theta, {outer_theta:g}")
    partial = fields.raw("partial_rotary_factor")
    if partial is not None and not _same(partial, 1):
        fields.fail("partial_rotary_factor", "null or 1")
    wanted = ROPE_FIELDS[kind]
    factor = fields.number("factor", 1, 1 << 24) if "factor" in wanted else 1.0
    low, high, original = 1.0, 1.0, max_position
    if kind == "llama3":
        low = fields.number("low_freq_factor", 1e-6, 1e6)
        high = fields.number("high_freq_factor", 1e-6, 1e6)
        original = fields.integer("original_max_position_embeddings", 1, MAX_POSITION)
        if low >= high:
            fields.fail("high_freq_factor", f"above low_freq_factor, {low:g}")
    for extra in fields.left_over():
        if fields.has(extra):
            fields.fail(
                extra, f"absent: rope_type {kind} takes {', '.join(('rope_theta', *wanted))}"
            )
    return _rope(kind, 10000.0 if theta is None else theta, original, factor, low, high)


def _rope(
    kind: RopeType,
    theta: float,
    original: int,
    factor: float = 1.0,
    low: float = 1.0,
    high: float = 1.0,
) -> RopeConfig:
    return RopeConfig(
        type=kind,
        theta=theta,
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=original,
    )


def _read_rope_type(fields: Fields, *, has_default: bool) -> RopeType:
    """`rope_type`, or `type` as it was once called; transformers 5 leaves `default` out."""
    found = [fields.string(key) for key in ("rope_type", "type") if fields.has(key)]
    if not found and has_default:
        return "default"
    if not found or found[0] != found[-1]:
        fields.fail("rope_type", "one name of a rope type")
    for kind in ROPE_FIELDS:
        if kind == found[0]:
            return kind
    fields.fail(
        "rope_type" if fields.has("rope_type") else "type",
        "one of " + ", ".join(map(show, ROPE_FIELDS)),
    )
