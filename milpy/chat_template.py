"""Chat templates: programs in a model's folder, run in a process of their own.

What is read here is the template and the messages; template_process.py holds jinja2's immutable
sandbox and the bounds on time and memory. The process is started when somebody chats, once for a
model, and ends with it. No template ever comes with a request.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from os.path import exists
from pathlib import Path
from typing import Any, TypeAlias

from milpy.errors import MilpyError, RequestError, TokenizerError
from milpy.files import read_whole
from milpy.scalars import kind_of_argument, show_argument
from milpy.strict_json import Json, kind_of

TEMPLATE_FILE = "chat_template.jinja"
CONFIG_FILE = "tokenizer_config.json"

MAX_TEMPLATE_BYTES = 256 << 10
MAX_MESSAGE_DEPTH = 16
MAX_RENDER_SECONDS = 1.0  # of the process's own time, whatever else the machine does

PROBE = ({"role": "user", "content": "Hello"},)

Message: TypeAlias = Mapping[str, Any]

# By the parent's own sys.path, so that both find the same jinja2.
START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from milpy.template_process import main; main(float(sys.argv[2]))"
)


class ChatTemplate:
    """A folder's template, compiled, and rendered once on a probe before it is trusted.

    Safe to use from several threads, one conversation at a time.
    """

    def __init__(
        self, folder: Path, config: Mapping[str, Json], special_tokens: Mapping[str, str]
    ) -> None:
        source, self._where = _source(folder, config)
        # transformers passes these two as well, and templates ask whether they are none.
        values = {**special_tokens, "tools": None, "documents": None}
        self._first = {
            "template": source,
            "values": values,
            "messages": _check_messages(PROBE),
            "add_generation_prompt": True,
        }
        self._lock = threading.Lock()
        self._process: _Process | None = None
        self._stop: Callable[[], object] = lambda: None
        with self._lock:
            self._start()

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """The conversation as text. RequestError where messages do not suit the template."""
        request = {
            "messages": _check_messages(messages),
            "add_generation_prompt": add_generation_prompt,
        }
        with self._lock:
            process = self._process or self._start()
            return self._ask(process, request, RequestError)

    def _start(self) -> _Process:
        process = self._process = _Process()
        self._stop = weakref.finalize(self, process.stop)
        self._ask(process, self._first, TokenizerError)
        return process

    def _drop(self) -> None:
        self._process = None
        self._stop()

    def _ask(self, process: _Process, request: object, error: type[MilpyError]) -> str:
        # Whoever sends a conversation need not know where the model lies.
        where = f"{self._where}: " if request is self._first else ""
        try:
            reply = process.ask(request)
        except BaseException as problem:
            # Ctrl-C too: a later question must not read the answer to this one.
            self._drop()
            if isinstance(problem, EOFError | OSError | ValueError):
                raise error(f"{where}chat template: {problem}") from problem
            raise
        if "text" not in reply:
            if request is self._first:
                self._drop()
            raise error(f"{where}chat template: {reply['error']}")
        return reply["text"]


class _Process:
    """One line of JSON to it, one line back."""

    def __init__(self) -> None:
        if not sys.executable:
            raise TokenizerError("chat template: needs sys.executable, the Python to render it in")
        # A session of its own: Ctrl-C in a terminal is for the parent to answer.
        try:
            self._child = subprocess.Popen(
                [sys.executable, "-I", "-c", START, json.dumps(sys.path), str(MAX_RENDER_SECONDS)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as problem:
            raise TokenizerError(
                f"chat template: no process to render it in: {problem}"
            ) from problem

    def ask(self, request: object) -> dict[str, str]:
        """EOFError or OSError where the process has ended."""
        assert self._child.stdin is not None and self._child.stdout is not None
        line = json.dumps(request).encode() + b"\n"
        try:
            self._child.stdin.write(line)
            self._child.stdin.flush()
        except BrokenPipeError as problem:
            raise EOFError(self._ending()) from problem
        answer = self._child.stdout.readline()
        if not answer.endswith(b"\n"):
            raise EOFError(self._ending())
        reply: dict[str, str] = json.loads(answer)
        return reply

    def _ending(self) -> str:
        status = self._child.wait()
        if status == -signal.SIGPROF:
            return f"took too long, expected at most {MAX_RENDER_SECONDS:g} s of processor time"
        return f"its process ended with status {status}, expected an answer"

    def stop(self) -> None:
        self._child.kill()
        self._child.communicate()


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
        raise RequestError(f"messages is {kind_of_argument(messages)}, expected {expected}")
    if not messages:
        raise RequestError(f"messages is empty, expected {expected}")
    result: list[Json] = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise RequestError(f"{where} is {kind_of_argument(message)}, expected {expected}")
        role = message.get("role")
        if not isinstance(role, str) or not role:
            raise RequestError(f"{where}: role is {show_argument(role)}, expected a string")
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
