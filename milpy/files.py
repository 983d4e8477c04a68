"""Untrusted files, opened once: regular files only, their size taken from the open descriptor.

Symbolic links are followed, since the Hub's cache is made of them; what they lead to must be a
regular file. A pipe or device of that name is an error and never blocks the open.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from types import TracebackType

from milpy.errors import MilpyError

WINDOW_BYTES = 8 << 20


class ByteFile:
    """An open file of fixed size. `size` is fstat's; a read that comes short is an error."""

    __slots__ = ("_error", "_fd", "path", "size")

    def __init__(self, path: Path, error: type[MilpyError]) -> None:
        self.path = path
        self._error = error
        self._fd = -1
        try:
            # O_NONBLOCK: opening a FIFO must not wait for a writer before it can be refused.
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            status = os.fstat(self._fd)
        except (OSError, ValueError) as problem:
            self.close()
            reason = problem.strerror if isinstance(problem, OSError) else str(problem)
            raise error(f"{path}: cannot be opened: {reason}") from problem
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise error(f"{path}: is not a regular file")
        self.size = status.st_size

    def read_at(self, begin: int, n_bytes: int) -> bytes:
        """Exactly the bytes [begin, begin + n_bytes)."""
        parts: list[bytes] = []
        while n_bytes > 0:
            try:
                part = os.pread(self._fd, min(n_bytes, WINDOW_BYTES), begin)
            except OSError as problem:
                raise self._error(f"{self.path}: read failed: {problem.strerror}") from problem
            if not part:
                raise self._error(
                    f"{self.path}: ends at byte {begin}, expected {n_bytes} more: "
                    "it was cut while being read"
                )
            parts.append(part)
            begin += len(part)
            n_bytes -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> ByteFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_whole(path: Path, max_bytes: int, error: type[MilpyError]) -> bytes:
    """All of a small file; larger than `max_bytes` is an error before any of it is read."""
    with ByteFile(path, error) as file:
        if file.size > max_bytes:
            raise error(f"{path}: is {file.size} bytes, expected at most {max_bytes}")
        return file.read_at(0, file.size)
