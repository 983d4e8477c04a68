"""Ctrl-C at a moment of our choosing.

Python raises KeyboardInterrupt between any two bytecodes: between a submitted request and the line
that remembers its id, say, which would leave the request running for ever. While this is held the
signal is only noted; a second one raises at once, as ever.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class HeldInterrupt:
    """Within `with`, `pending` says that Ctrl-C was pressed. Leaving raises it where nothing did.

    Only the main thread sees signals, and a handler of the caller's own is left in place.
    """

    def __init__(self) -> None:
        self.pending = False
        self._is_held = False

    def check(self) -> None:
        """Raise a noted KeyboardInterrupt, here."""
        if self.pending:
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.pending:
            signal.default_int_handler(number, frame)
        self.pending = True

    def __enter__(self) -> HeldInterrupt:
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._note)
            self._is_held = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._is_held:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if kind is None:
            self.check()
