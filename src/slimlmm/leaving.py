"""SIGTERM and Ctrl-C: a training writes its state first, anything else stops at once; what is finished is on disk anyway."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

CAUGHT = (signal.SIGTERM, signal.SIGINT)


class LeftError(BaseException):
    """The process was told to stop. No `Exception`, so that what goes on after failures does not go on after this."""

    def __init__(self, number: int, where: str = "") -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}{where}; the same command goes on from there")
        self.code = 128 + number


class _State:
    patient = False
    asked: int | None = None


@contextmanager
def heeding() -> Iterator[None]:
    """Within the block SIGTERM and Ctrl-C raise `LeftError`, at once or within `patiently` when `asked` is looked at.

    The second one raises at once in any case. Only the main thread can do so; in another one the block changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def told(number: int, _frame: FrameType | None) -> None:
        if not _State.patient or _State.asked is not None:
            raise LeftError(number)
        _State.asked = number

    before = {number: signal.signal(number, told) for number in CAUGHT}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _State.asked = None


@contextmanager
def patiently() -> Iterator[None]:
    """Within the block one signal waits until it is looked for by `asked`, and afterwards until `heed`."""
    _State.patient = True
    try:
        yield
    finally:
        _State.patient = False


def asked() -> bool:
    """Tell whether a signal waits."""
    return _State.asked is not None


def heed(where: str) -> None:
    """Raise `LeftError` where a signal waits; `where` says what is on disk."""
    if _State.asked is not None:
        raise LeftError(_State.asked, where)
