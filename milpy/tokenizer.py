"""Text to ids and back, by the files of a model's folder, which nobody vouches for.

Ids come from the `tokenizers` library and tokenizer.json alone, as transformers' fast tokenizers
make them; truncation and padding that the file asks for are switched off, since they would change a
prompt in silence. What begins and ends a prompt is tokenizer.json's post-processor, as transformers
5 has it: that drops add_bos_token and add_eos_token of tokenizer_config.json where the folder has a
tokenizer.json. transformers 4 let them win for some classes, so where they say otherwise than the
post-processor the model is refused: nobody can tell which its author ran.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from os.path import exists
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milpy.errors import RequestError, TokenizerError
from milpy.files import read_whole
from milpy.strict_json import Json, parse_object, show
from milpy.tokenizer_check import Affixes, CheckedFile, check_tokenizer

if TYPE_CHECKING:
    from milpy.chat_template import ChatTemplate, Message

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"

MAX_TOKENIZER_BYTES = 64 << 20
MAX_CONFIG_BYTES = 16 << 20  # it repeats every added token
MAX_CONFIG_DEPTH = 16
MAX_PROMPT_BYTES = 2_000_000
MAX_PENDING_TOKENS = 8

# Special tokens that chat templates may name.
TEMPLATE_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


class Tokenizer:
    """A model folder's tokenizer. Safe to use from several threads."""

    def __init__(self, folder: str | Path, *, vocab_size: int | None = None) -> None:
        """Read `folder`'s files; TokenizerError says what is missing or wrong.

        With `vocab_size`, ids that the model has no row for are refused.
        """
        self.folder = Path(folder)
        self._backend, affixes = _load(self.folder / TOKENIZER_FILE, vocab_size)
        added = self._backend.get_added_tokens_decoder()
        self._special_ids = frozenset(token for token, info in added.items() if info.special)
        self._config = _read_config(self.folder / CONFIG_FILE)
        self._names = _special_tokens(self.folder, self._config)
        bos = self._names.get("bos_token")
        self.bos_token_id: int | None = self._backend.token_to_id(bos) if bos else None
        eos = self._names.get("eos_token")
        eos_id = self._backend.token_to_id(eos) if eos else None
        _check_affixes(self.folder, self._config, affixes, self.bos_token_id, eos_id)
        self._template: ChatTemplate | None = None
        self.decode_token = lru_cache(maxsize=65_536)(self._decode_token)

    @property
    def vocab_size(self) -> int:
        """Tokens it knows, added ones included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids as the file's post-processor makes them.

        A BOS in the text's own words is not doubled by the one that the post-processor adds.
        """
        check_text(text, "prompt")
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        bos = self.bos_token_id
        if add_special_tokens and bos is not None and ids[:2] == [bos, bos]:
            return ids[1:]
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def is_special(self, token: int) -> bool:
        return token in self._special_ids

    def _decode_token(self, token: int) -> str:
        """One token's own text, special or not."""
        return self.decode([token], skip_special_tokens=False)

    # ---- chat ----

    def apply_chat_template(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> str:
        """The conversation as the model was trained to read it."""
        template = self.check_chat_template()
        return template.render(messages, add_generation_prompt=add_generation_prompt)

    def check_chat_template(self) -> ChatTemplate:
        """Compile it, once; TokenizerError where there is none or it fails."""
        from milpy.chat_template import ChatTemplate  # noqa: PLC0415 - and with it jinja2

        if self._template is None:
            self._template = ChatTemplate(self.folder, self._config, self._names)
        return self._template

    def encode_chat(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> tuple[str, list[int]]:
        """The rendered conversation and its ids: the template alone says which tokens begin it."""
        text = self.apply_chat_template(messages, add_generation_prompt=add_generation_prompt)
        return text, self.encode(text, add_special_tokens=False)


class Detokenizer:
    """One answer's tokens to text, piece by piece: pieces are whole characters, and their sum is
    the text of all tokens.

    A window of tokens is decoded with and without the new ones, because a token's text depends on
    those before it (a leading space, a byte of a character). The window moves only past tokens that
    gave text, so that it always begins with some.
    """

    __slots__ = ("_before", "_ids", "_n_read", "_skip_special", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special_tokens
        self._ids: list[int] = []  # the window
        self._n_read = 0  # of them, those whose text is out
        self._before = ""  # their text

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is in pieces."""
        if self._skip_special and self._tokenizer.is_special(token):
            return ""
        self._ids.append(token)
        text = self._decode(self._ids)
        # Only so many tokens can be pieces of one character; more are no character at all.
        if text.endswith("\ufffd") and len(self._ids) - self._n_read < MAX_PENDING_TOKENS:
            return ""
        return self._take(text)

    def flush(self) -> str:
        """What is left at the end: pieces of a character come out as U+FFFD."""
        if self._n_read == len(self._ids):
            return ""
        return self._take(self._decode(self._ids))

    def _take(self, text: str) -> str:
        new = text[len(self._before) :]
        if new:
            del self._ids[: self._n_read]
            self._n_read = len(self._ids)
            self._before = self._decode(self._ids)
        return new

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip_special)


# ---- reading ----


def check_text(text: str, what: str) -> None:
    """Refuse text that has no UTF-8, or too much of it."""
    try:
        n_bytes = len(text.encode("utf-8"))
    except UnicodeEncodeError as problem:
        raise RequestError(
            f"{what} has a lone surrogate at character {problem.start}, expected text"
        ) from problem
    if n_bytes > MAX_PROMPT_BYTES:
        raise RequestError(f"{what} is {n_bytes} bytes, expected at most {MAX_PROMPT_BYTES}")


def _load(path: Path, vocab_size: int | None) -> tuple[Any, Affixes]:
    """The library's tokenizer, from a file that was checked before, and what it adds to a text."""
    if not exists(path):
        raise TokenizerError(f"{path}: no such file, expected one: token ids need no tokenizer")
    data = read_whole(path, MAX_TOKENIZER_BYTES, TokenizerError)
    checked = check_tokenizer(data, source=str(path), vocab_size=vocab_size)
    from tokenizers import Tokenizer as Backend  # noqa: PLC0415 - 50 ms, and ids do without

    try:
        backend = Backend.from_buffer(data)
        # Both would change prompts in silence; transformers resets them as well.
        backend.no_truncation()
        backend.no_padding()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as problem:  # a Rust panic is no Exception
        raise TokenizerError(f"{path}: {problem}") from problem
    _check_ids(path, backend, checked)
    return backend, checked.affixes


def _check_ids(path: Path, backend: Any, checked: CheckedFile) -> None:
    """The library numbers added tokens itself, whatever the file says."""
    for token, number in checked.added.items():
        found = backend.token_to_id(token)
        if found != number:
            raise TokenizerError(
                f"{path}: added token {show(token)} has the id {number}, expected {found}, "
                "the next that is free"
            )


def _check_affixes(
    folder: Path,
    config: Mapping[str, Json],
    affixes: Affixes,
    bos: int | None,
    eos: int | None,
) -> None:
    """Refuse flags that say otherwise than the post-processor does."""
    for key, token, found in (
        ("add_bos_token", bos, affixes.before),
        ("add_eos_token", eos, affixes.after),
    ):
        flag = config.get(key)
        if flag is None:
            continue
        if not isinstance(flag, bool):
            raise TokenizerError(
                f"{folder / CONFIG_FILE}: {key} is {show(flag)}, expected true or false"
            )
        # As in transformers, a token without a name is not added.
        expected = (token,) if flag and token is not None else ()
        if found != expected:
            raise TokenizerError(
                f"{folder / CONFIG_FILE}: {key} is {show(flag)}, which is the ids "
                f"{list(expected)}, but the post_processor of {TOKENIZER_FILE} adds "
                f"{list(found)}: expected both to say the same"
            )


def _read_config(path: Path) -> dict[str, Json]:
    if not exists(path):
        return {}
    data = read_whole(path, MAX_CONFIG_BYTES, TokenizerError)
    return parse_object(data, source=str(path), max_depth=MAX_CONFIG_DEPTH, error=TokenizerError)


def _special_tokens(folder: Path, config: Mapping[str, Json]) -> dict[str, str]:
    """Special tokens by name; the older special_tokens_map.json fills the config's gaps."""
    older = _read_config(folder / SPECIAL_TOKENS_FILE)
    names: dict[str, str] = {}
    for name in TEMPLATE_TOKENS:
        value = config.get(name) if config.get(name) is not None else older.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            names[name] = value
        elif value is not None:
            raise TokenizerError(
                f"{folder / CONFIG_FILE}: {name} is {show(value)}, expected a string"
            )
    return names
