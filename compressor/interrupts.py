"""Ctrl-C that counts also where a library swallows it, as in a destructor or behind a bare `except`."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class Interrupts:
    """While open, Ctrl-C raises KeyboardInterrupt, and `raise_again` does so for one that got lost; so does the end."""

    def __init__(self) -> None:
        self.pressed = False

    def __enter__(self) -> Interrupts:
        self._before = signal.getsignal(signal.SIGINT)
        self._ours = (
            threading.current_thread() is threading.main_thread() and self._before is signal.default_int_handler
        )
        if self._ours:
            signal.signal(signal.SIGINT, self._press)
        return self

    def _press(self, number: int, frame: FrameType | None) -> None:
        self.pressed = True
        raise KeyboardInterrupt

    def raise_again(self) -> None:
        if self.pressed:
            raise KeyboardInterrupt

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._ours:
            signal.signal(signal.SIGINT, self._before)
        if kind is None:
            self.raise_again()
