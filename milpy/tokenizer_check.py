"""tokenizer.json, read and checked before the `tokenizers` library sees it.

That library runs whatever regex the file holds in an engine that backtracks, takes the first of two
tokens with one id, gives an added token another id than the file says, and ignores keys it does not
know. So what is read here is the whole file, against tables of what is known: BPE alone, byte-level
or with byte fallback, in the forms that transformers writes for the Llama, GPT and Qwen families.
Anything else is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple, NoReturn

from milpy.errors import TokenizerError
from milpy.strict_json import Fields, Json, is_integer, kind_of, parse_object, show, show_names

MAX_DEPTH = 16
MAX_TOKENS = 1 << 21
MAX_MERGES = 1 << 21
MAX_ADDED_TOKENS = 65_536
MAX_ADDED_TOKEN_BYTES = 256
MAX_STEPS = 16  # components in one sequence, pieces in one template

# Every regex that may run, and where transformers 5.23 writes it.
REGEXES = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": (
        "Llama 3, GPT-4: convert_slow_tokenizer.TikTokenConverter"
    ),
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": (
        "Qwen 2 and 3: models/qwen2/tokenization_qwen2.PRETOKENIZE_REGEX"
    ),
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": (
        "Qwen 3.5: models/qwen3_5/tokenization_qwen3_5.PRETOKENIZE_REGEX"
    ),
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": (
        "GPT-2: models/clvp/tokenization_clvp; the library's own in ByteLevel(use_regex)"
    ),
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": (
        "Mistral's Tekken: tokenization_utils_tokenizers._patch_mistral_regex"
    ),
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": (
        "GPT-4o, Llama 4: integrations/gguf/gguf_tokenizer_mapping._GPT4O_SPLIT"
    ),
    r" ?\p{N}+| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": "milpy's demo: tools/demo_train.SPLIT",
    r" {2,}": "sentencepiece models: convert_slow_tokenizer.SpmConverter",
}
STRINGS = (" ", "▁", "\n")  # Llama 2, Gemma and Helium split at or replace these

_BOOL = (True, False)
_BEHAVIORS = ("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous")
_PATTERN = object()  # {"String": one of STRINGS} or {"Regex": one of REGEXES}
_BYTE_LEVEL = {"add_prefix_space": _BOOL, "trim_offsets": _BOOL, "use_regex": _BOOL}
_METASPACE = {
    "replacement": ("▁",),
    "prepend_scheme": ("always", "first", "never"),
    "split": _BOOL,
    "add_prefix_space": _BOOL,  # before tokenizers 0.15
    "str_rep": ("▁",),
}
_REPLACE = {"pattern": _PATTERN, "content": (" ", "▁")}

# What each kind of component may be: its types, and of each the fields and their values. Whether a
# field may be left out is for the library to say.
NORMALIZERS: dict[str, Mapping[str, object]] = {
    **dict.fromkeys(("NFC", "NFD", "NFKC", "NFKD"), {}),
    "Prepend": {"prepend": (" ", "▁")},
    "Replace": _REPLACE,
    "Strip": {"strip_left": _BOOL, "strip_right": _BOOL},
}
PRE_TOKENIZERS: dict[str, Mapping[str, object]] = {
    "ByteLevel": _BYTE_LEVEL,
    "Digits": {"individual_digits": _BOOL},
    "Metaspace": _METASPACE,
    "Punctuation": {"behavior": _BEHAVIORS},
    "Split": {"pattern": _PATTERN, "behavior": _BEHAVIORS, "invert": _BOOL},
}
POST_PROCESSORS: dict[str, Mapping[str, object]] = {
    "ByteLevel": _BYTE_LEVEL,
    "TemplateProcessing": {},  # _check_template's
}
DECODERS: dict[str, Mapping[str, object]] = {
    "ByteFallback": {},
    "ByteLevel": _BYTE_LEVEL,
    "Fuse": {},
    "Metaspace": _METASPACE,
    "Replace": _REPLACE,
    "Strip": {"content": (" ", "▁"), "start": (0, 1), "stop": (0, 1)},
}

_TOP = (
    "version truncation padding added_tokens normalizer pre_tokenizer post_processor decoder model"
).split()
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_ADDED_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


class Affixes(NamedTuple):
    """The ids that the post-processor puts before and after a text."""

    before: tuple[int, ...]
    after: tuple[int, ...]


class CheckedFile(NamedTuple):
    added: dict[str, int]  # tokens beside the model's own, or special among them
    affixes: Affixes


def check_tokenizer(data: bytes, *, source: str, vocab_size: int | None) -> CheckedFile:
    """Refuse with TokenizerError what the library must not be given.

    With `vocab_size`, ids that the model has no row for are refused.
    """
    values = parse_object(data, source=source, max_depth=MAX_DEPTH, error=TokenizerError)
    top = Fields(values, source, TokenizerError)
    _only(top, _TOP)
    top.string("version", ("1.0",))
    model = Fields(top.object("model"), f"{source}: model", TokenizerError)
    vocab = _check_model(model, source, vocab_size)
    added = _check_added(top, vocab, vocab_size)
    _check_chain(top, "normalizer", "normalizers", NORMALIZERS)
    pre_tokenizers = _check_chain(top, "pre_tokenizer", "pretokenizers", PRE_TOKENIZERS)
    decoders = _check_chain(top, "decoder", "decoders", DECODERS)
    _check_bytes(source, model, {*vocab, *added}, _types(pre_tokenizers), _types(decoders))
    affixes = Affixes((), ())
    for step in _check_chain(top, "post_processor", "processors", POST_PROCESSORS):
        if step.values["type"] == "TemplateProcessing":
            if affixes != ((), ()):
                step.fail("type", "one TemplateProcessing that adds tokens")
            affixes = _check_template(step, {**vocab, **added})
    return CheckedFile(added, affixes)


def _fail(source: str, message: str) -> NoReturn:
    raise TokenizerError(f"{source}: {message}")


def _only(fields: Fields, known: Sequence[str]) -> None:
    """Refuse keys that the library would ignore."""
    unknown = [key for key in fields.values if key not in known]
    if unknown:
        _fail(fields.source, f"has the key {show(unknown[0])}, known are {', '.join(known)}")


# ---- tokens ----


def _check_id(source: str, token: str, number: int, vocab_size: int | None) -> None:
    if number < 0 or number >= (MAX_TOKENS if vocab_size is None else vocab_size):
        limit = (
            f"at most {MAX_TOKENS} ids"
            if vocab_size is None
            else (f"ids below the model's vocab_size, {vocab_size}")
        )
        _fail(source, f"token {show(token)} has the id {number}, expected {limit}")


def _check_model(model: Fields, source: str, vocab_size: int | None) -> dict[str, int]:
    """The vocabulary of a BPE model whose merges stay within it."""
    model.string("type", ("BPE",))
    vocab = _check_vocab(model, source, vocab_size)
    _check_merges(model, vocab)
    # Dropout would make ids random, and the library takes null as well as 0 for none.
    if model.raw("dropout") not in (None, 0):
        model.fail("dropout", "null")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.raw(key) not in (None, ""):
            model.fail(key, 'null or ""')
    if model.has("unk_token") and model.string("unk_token") not in vocab:
        model.fail("unk_token", "a token of the vocabulary")
    for key in ("fuse_unk", "byte_fallback", "ignore_merges"):
        if model.has(key):
            model.boolean(key)
    _only(model, tuple(sorted(model.taken)))
    return vocab


def _check_vocab(model: Fields, source: str, vocab_size: int | None) -> dict[str, int]:
    values = model.object("vocab")
    if not values:
        _fail(source, "has no tokens")
    vocab: dict[str, int] = {}
    for token, number in values.items():
        if not is_integer(number):
            _fail(model.source, f"token {show(token)} is {show(number)}, expected an integer")
        vocab[token] = number
    for extreme in (min, max):
        token = extreme(vocab, key=vocab.__getitem__)
        _check_id(source, token, vocab[token], vocab_size)
    if len(set(vocab.values())) != len(vocab):
        owners: dict[int, str] = {}
        for token, number in vocab.items():
            other = owners.setdefault(number, token)
            if other != token:
                _fail(source, f"tokens {show(other)} and {show(token)} both have the id {number}")
    return vocab


def _check_merges(model: Fields, vocab: Mapping[str, int]) -> None:
    """Pairs, or in older files strings of two tokens with one space between."""
    merges = model.raw("merges")
    if not isinstance(merges, list):
        model.fail("merges", "a list")
    if len(merges) > MAX_MERGES:
        _fail(model.source, f"has {len(merges)} merges, expected at most {MAX_MERGES}")
    for index, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2:
            _fail(model.source, f"merges[{index}] is {show(merge)}, expected a pair of tokens")
        left, right = pair
        if not isinstance(left, str) or not isinstance(right, str):
            _fail(model.source, f"merges[{index}] is {show(merge)}, expected a pair of tokens")
        if left not in vocab or right not in vocab or left + right not in vocab:
            unknown = next(part for part in (left, right, left + right) if part not in vocab)
            _fail(
                model.source,
                f"merges[{index}] is {show(merge)}, expected known tokens: "
                f"{show(unknown)} is not in the vocabulary",
            )


def _check_added(top: Fields, vocab: Mapping[str, int], vocab_size: int | None) -> dict[str, int]:
    entries = top.raw("added_tokens")
    if entries is None:
        return {}
    if not isinstance(entries, list):
        top.fail("added_tokens", "a list")
    if len(entries) > MAX_ADDED_TOKENS:
        _fail(
            top.source,
            f"has {len(entries)} added tokens, expected at most {MAX_ADDED_TOKENS}",
        )
    added: dict[str, int] = {}
    owners = {number: token for token, number in vocab.items()}
    for index, entry in enumerate(entries):
        where = f"{top.source}: added_tokens[{index}]"
        if not isinstance(entry, dict):
            _fail(where, f"is {kind_of(entry)}, expected an object")
        fields = Fields(entry, where, TokenizerError)
        _only(fields, ("id", "content", *_ADDED_FLAGS))
        content = fields.string("content")
        n_bytes = len(content.encode("utf-8"))
        if not 1 <= n_bytes <= MAX_ADDED_TOKEN_BYTES:
            _fail(where, f"content is {n_bytes} bytes, expected 1..{MAX_ADDED_TOKEN_BYTES}")
        for key in _ADDED_FLAGS:
            fields.boolean(key)
        number = fields.raw("id")
        if not is_integer(number):
            fields.fail("id", "an integer")
        _check_id(top.source, content, number, vocab_size)
        if content in added:
            _fail(where, f"is {show(content)} again")
        other = owners.setdefault(number, content)
        if other != content:
            _fail(where, f"{show(content)} has the id {number}, which is that of {show(other)}")
        if vocab.get(content, number) != number:
            _fail(
                where,
                f"{show(content)} has the id {number}, expected {vocab[content]}, its id in "
                "the vocabulary",
            )
        added[content] = number
    return added


# ---- components ----


def _check_chain(
    top: Fields, key: str, plural: str, known: Mapping[str, Mapping[str, object]]
) -> list[Fields]:
    """The components of one kind in order: none, one, or a sequence of them."""
    if not top.has(key):
        return []
    value = top.object(key)
    where = f"{top.source}: {key}"
    if value.get("type") != "Sequence":
        return [_check_component(value, where, known, alone=True)]
    steps = Fields(value, where, TokenizerError)
    _only(steps, ("type", plural))
    entries = steps.raw(plural)
    if not isinstance(entries, list) or len(entries) > MAX_STEPS:
        steps.fail(plural, f"a list of at most {MAX_STEPS}")
    return [
        _check_component(entry, f"{where}: {plural}[{index}]", known, alone=False)
        for index, entry in enumerate(entries)
    ]


def _check_component(
    value: Json, where: str, known: Mapping[str, Mapping[str, object]], *, alone: bool
) -> Fields:
    if not isinstance(value, dict):
        _fail(where, f"is {kind_of(value)}, expected an object")
    fields = Fields(value, where, TokenizerError)
    name = fields.string("type", (*known, "Sequence") if alone else known)
    if name == "TemplateProcessing":
        return fields
    _only(fields, ("type", *known[name]))
    for key, allowed in known[name].items():
        if key not in value:
            continue
        if allowed is _PATTERN:
            _check_pattern(fields, key)
        elif isinstance(allowed, tuple) and not any(
            type(item) is type(value[key]) and item == value[key] for item in allowed
        ):
            fields.fail(key, "one of " + ", ".join(map(show, allowed)))
    return fields


def _check_pattern(fields: Fields, key: str) -> None:
    """No regex of a stranger's runs, and no string that makes a text much longer."""
    pattern = fields.object(key)
    kinds = {"String": STRINGS, "Regex": tuple(REGEXES)}
    if len(pattern) != 1 or not pattern.keys() <= kinds.keys():
        fields.fail(key, '{"String": ...} or {"Regex": ...}')
    for kind, text in pattern.items():
        if text not in kinds[kind]:
            expected = (
                "one of " + ", ".join(map(show, STRINGS))
                if kind == "String"
                else f"one of the {len(REGEXES)} known (milpy.tokenizer_check.REGEXES)"
            )
            _fail(
                fields.source, f"{key} is the {kind.lower()} {show(text, 200)}, expected {expected}"
            )


