import json
import random
from pathlib import Path

import pytest
from helpers.tiny_tokenizer import SPECIAL, VOCAB, byte_bpe, write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers

from milpy.errors import RequestError, TokenizerError
from milpy.tokenizer import MAX_PENDING_TOKENS, Detokenizer, Tokenizer

TEXTS = [
    "hello world",
    "héllo — wörld",
    "日本語のテキスト",
    "👩‍👩‍👧‍👦 family, 👍🏽 thumb",
    "a\n\n  b\t<|end|> c",
    "\ufffd is a character too",
]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    write_tokenizer(tmp_path)
    return Tokenizer(tmp_path, vocab_size=VOCAB)


def stream(tokenizer: Tokenizer, ids: list[int], *, skip: bool = True) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    return [*[detokenizer.push(token) for token in ids], detokenizer.flush()]


# ---- ids ----


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_the_librarys(tokenizer: Tokenizer, tmp_path: Path, text: str) -> None:
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode(text) == backend.encode(text).ids
    assert tokenizer.encode(text)[0] == tokenizer.bos_token_id
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("<|end|>", "")


def test_a_bos_in_the_text_is_not_doubled(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("<s>hello") == tokenizer.encode("hello")
    bos = tokenizer.bos_token_id
    # Two that the caller wrote, beside the one that is added: only the added one goes.
    assert tokenizer.encode("<s><s>hello")[:3] == [bos, bos, tokenizer.encode("hello")[1]]
    assert tokenizer.encode("<s>hello", add_special_tokens=False) == tokenizer.encode("hello")


def test_truncation_and_padding_in_the_file_change_no_prompt(tmp_path: Path) -> None:
    backend = byte_bpe()
    backend.enable_truncation(max_length=4)
    backend.enable_padding(length=32)
    write_tokenizer(tmp_path, backend)
    text = "hello world, hello world"
    assert Tokenizer(tmp_path).decode(Tokenizer(tmp_path).encode(text)) == text


def test_half_a_surrogate_pair_is_no_text(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="lone surrogate at character 2"):
        tokenizer.encode("ab\ud800")


# ---- files ----


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: no such file"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}', "\0"],
)
def test_a_malformed_file_is_a_named_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: "):
        Tokenizer(tmp_path)


def test_a_file_over_the_cap_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate((64 << 20) + 1)
    with pytest.raises(TokenizerError, match="is 67108865 bytes, expected at most 67108864"):
        Tokenizer(tmp_path)


def test_ids_without_a_row_in_the_model_are_refused(tmp_path: Path) -> None:
    backend = write_tokenizer(tmp_path)
    n = backend.get_vocab_size()
    Tokenizer(tmp_path, vocab_size=n)
    with pytest.raises(TokenizerError, match=f"has the id {n - 1}, expected ids below .* {n - 1}"):
        Tokenizer(tmp_path, vocab_size=n - 1)


def test_special_tokens_come_from_the_older_file_as_well(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>"}))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.encode("<s>hello") == tokenizer.encode("hello")


def test_a_special_token_of_another_type_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": 7}')
    with pytest.raises(TokenizerError, match="bos_token is 7, expected a string"):
        Tokenizer(tmp_path)


def test_transformers_word_for_no_limit_is_a_number(tmp_path: Path) -> None:
    """It writes int(1e30) as model_max_length, and 31 digits were once refused as too many."""
    write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": int(1e30)}))
    assert Tokenizer(tmp_path).bos_token_id is not None


# ---- streams of text ----


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("skip", [True, False])
def test_pieces_are_whole_characters_and_sum_to_the_text(
    tokenizer: Tokenizer, text: str, skip: bool
) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = stream(tokenizer, ids, skip=skip)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40))
def test_any_text_streams_to_itself(text: str) -> None:
    tokenizer = shared_tokenizer()
    ids = tokenizer.encode(text, add_special_tokens=False)
    expected = tokenizer.decode(ids, skip_special_tokens=False)
    assert "".join(stream(tokenizer, ids, skip=False)) == expected


_shared: list[Tokenizer] = []


def shared_tokenizer() -> Tokenizer:
    """Hypothesis calls a test many times within one set-up."""
    if not _shared:
        import tempfile  # noqa: PLC0415

        folder = Path(tempfile.mkdtemp())
        write_tokenizer(folder)
        _shared.append(Tokenizer(folder))
    return _shared[0]


def test_a_character_cut_short_comes_out_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a👍", add_special_tokens=False)[:-1]
    assert stream(tokenizer, ids) == ["a", "", "", "", "\ufffd"]


def test_bytes_that_are_no_text_do_not_pile_up(tokenizer: Tokenizer) -> None:
    """A model that emits nothing but stray bytes once made each step decode all of them again."""
    stray = tokenizer.encode("é", add_special_tokens=False)[0]
    detokenizer = Detokenizer(tokenizer)
    longest = 0
    for _ in range(200):
        detokenizer.push(stray)
        longest = max(longest, len(detokenizer._ids))
    assert longest <= 2 * MAX_PENDING_TOKENS


def test_special_tokens_leave_no_trace(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("he<|end|>llo", add_special_tokens=False)
    assert "".join(stream(tokenizer, ids)) == "hello"
    assert "".join(stream(tokenizer, ids, skip=False)) == "he<|end|>llo"


def sentencepiece_like() -> Backend:
    """As Llama 2's tokenizer.json: a leading space that decoding strips, and byte fallback."""
    pieces = ["<unk>", "▁he", "llo", "▁world", "▁", "▁x", *[f"<0x{i:02X}>" for i in range(256)]]
    backend = Backend(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True)
    )
    backend.normalizer = normalizers.Prepend("▁")
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(list(SPECIAL))
    return backend


def test_spaces_between_words_survive_a_decoder_that_strips(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, sentencepiece_like(), template=None)
    tokenizer = Tokenizer(tmp_path)
    end = tokenizer.encode("<|end|>", add_special_tokens=False)[-1]
    rng = random.Random(1)
    emoji = [6 + byte for byte in "👍".encode()]
    for _ in range(50):
        ids: list[int] = []
        for _ in range(rng.randrange(1, 12)):
            ids += rng.choice([[1], [2], [3], [5], [end], emoji])
        for skip in (True, False):
            expected = tokenizer.decode(ids, skip_special_tokens=skip)
            assert "".join(stream(tokenizer, ids, skip=skip)) == expected


# ---- against transformers ----


@pytest.mark.ref
def test_ids_and_chats_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

    write_tokenizer(tmp_path)
    ours, theirs = Tokenizer(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in TEXTS:
        assert ours.encode(text) == theirs(text)["input_ids"]
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "wörld"},
        {"role": "user", "content": "日本"},
    ]
    for prompt in (True, False):
        text, ids = ours.encode_chat(messages, add_generation_prompt=prompt)
        assert text == theirs.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt
        )
        found = theirs.apply_chat_template(messages, add_generation_prompt=prompt)
        assert ids == (found if isinstance(found, list) else found["input_ids"])
