"""The process that renders one model folder's chat template; chat_template.py starts it.

A template is a program, and jinja2's sandbox bounds neither its time nor its memory: two nested
loops that print nothing, or a string joined to itself sixty times, need no forbidden call. So it
runs where the kernel bounds both. This is the only file that imports jinja2, and it imports nothing
of milpy.

One JSON object per line: first {"template", "values", "messages", ...}, which is compiled and
rendered as a probe, then {"messages", "add_generation_prompt"} for each conversation. Each is
answered by {"text"} or {"error"}; SIGPROF ends the process where the time is up.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, exceptions, ext, sandbox

MAX_RENDERED = 1 << 20  # characters beyond those of the messages
MAX_RENDER_BYTES = 512 << 20


def main(seconds: float) -> None:
    """Answer lines of stdin, each within `seconds`, until it ends: then the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    _limit_memory()
    template: Template | None = None
    values: dict[str, object] = {}
    for line in sys.stdin.buffer:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            if template is None:
                template, values = (
                    _environment().from_string(request["template"]),
                    request["values"],
                )
            reply = {"text": _render(template, values, request, len(line))}
        except Exception as problem:  # a template may raise whatever its filters do
            reply = {"error": str(problem) or type(problem).__name__}
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n")
        sys.stdout.buffer.flush()


def _limit_memory() -> None:
    """Some more than what is mapped by now, which under sanitizers is terabytes."""
    with open("/proc/self/statm") as file:
        n_bytes = int(file.read().split()[0]) * resource.getpagesize() + MAX_RENDER_BYTES
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if hard == resource.RLIM_INFINITY or n_bytes < hard:
        resource.setrlimit(resource.RLIMIT_AS, (n_bytes, hard))


def _render(
    template: Template, values: dict[str, object], request: dict[str, Any], n_given: int
) -> str:
    limit = MAX_RENDERED + 4 * n_given
    parts: list[str] = []
    n_characters = 0
    for part in template.generate(
        messages=request["messages"],
        add_generation_prompt=request["add_generation_prompt"],
        **values,
    ):
        parts.append(part)
        n_characters += len(part)
        if n_characters > limit:
            raise ValueError(f"gave more than {limit} characters")
    return "".join(parts)


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