def _types(components: Sequence[Fields]) -> set[str]:
    return {str(component.values["type"]) for component in components}


def _check_bytes(
    source: str, model: Fields, tokens: set[str], pre_tokenizers: set[str], decoders: set[str]
) -> None:
    """Text of any language needs bytes: as letters of a byte-level model, or by fallback."""
    fallback = bool(model.values.get("byte_fallback"))
    if not fallback and "ByteLevel" not in pre_tokenizers:
        _fail(
            source,
            "model: byte_fallback is false and no pre_tokenizer is ByteLevel, expected one of them",
        )
    expected = "ByteLevel" if "ByteLevel" in pre_tokenizers else "ByteFallback"
    if expected not in decoders:
        found = show_names(decoders) or "null"
        _fail(source, f"decoder is {found}, expected {expected} in it, as the model's bytes are")
    if fallback or "ByteFallback" in decoders:
        # The library reads <0x+1> as the byte 1.
        for token in tokens:
            if token.startswith("<0x") and token.endswith(">") and not _BYTE_TOKEN.fullmatch(token):
                _fail(source, f"token {show(token)} is no byte, expected <0x00> to <0xFF>")


# ---- what the post-processor adds ----


def _check_template(fields: Fields, ids: Mapping[str, int]) -> Affixes:
    _only(fields, ("type", "single", "pair", "special_tokens"))
    table = {
        name: _check_special(Fields({name: entry}, fields.source, TokenizerError), name, ids)
        for name, entry in fields.object("special_tokens").items()
    }
    if fields.has("pair"):
        _read_pieces(fields, "pair", table, ("A", "B"))
    return _read_pieces(fields, "single", table, ("A",))


