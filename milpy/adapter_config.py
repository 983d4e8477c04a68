"""adapter_config.json: which modules a PEFT LoRA adapts, and with what rank and scale.

What PEFT would apply is applied exactly: alpha/r or alpha/sqrt(r), rank_pattern, alpha_pattern,
target_modules, layers_to_transform (peft 0.21: LoraConfig, get_pattern_key,
check_target_module_exists). What milpy does not honour is refused by name: DoRA, biases, saved
modules, embeddings and heads, initialisations that changed the base, keys that it does not know.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Literal, TypeVar, get_args

from milpy.config import ModelConfig
from milpy.errors import AdapterError
from milpy.strict_json import Fields, Json, is_integer, is_number, read_object, show

CONFIG_FILE = "adapter_config.json"
MAX_CONFIG_BYTES = 1 << 20
MAX_CONFIG_DEPTH = 16
MAX_RANK = 512
MAX_ALPHA = 1e6
SMALLEST_NORMAL = 1.1754943508222875e-38  # of fp32

T = TypeVar("T")

Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROJECTIONS: tuple[Projection, ...] = get_args(Projection)
ATTENTION = PROJECTIONS[:4]

# PEFT's choice for Llama where target_modules is null.
DEFAULT_TARGETS = ("q_proj", "v_proj")

# Modules of a Llama that PEFT can adapt and milpy does not serve yet.
UNSERVED_MODULES = ("lm_head", "model.embed_tokens")

# Each changes the maths; absent, false, null, empty and "none" are neutral.
NEUTRAL = (
    "alora_invocation_tokens",
    "arrow_config",
    "bias",
    "ensure_weight_tying",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "lora_ga_config",
    "megatron_config",
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
)

# Training, bookkeeping, or parameters of what NEUTRAL refuses.
HARMLESS = frozenset(
    {
        "auto_mapping",
        "corda_config",
        "eva_config",
        "inference_mode",
        "loftq_config",
        "lora_dropout",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
    }
)

# Initialisations that left the base weights as they were. Others (pissa, olora, corda, loftq, ...)
# subtracted their start from the base, so that an unconverted adapter fits only that residual.
INITIALISATIONS = ("gaussian", "orthogonal", "eva")


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What an adapter's config says of each module."""

    targets: frozenset[str]  # paths of the modules that carry LoRA
    base_model_name: str | None  # as declared, for messages only
    r: int
    alpha: float
    rank_pattern: Mapping[str, tuple[int, int]]  # key: position in the file, rank
    alpha_pattern: Mapping[str, tuple[int, float]]
    use_rslora: bool

    def rank(self, path: str) -> int:
        return _first_hit(self.rank_pattern, path, self.r)

    def scale(self, path: str) -> float:
        rank = self.rank(path)
        alpha = _first_hit(self.alpha_pattern, path, self.alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def module_path(layer: int, projection: Projection) -> str:
    """A module's path as PEFT sees it: model.layers.3.mlp.up_proj."""
    block = "self_attn" if projection in ATTENTION else "mlp"
    return f"model.layers.{layer}.{block}.{projection}"


def read_adapter_config(
    folder: Path, config: ModelConfig, *, allow_adapter_keys: Collection[str] = ()
) -> AdapterConfig:
    """Read `folder`/adapter_config.json for the base that `config` describes.

    AdapterError says what was found and expected. `allow_adapter_keys` names keys that milpy does
    not know and the caller does.
    """
    path = folder / CONFIG_FILE
    values = read_object(
        path, max_bytes=MAX_CONFIG_BYTES, max_depth=MAX_CONFIG_DEPTH, error=AdapterError
    )
    fields = Fields(values, str(path), AdapterError)
    _refuse_unserved(fields)
    suffixes = _known_suffixes(config)
    name = fields.raw("base_model_name_or_path")
    result = AdapterConfig(
        targets=_resolve_targets(fields, config),
        base_model_name=name if isinstance(name, str) else None,
        r=fields.integer("r", 1, MAX_RANK) if "r" in values else 8,
        alpha=(
            _alpha(fields, "lora_alpha", fields.raw("lora_alpha"))
            if "lora_alpha" in values
            else 8.0
        ),
        rank_pattern=_rank_pattern(fields, suffixes),
        alpha_pattern=_alpha_pattern(fields, suffixes),
        use_rslora=fields.boolean("use_rslora") if fields.has("use_rslora") else False,
    )
    for key in fields.left_over(HARMLESS):
        if key not in allow_adapter_keys and not _is_neutral(values[key]):
            fields.fail(
                key, f"a key that milpy knows, or its name in allow_adapter_keys=[{show(key)}]"
            )
    return result


def _refuse_unserved(fields: Fields) -> None:
    """Refuse what would change the maths in a way that milpy does not apply."""
    fields.string("peft_type", ("LORA",))
    if fields.has("task_type"):
        fields.string("task_type", ("CAUSAL_LM",))
    for key in NEUTRAL:
        if not _is_neutral(fields.raw(key)):
            fields.fail(key, "absent, false, null or empty: milpy does not apply it")
    start = fields.raw("init_lora_weights")
    if not (start is None or isinstance(start, bool) or start in INITIALISATIONS):
        known = ", ".join(map(show, INITIALISATIONS))
        fields.fail(
            "init_lora_weights",
            f"true, false, {known}: others change the base weights; convert the adapter first",
        )


def _is_neutral(value: Json) -> bool:
    return value is None or value is False or value in ([], {}, "", "none")


def _known_suffixes(config: ModelConfig) -> set[str]:
    """Every name by which a pattern may mean a module of this base."""
    paths = [
        module_path(layer, projection)
        for layer in range(config.num_hidden_layers)
        for projection in PROJECTIONS
    ]
    return {suffix for path in (*paths, *UNSERVED_MODULES) for suffix in _suffixes(path)}


def _rank_pattern(fields: Fields, suffixes: Collection[str]) -> dict[str, tuple[int, int]]:
    ranks: dict[str, tuple[int, int]] = {}
    for position, (key, rank) in enumerate(_pattern(fields, "rank_pattern", suffixes).items()):
        if not is_integer(rank) or not 1 <= rank <= MAX_RANK:
            fields.fail("rank_pattern", f"integers in 1..{MAX_RANK}, not {show(rank)}")
        ranks[key] = (position, rank)
    return ranks


def _alpha_pattern(fields: Fields, suffixes: Collection[str]) -> dict[str, tuple[int, float]]:
    pattern = _pattern(fields, "alpha_pattern", suffixes)
    return {
        key: (position, _alpha(fields, "alpha_pattern", alpha))
        for position, (key, alpha) in enumerate(pattern.items())
    }


def _alpha(fields: Fields, key: str, value: Json) -> float:
    # Over the largest rank, the scale must still be a normal number in fp32.
    if not is_number(value) or not SMALLEST_NORMAL * MAX_RANK < value <= MAX_ALPHA:
        fields.fail(key, f"above 0 and at most {MAX_ALPHA:g}")
    return float(value)


def _pattern(fields: Fields, key: str, suffixes: Collection[str]) -> dict[str, Json]:
    """A pattern's entries. PEFT takes its keys as regular expressions anchored at the end; milpy
    takes those that are a module's path or a dotted suffix of one, where both mean the same."""
    if not fields.has(key):
        return {}
    pattern = fields.object(key)
    for name in pattern:
        if name not in suffixes:
            fields.fail(
                key, f"module names or dotted suffixes of them; {show(name)} matches no module"
            )
    return pattern


def _suffixes(path: str) -> list[str]:
    """`path` and every dotted suffix: a.b.c, b.c, c."""
    parts = path.split(".")
    return [".".join(parts[first:]) for first in range(len(parts))]


def _first_hit(pattern: Mapping[str, tuple[int, T]], path: str, default: T) -> T:
    """The value of the earliest entry whose key is `path` or a dotted suffix of it."""
    hits = [pattern[key] for key in _suffixes(path) if key in pattern]
    return min(hits, key=itemgetter(0))[1] if hits else default


def _resolve_targets(fields: Fields, config: ModelConfig) -> frozenset[str]:
    """Paths of the modules that PEFT would adapt, as its check_target_module_exists finds them."""
    layers = _layers_to_transform(fields, config)
    wanted = _target_names(fields)
    excluded = _names(fields, "exclude_modules") if fields.has("exclude_modules") else frozenset()
    found: set[str] = set()
    for layer in range(config.num_hidden_layers):
        for projection in PROJECTIONS:
            path = module_path(layer, projection)
            # A target that is the whole path holds whatever layers_to_transform says.
            in_layers = layers is None or layer in layers or path in wanted
            if in_layers and _is_named(path, wanted) and not _is_named(path, excluded):
                found.add(path)
    for path in UNSERVED_MODULES:
        is_selected = _is_named(path, wanted) and (layers is None or path in wanted)
        if is_selected and not _is_named(path, excluded):
            fields.fail("target_modules", f"projections only: LoRA on {path} is not served")
    return frozenset(found)


def _target_names(fields: Fields) -> frozenset[str]:
    value = fields.raw("target_modules")
    if value is None:
        return frozenset(DEFAULT_TARGETS)
    if isinstance(value, str):
        if value.lower() != "all-linear":
            fields.fail("target_modules", 'null, "all-linear" or a list of names')
        if fields.has("layers_to_transform"):
            fields.fail("target_modules", "a list of names, since layers_to_transform is given")
        return frozenset(PROJECTIONS)
    return _names(fields, "target_modules")


def _names(fields: Fields, key: str) -> frozenset[str]:
    value = fields.raw(key)
    if not isinstance(value, list):
        fields.fail(key, "a list of names")
    names: list[str] = []
    for name in value:
        if not isinstance(name, str):
            fields.fail(key, "a list of names")
        names.append(name)
    return frozenset(names)


def _is_named(path: str, names: Collection[str]) -> bool:
    return any(suffix in names for suffix in _suffixes(path))


def _layers_to_transform(fields: Fields, config: ModelConfig) -> frozenset[int] | None:
    """The layers that carry LoRA, or None for all of them."""
    container = fields.raw("layers_pattern")
    if container not in (None, "", [], "layers", ["layers"]):
        fields.fail("layers_pattern", 'null or "layers", the only list of layers that Llama has')
    value = fields.raw("layers_to_transform")
    if value is None or value == []:
        return None
    layers: list[int] = []
    for layer in value if isinstance(value, list) else [value]:
        if not is_integer(layer) or not 0 <= layer < config.num_hidden_layers:
            fields.fail("layers_to_transform", f"layers in 0..{config.num_hidden_layers - 1}")
        layers.append(layer)
    return frozenset(layers)
