"""Adapters by name: names point at contents, and a name can be re-pointed while requests run.

A content is in memory once, however many names point at it; the C core frees it when the last name
and the last request have let go. Loading is slow and blocks nobody: only names are under the lock.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import stat
from pathlib import Path
from typing import TYPE_CHECKING

from milpy.adapter_config import CONFIG_FILE
from milpy.adapters import WEIGHTS_FILE, read_adapter
from milpy.config import ModelConfig
from milpy.errors import AdapterError, EngineError, RequestError
from milpy.hub import resolve_model
from milpy.outputs import check_adapter_name
from milpy.scalars import show_argument
from milpy.strict_json import show_names

if TYPE_CHECKING:
    from milpy import _C

NO_ADAPTER = -1


@dataclass(slots=True)
class _Content:
    id: int
    digest: str
    max_rank: int
    n_holders: int = 0  # names, and requests about to be submitted


@dataclass(frozen=True, slots=True)
class _Name:
    content: _Content
    source: tuple[object, ...]  # folder and state of its files, to tell "the same again" cheaply


class AdapterTable:
    """The adapters of one model. Thread-safe."""

    def __init__(self, model: _C.Model, config: ModelConfig) -> None:
        self._model = model
        self._config = config
        self._names: dict[str, _Name] = {}
        self._contents: dict[str, _Content] = {}
        self._lock = threading.Lock()
        self._loading = threading.Lock()
        self._is_closed = False

    def names(self) -> list[str]:
        with self._lock:
            return sorted(self._names)

    def load(
        self, name: str, path: str | Path, *, allow_adapter_keys: Collection[str] = ()
    ) -> None:
        """Point `name` at the content of `path`. The same content again changes nothing.

        On an error `name` is what it was before.
        """
        check_adapter_name(name)
        folder = resolve_model(path)
        with self._loading:
            if self._is_closed:
                raise EngineError("the engine is closed")
            source = _source(folder)
            try:
                adapter = read_adapter(folder, self._config, allow_adapter_keys=allow_adapter_keys)
            except AdapterError as problem:
                raise AdapterError(f"adapter {show_argument(name)}: {problem}") from problem
            with self._lock:
                content = self._contents.get(adapter.digest)
                if content is not None:
                    self._point(name, content, source)
                    return
            content = _Content(self._model.add_adapter(adapter), adapter.digest, adapter.max_rank)
            with self._lock:
                self._contents[adapter.digest] = content
                self._point(name, content, source)

    def load_once(self, name: str, path: str | Path) -> None:
        """As `load`, but files that have not changed since are not read again."""
        with self._lock:
            known = self._names.get(name)
        if known is None or known.source != _source(resolve_model(path)):
            self.load(name, path)

    def unload(self, name: str) -> None:
        """Forget `name`; requests that have begun keep its content until they end."""
        with self._lock:
            self._check(name)
            self._release(self._names.pop(name).content)

    def check(self, name: str) -> None:
        """RequestError, with the names there are, unless `name` is loaded."""
        with self._lock:
            self._check(name)

    @contextmanager
    def held(self, names: Iterable[str | None]) -> Iterator[dict[str | None, int]]:
        """The content id of each name (None: no adapter), valid inside the `with`."""
        ids: dict[str | None, int] = {None: NO_ADAPTER}
        contents: list[_Content] = []
        try:
            with self._lock:
                for name in {*names} - {None}:
                    assert name is not None
                    self._check(name)
                    content = self._names[name].content
                    content.n_holders += 1
                    contents.append(content)
                    ids[name] = content.id
            yield ids
        finally:
            with self._lock:
                for content in contents:
                    self._release(content)

    def close(self) -> None:
        """Let a load under way end, and take no other. Contents go with the model."""
        with self._loading, self._lock:
            self._is_closed = True
            self._names.clear()
            self._contents.clear()

    def _check(self, name: str) -> None:
        if name not in self._names:
            known = show_names(self._names, 20) or "none: no adapter is loaded"
            raise RequestError(f"adapter is {show_argument(name)}, expected one of {known}")

    def _point(self, name: str, content: _Content, source: tuple[object, ...]) -> None:
        content.n_holders += 1
        before = self._names.get(name)
        self._names[name] = _Name(content, source)
        if before is not None:
            self._release(before.content)

    def _release(self, content: _Content) -> None:
        content.n_holders -= 1
        if content.n_holders == 0 and not self._is_closed:
            del self._contents[content.digest]
            self._model.release_adapter(content.id)


def _source(folder: Path) -> tuple[object, ...]:
    state: list[object] = [folder.resolve()]
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        try:
            found = stat(folder / file)
        except OSError:
            state.append(None)
        else:
            state.append((found.st_ino, found.st_size, found.st_mtime_ns))
    return tuple(state)
