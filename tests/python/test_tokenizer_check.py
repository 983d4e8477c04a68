"""tokenizer.json: every rule by one file that breaks it, and what real files look like."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_tokenizer import MERGES, byte_bpe, write_tokenizer
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

import milpy
from milpy.errors import TokenizerError
from milpy.tokenizer import Tokenizer
from milpy.tokenizer_check import REGEXES, Affixes, check_tokenizer

LLAMA3 = next(regex for regex, source in REGEXES.items() if source.startswith("Llama 3"))
QWEN2 = next(regex for regex, source in REGEXES.items() if source.startswith("Qwen 2"))
PIECES = ("<unk>", "<s>", "</s>", *[f"<0x{i:02X}>" for i in range(256)], *"▁helowrd", "he", "ll")

Change = Callable[[dict[str, Any]], object]


def llama2() -> Backend:
    """As LlamaConverter writes it, with `legacy`: spaces by the normalizer, bytes by fallback."""
    vocab = {piece: i for i, piece in enumerate(PIECES)}
    merges = [("h", "e"), ("l", "l")]
    backend = Backend(
        models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in PIECES[:3]])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return backend


def split_by(regex: str, backend: Backend | None = None) -> Backend:
    """As Llama 3's and Qwen 2's: a regex first, then bytes."""
    backend = byte_bpe() if backend is None else backend
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return backend


def llama3() -> Backend:
    backend = split_by(LLAMA3)
    backend.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), backend.post_processor]
    )
    return backend


def qwen2() -> Backend:
    backend = split_by(QWEN2, byte_bpe(adds_bos=False))
    backend.normalizer = normalizers.NFC()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend


def check(backend: Backend, change: Change | None = None, vocab_size: int | None = None) -> Any:
    content = json.loads(backend.to_str())
    if change is not None:
        change(content)
    return check_tokenizer(
        json.dumps(content).encode(), source="tokenizer.json", vocab_size=vocab_size
    )


# ---- what is accepted ----


@pytest.mark.parametrize("build", [byte_bpe, llama2, llama3, qwen2])
def test_the_forms_of_real_models_are_accepted(build: Callable[[], Backend]) -> None:
    backend = build()
    checked = check(backend, vocab_size=backend.get_vocab_size())
    assert checked.affixes == Affixes(tuple(backend.encode("").ids), ())
    assert all(backend.token_to_id(token) == number for token, number in checked.added.items())


@pytest.mark.parametrize("regex", REGEXES)
def test_every_known_regex_is_accepted_and_runs(tmp_path: Path, regex: str) -> None:
    write_tokenizer(tmp_path, split_by(regex))
    tokenizer = Tokenizer(tmp_path)
    text = "I'll say 12345 words,  héllo 日本\r\n\n ok "
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_demos_tokenizer_is_accepted() -> None:
    folder = Path(milpy.__file__).parent / "demo" / "base"
    if not (folder / "tokenizer.json").exists():
        pytest.skip("the demo model is not in this checkout")
    assert Tokenizer(folder).encode("x")[0] == Tokenizer(folder).bos_token_id


def test_merges_may_be_strings_of_two_tokens() -> None:
    strings = [" ".join(pair) for pair in MERGES]
    check(byte_bpe(), lambda file: file["model"].update(merges=strings))


def test_what_ends_a_text_is_known_as_well() -> None:
    backend = byte_bpe()
    bos, eos = backend.token_to_id("<s>"), backend.token_to_id("</s>")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", bos), ("</s>", eos)]
    )
    assert check(backend).affixes == Affixes((bos,), (eos,))


# ---- what is refused ----


def model(**values: object) -> Change:
    return lambda file: file["model"].update(values)


def vocab(**values: object) -> Change:
    return lambda file: file["model"]["vocab"].update(values)


def added(**values: object) -> Change:
    return lambda file: file["added_tokens"][0].update(values)


def part(key: str, value: object) -> Change:
    return lambda file: file.update({key: value})


def first_special(**values: object) -> Change:
    return lambda file: file["post_processor"]["special_tokens"]["<s>"].update(values)


def split(pattern: object) -> Change:
    step = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    return lambda file: file.update(
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [step, {"type": "ByteLevel", "use_regex": False}],
        }
    )


def more_added(file: dict[str, Any]) -> None:
    file["added_tokens"] = [
        {**file["added_tokens"][0], "id": 1000 + i, "content": f"<{i}>"} for i in range(65_537)
    ]


def again(file: dict[str, Any]) -> None:
    file["added_tokens"].append({**file["added_tokens"][0], "id": 900})


CASES: list[tuple[Change, str]] = [
    (part("version", "2.0"), 'version is "2.0", expected one of "1.0"'),
    (part("extra", 1), 'has the key "extra", known are version, truncation'),
    (lambda file: file.pop("model"), "model is absent, expected an object"),
    # model
    (model(type="Unigram"), 'model: type is "Unigram", expected one of "BPE"'),
    (lambda file: file["model"].pop("type"), "model: type is absent"),
    (model(dropout=0.1), "dropout is 0.1, expected null"),
    (model(end_of_word_suffix="</w>"), "end_of_word_suffix is"),
    (model(unk_token="<unk>"), "unk_token is .*, expected a token of the vocabulary"),
    (model(ignore_merges=1), "ignore_merges is 1, expected true or false"),
    (model(new_option=True), 'model: has the key "new_option", known are .*vocab'),
    (model(vocab={}, merges=[]), "has no tokens"),
    (vocab(zz=1.0), 'token "zz" is 1.0, expected an integer'),
    (vocab(zz=-1), 'token "zz" has the id -1'),
    (vocab(zz=2**31), 'token "zz" has the id 2147483648, expected at most 2097152 ids'),
    (vocab(zz=0), 'tokens .* and "zz" both have the id 0'),
    (model(merges={}), "merges is {}, expected a list"),
    (model(merges=[["h"]]), r'merges\[0\] is \["h"\], expected a pair of tokens'),
    (model(merges=["h e l"]), r'merges\[0\] is "h e l", expected a pair of tokens'),
    (model(merges=[["h", 1]]), r"merges\[0\] is .*, expected a pair of tokens"),
    (model(merges=[["h", "qq"]]), '"qq" is not in the vocabulary'),
    (model(merges=["h h"]), '"hh" is not in the vocabulary'),
    (model(merges=["h e"] * (2**21 + 1)), "has 2097153 merges, expected at most 2097152"),
    # added tokens
    (part("added_tokens", {}), "added_tokens is {}, expected a list"),
    (more_added, "has 65537 added tokens, expected at most 65536"),
    (added(content=""), r"added_tokens\[0\]: content is 0 bytes, expected 1..256"),
    (added(content="é" * 129), "content is 258 bytes, expected 1..256"),
    (added(content=None), "content is null, expected a string"),
    (added(id="1"), 'id is "1", expected an integer'),
    (added(id=2**21), "has the id 2097152, expected at most"),
    (added(id=0), 'added_tokens.0.: "<s>" has the id 0, which is that of'),
    (added(content="he"), r'"he" has the id 263, expected \d+, its id in the vocabulary'),
    (again, 'is "<s>" again'),
    (added(special="yes"), 'special is "yes", expected true or false'),
    (added(new=True), 'has the key "new", known are id, content'),
    # components
    (part("normalizer", {"type": "Precompiled"}), 'normalizer: type is "Precompiled", expected'),
    (part("normalizer", {"type": "Prepend", "prepend": "ab"}), 'prepend is "ab", expected one of'),
    (part("normalizer", []), r"normalizer is \[\], expected an object"),
    (
        part("normalizer", {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 17}),
        "normalizers is .*, expected a list of at most 16",
    ),
    (
        part("normalizer", {"type": "Sequence", "normalizers": [{"type": "Sequence"}]}),
        r'normalizers\[0\]: type is "Sequence", expected one of "NFC"',
    ),
    (
        part("normalizer", {"type": "Replace", "pattern": {"Regex": "(a|a)*$"}, "content": " "}),
        r'normalizer: pattern is the regex "\(a\|a\)\*\$", expected one of the 8 known',
    ),
    (
        part("normalizer", {"type": "Replace", "pattern": {"String": " "}, "content": "xxx"}),
        'content is "xxx", expected one of " "',
    ),
    (split({"Regex": "(a+)+"}), r'pretokenizers\[0\]: pattern is the regex "\(a\+\)\+", expected'),
    (split({"Regex": LLAMA3 + "|x"}), "pattern is the regex .*, expected one of the 8 known"),
    (split({"String": "e"}), 'pattern is the string "e", expected one of " "'),
    (split({"Regex": LLAMA3, "String": " "}), "pattern is .*, expected {"),
    (split(LLAMA3), "pattern is .*, expected an object"),
    (part("pre_tokenizer", {"type": "BertPreTokenizer"}), '"BertPreTokenizer", expected one of'),
    (part("pre_tokenizer", {"type": "ByteLevel", "use_regex": 1}), "use_regex is 1, expected one"),
    (part("pre_tokenizer", {"type": "ByteLevel", "regex": "a"}), 'has the key "regex", known are'),
    (part("pre_tokenizer", None), "byte_fallback is false and no pre_tokenizer is ByteLevel"),
    (part("decoder", None), "decoder is null, expected ByteLevel in it"),
    (part("decoder", {"type": "WordPiece"}), 'decoder: type is "WordPiece", expected one of'),
    # post-processor
    (part("post_processor", {"type": "BertProcessing"}), '"BertProcessing", expected one of'),
    (first_special(ids=[7]), r"special_tokens: ids is \[7\], expected \[263\], those of"),
    (first_special(tokens=["<x>"]), 'tokens is ."<x>"., expected known tokens'),
    (first_special(id="<x>"), 'id is "<x>", expected "<s>"'),
    (
        lambda file: file["post_processor"].update(special_tokens={}),
        '"<s>" is not there',
    ),
    (
        lambda file: file["post_processor"].update(single=[]),
        "single is .., expected each of A once",
    ),
    (lambda file: file["post_processor"].update(single=["$A"]), "single is .*, expected {"),
    (
        lambda file: file.update(
            post_processor={"type": "Sequence", "processors": [file["post_processor"]] * 2}
        ),
        "expected one TemplateProcessing that adds tokens",
    ),
]


@pytest.mark.parametrize(("change", "message"), CASES, ids=[message for _, message in CASES])
def test_a_file_that_breaks_a_rule_is_refused_by_name(change: Change, message: str) -> None:
    with pytest.raises(TokenizerError, match=f"^tokenizer.json: .*{message}"):
        check(byte_bpe(), change)


@pytest.mark.parametrize(
    "token", ["<0x-1>", "<0x+1>", "<0xff>", "<0x1>", "<0x100>", "<0x>", "<0x00>x>"]
)
def test_byte_tokens_are_two_capital_digits(token: str) -> None:
    with pytest.raises(TokenizerError, match="is no byte, expected <0x00> to <0xFF>"):
        check(llama2(), vocab(**{token: len(PIECES)}))
    # To a byte-level model they are words like any other.
    check(byte_bpe(), vocab(**{token: 400}))


def test_a_byte_token_may_not_be_added_either() -> None:
    with pytest.raises(TokenizerError, match='"<0x-1>" is no byte'):
        check(
            llama2(),
            lambda file: file["added_tokens"].append(
                {**file["added_tokens"][0], "id": len(PIECES), "content": "<0x-1>"}
            ),
        )


def test_ids_are_the_models() -> None:
    n = byte_bpe().get_vocab_size()
    check(byte_bpe(), vocab_size=n)
    with pytest.raises(TokenizerError, match=f"expected ids below the model's vocab_size, {n - 1}"):
        check(byte_bpe(), vocab_size=n - 1)
    with pytest.raises(TokenizerError, match="has the id 262, expected ids below .*, 100$"):
        check(byte_bpe(), vocab_size=100)


def test_a_key_twice_is_refused() -> None:
    data = byte_bpe().to_str().replace('"version"', '"version":"1.0","version"', 1).encode()
    with pytest.raises(TokenizerError, match='has the key "version" twice'):
        check_tokenizer(data, source="tokenizer.json", vocab_size=None)


def test_an_added_token_that_the_library_would_number_otherwise(tmp_path: Path) -> None:
    """It gave the next free id to an added token of any other, and the model read a wrong row."""
    write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    file = json.loads(path.read_text())
    last = file["added_tokens"][-1]
    free = last["id"]
    last["id"] = free + 7
    path.write_text(json.dumps(file))
    with pytest.raises(TokenizerError, match=f"has the id {free + 7}, expected {free}, the next"):
        Tokenizer(tmp_path)


def test_a_hostile_regex_never_runs(tmp_path: Path) -> None:
    """tokenizers runs regexes by backtracking: this one takes 2^n steps on n letters."""
    write_tokenizer(tmp_path, split_by("(a+)+$"))
    with pytest.raises(TokenizerError, match=r'pattern is the regex "\(a\+\)\+\$"'):
        Tokenizer(tmp_path)


# ---- flags in tokenizer_config.json ----


def with_flags(folder: Path, backend: Backend, **flags: object) -> Tokenizer:
    write_tokenizer(folder, backend)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **flags}))
    return Tokenizer(folder)


def test_flags_that_agree_with_the_post_processor_are_accepted(tmp_path: Path) -> None:
    plain = byte_bpe(adds_bos=False)
    tokenizer = with_flags(tmp_path, byte_bpe(), add_bos_token=True, add_eos_token=False)
    assert tokenizer.encode("hello")[0] == tokenizer.bos_token_id
    tokenizer = with_flags(tmp_path, plain, add_bos_token=False, add_eos_token=None)
    assert tokenizer.bos_token_id not in tokenizer.encode("hello")
    # Without a name there is nothing to add, and transformers adds nothing.
    with_flags(tmp_path, plain, add_bos_token=True, bos_token=None)


@pytest.mark.parametrize(
    ("adds_bos", "flags", "message"),
    [
        (False, {"add_bos_token": True}, r"add_bos_token is true, .* \[263\], .* adds \[\]"),
        (True, {"add_bos_token": False}, r"add_bos_token is false, .* \[\], .* adds \[263\]"),
        (True, {"add_eos_token": True}, r"add_eos_token is true, .* \[264\], .* adds \[\]"),
        (True, {"add_bos_token": 1}, "add_bos_token is 1, expected true or false"),
    ],
)
def test_flags_that_say_otherwise_are_refused(
    tmp_path: Path, adds_bos: bool, flags: dict[str, object], message: str
) -> None:
    with pytest.raises(TokenizerError, match=message):
        with_flags(tmp_path, byte_bpe(adds_bos=adds_bos), **flags)


# ---- against transformers ----


TEXTS = ("hello world", "I'll have 12345  of\n\n them", "héllo 日本 👍", "")


@pytest.mark.ref
@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Gemma", "GPT2", "GPTNeoX", "Cohere"])
def test_what_transformers_saves_is_accepted(tmp_path: Path, name: str) -> None:
    import transformers  # noqa: PLC0415

    spm = name in ("Llama", "Gemma")
    source = json.loads((llama2() if spm else byte_bpe()).to_str())["model"]
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    kind = getattr(transformers, f"{name}Tokenizer", None) or getattr(
        transformers, f"{name}TokenizerFast"
    )
    merges = [tuple(pair) for pair in source["merges"]]
    theirs = kind(vocab=source["vocab"], merges=merges, **special)
    theirs.save_pretrained(tmp_path)
    ours = Tokenizer(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert ours.encode(text) == again(text)["input_ids"]


@pytest.mark.ref
@pytest.mark.parametrize("adds_bos", [True, False])
def test_transformers_follows_the_post_processor(tmp_path: Path, adds_bos: bool) -> None:
    """The flags that are refused here are those that transformers 5 drops in silence."""
    import transformers  # noqa: PLC0415

    backend = byte_bpe(adds_bos=adds_bos)
    with pytest.raises(TokenizerError, match="expected both to say the same"):
        with_flags(tmp_path, backend, add_bos_token=not adds_bos)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("hello")["input_ids"] == backend.encode("hello").ids


@pytest.mark.ref
def test_what_the_tiktoken_converter_writes_is_accepted(tmp_path: Path) -> None:
    from transformers.convert_slow_tokenizer import TikTokenConverter  # noqa: PLC0415

    class Converter(TikTokenConverter):  # type: ignore[misc]
        def extract_vocab_merges_from_model(self, _: object) -> tuple[object, object]:
            source = json.loads(byte_bpe().to_str())["model"]
            return source["vocab"], [tuple(pair) for pair in source["merges"]]

    backend = Converter(extra_special_tokens=["<s>", "</s>"]).converted()
    write_tokenizer(tmp_path, backend)
    for text in TEXTS:
        assert Tokenizer(tmp_path).encode(text) == backend.encode(text).ids


@pytest.mark.ref
@pytest.mark.parametrize("legacy", [True, False])
def test_what_the_llama_converter_writes_is_accepted(tmp_path: Path, legacy: bool) -> None:
    from types import SimpleNamespace  # noqa: PLC0415

    from transformers.convert_slow_tokenizer import LlamaConverter  # noqa: PLC0415

    converter = LlamaConverter.__new__(LlamaConverter)
    converter.original_tokenizer = SimpleNamespace(legacy=legacy, add_prefix_space=True)
    backend = llama2()
    backend.normalizer = converter.normalizer(None)
    backend.pre_tokenizer = converter.pre_tokenizer("▁", True)
    backend.decoder = converter.decoder("▁", True)
    write_tokenizer(tmp_path, backend)
    for text in TEXTS:
        assert Tokenizer(tmp_path).encode(text) == backend.encode(text).ids