def _check_special(fields: Fields, name: str, ids: Mapping[str, int]) -> list[int]:
    entry = Fields(fields.object(name), f"{fields.source}: special_tokens", TokenizerError)
    _only(entry, ("id", "ids", "tokens"))
    tokens = entry.raw("tokens")
    if not isinstance(tokens, list) or not 1 <= len(tokens) <= MAX_STEPS:
        entry.fail("tokens", f"a list of 1..{MAX_STEPS} tokens")
    known = [ids[token] for token in tokens if isinstance(token, str) and token in ids]
    if len(known) != len(tokens):
        entry.fail("tokens", "known tokens")
    if entry.raw("ids") != known:
        entry.fail("ids", f"{known}, those of {show(tokens)}")
    if entry.raw("id") != name:
        entry.fail("id", show(name))
    return known


def _read_pieces(
    fields: Fields, key: str, table: Mapping[str, list[int]], texts: Sequence[str]
) -> Affixes:
    """What stands before the first text and after the last."""
    pieces = fields.raw(key)
    if not isinstance(pieces, list) or len(pieces) > MAX_STEPS:
        fields.fail(key, f"a list of at most {MAX_STEPS} pieces")
    seen: list[str] = []
    before: list[int] = []
    after: list[int] = []
    for piece in pieces:
        kind, name = _read_piece(fields, key, piece)
        if kind == "Sequence":
            seen.append(name)
        elif name not in table:
            fields.fail(key, f"special tokens of special_tokens: {show(name)} is not there")
        else:
            (after if seen else before).extend(table[name])
    if sorted(seen) != list(texts):
        fields.fail(key, f"each of {', '.join(texts)} once")
    return Affixes(tuple(before), tuple(after))


def _read_piece(fields: Fields, key: str, piece: Json) -> tuple[str, str]:
    """Its kind, SpecialToken or Sequence, and its name."""
    if isinstance(piece, dict) and len(piece) == 1:
        kind, inner = next(iter(piece.items()))
        if (
            kind in ("SpecialToken", "Sequence")
            and isinstance(inner, dict)
            and inner.keys() == {"id", "type_id"}
            and is_integer(inner["type_id"])
            and isinstance(inner["id"], str)
        ):
            return kind, inner["id"]
    fields.fail(key, '{"SpecialToken": ...} and {"Sequence": ...}, each with id and type_id')
