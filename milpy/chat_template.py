"""Chat templates: programs in a model's folder, run in jinja2's immutable sandbox.

This is the only file that imports jinja2, and it is imported only when somebody chats. No template
ever comes with a request. The sandbox is one layer: sizes and time are capped, operators that make
much out of little are refused, and a template sees plain values alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from os.path import exists
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from jinja2 import Template, TemplateError, exceptions, ext, sandbox

from milpy.errors import MilpyError, RequestError, TokenizerError
from milpy.files import read_whole
from milpy.strict_json import Json, kind_of, show

TEMPLATE_FILE = "chat_template.jinja"
CONFIG_FILE = "tokenizer_config.json"

MAX_TEMPLATE_BYTES = 256 << 10
MAX_MESSAGE_DEPTH = 16
MAX_RENDERED = 1 << 20  # characters beyond those of the messages
MAX_RENDER_SECONDS = 1.0

PROBE = ({"role": "user", "content": "Hello"},)

Message: TypeAlias = Mapping[str, Any]


class ChatTemplate:
    """A folder's template, compiled, and rendered once on a probe before it is trusted."""

    def __init__(
        self, folder: Path, config: Mapping[str, Json], special_tokens: Mapping[str, str]
    ) -> None:
        source, where = _source(folder, config)
        # transformers passes these two as well, and templates ask whether they are none.
        self._values: dict[str, object] = {**special_tokens, "tools": None, "documents": None}
        try:
            self._template: Template = _environment().from_string(source)
        except (TemplateError, RecursionError) as problem:
            raise TokenizerError(f"{where}: chat template: {problem}") from problem
        self._generate(_check_messages(PROBE), True, TokenizerError)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """The conversation as text. RequestError where messages do not suit the template."""
        return self._generate(_check_messages(messages), add_generation_prompt, RequestError)

    def _generate(
        self, messages: list[Json], add_generation_prompt: bool, error: type[MilpyError]
    ) -> str:
        limit = MAX_RENDERED + 4 * len(json.dumps(messages))
        deadline = time.monotonic() + MAX_RENDER_SECONDS
        parts: list[str] = []
        n_characters = 0
        try:
            for part in self._template.generate(
                messages=messages, add_generation_prompt=add_generation_prompt, **self._values
            ):
                parts.append(part)
                n_characters += len(part)
                if n_characters > limit:
                    raise error(f"chat template: gave more than {limit} characters")
                if time.monotonic() > deadline:
                    raise error(f"chat template: ran for more than {MAX_RENDER_SECONDS:g} s")
        except MilpyError:
            raise
        except Exception as problem:  # a template may raise whatever its filters do
            raise error(f"chat template: {problem}") from problem
        return "".join(parts)


def _source(folder: Path, config: Mapping[str, Json]) -> tuple[str, Path]:
    """The template's text and the file it is from; chat_template.jinja comes first."""
    path = folder / TEMPLATE_FILE
    if exists(path):
        data = read_whole(path, MAX_TEMPLATE_BYTES, TokenizerError)
        try:
            return data.decode("utf-8"), path
        except UnicodeDecodeError as problem:
            raise TokenizerError(f"{path}: is not UTF-8 at byte {problem.start}") from problem
    path = folder / CONFIG_FILE
    value = config.get("chat_template")
    if value is None:
        raise TokenizerError(
            f"{folder}: has no chat template, expected {TEMPLATE_FILE} or chat_template in "
            f"{CONFIG_FILE}"
        )
    if isinstance(value, list):
        value = _default_template(path, value)
    if not isinstance(value, str):
        raise TokenizerError(f"{path}: chat_template is {kind_of(value)}, expected a string")
    if len(value.encode("utf-8")) > MAX_TEMPLATE_BYTES:
        raise TokenizerError(
            f"{path}: chat_template is {len(value)} characters, expected at most "
            f"{MAX_TEMPLATE_BYTES} bytes"
        )
    return value, path


def _default_template(path: Path, templates: list[Json]) -> Json:
    """Of several named templates, the one for plain chat."""
    for entry in templates:
        if isinstance(entry, dict) and entry.get("name") == "default":
            return entry.get("template")
    raise TokenizerError(f"{path}: chat_template is a list, expected one entry named default")


def _check_messages(messages: Sequence[Message]) -> list[Json]:
    """A copy of plain values; templates see nothing of the caller's objects."""
    expected = 'a list of {"role": ..., "content": ...}'
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise RequestError(f"messages is {kind_of(messages)}, expected {expected}")
    if not messages:
        raise RequestError(f"messages is empty, expected {expected}")
    result: list[Json] = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise RequestError(f"{where} is {kind_of(message)}, expected {expected}")
        role = message.get("role")
        if not isinstance(role, str) or not role:
            raise RequestError(f"{where}: role is {show(role)}, expected a string")
        if "content" not in message and "tool_calls" not in message:
            raise RequestError(f"{where}: content is absent, expected a string")
        result.append(_plain(message, where, MAX_MESSAGE_DEPTH))
    return result


def _plain(value: object, where: str, depth: int) -> Json:
    if depth == 0:
        raise RequestError(f"{where}: is nested deeper than {MAX_MESSAGE_DEPTH} levels")
    if value is None or type(value) in (bool, int, float):
        return value  # type: ignore[return-value]
    if isinstance(value, str):
        # Half of a surrogate pair has no UTF-8, and no tokenizer takes it.
        if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
            raise RequestError(f"{where}: has a lone surrogate, expected text")
        return str(value)
    if isinstance(value, Mapping):
        return {
            str(_plain(key, where, depth - 1)): _plain(item, where, depth - 1)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_plain(item, where, depth - 1) for item in value]
    raise RequestError(f"{where}: has a {type(value).__name__}, expected text, numbers and lists")


def _raise_exception(message: object) -> NoReturn:
    raise ValueError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(value: object, indent: int | None = None, **_: object) -> str:
    # As transformers has it: jinja2's own escapes for HTML, which would change the prompt.
    return json.dumps(value, ensure_ascii=False, indent=indent)


class _Generation(ext.Extension):
    """`{% generation %}` marks text for training; here it is only its content."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(sandbox.ImmutableSandboxedEnvironment):
    """Of the operators that make much out of little, arithmetic on numbers is left."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        numbers = (int, float)
        if operator == "**" or not (isinstance(left, numbers) and isinstance(right, numbers)):
            raise exceptions.SecurityError(
                f"{type(left).__name__} {operator} {type(right).__name__} is not allowed"
            )
        return super().call_binop(context, operator, left, right)


def _environment() -> _Sandbox:
    """What chat templates are written for: transformers' settings and functions."""
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols]
    )
    functions: dict[str, Callable[..., object]] = {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }
    environment.globals.update(functions)
    environment.filters["tojson"] = _tojson
    return environment
