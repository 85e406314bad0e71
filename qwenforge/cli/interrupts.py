"""Ctrl-C that holds where a library swallows it.

Python prints and drops a KeyboardInterrupt that strikes in a weak reference's callback, and torch's tracer answers one
with an error of its own. So the signal is also remembered: long work asks at its steps, and an error that follows is
the interrupt's.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_seen = threading.Event()


@contextmanager
def remembered() -> Iterator[None]:
    """Remember interrupts inside the block, and turn any error after one into KeyboardInterrupt.

    Does nothing outside the main thread, or where SIGINT is ignored or handled by somebody else.
    """
    _seen.clear()
    usual = threading.current_thread() is threading.main_thread()
    if not usual or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    report = sys.unraisablehook
    signal.signal(signal.SIGINT, _remember)
    sys.unraisablehook = lambda dropped: None if _seen.is_set() else report(dropped)
    try:
        yield
    except Exception:
        if _seen.is_set():
            raise KeyboardInterrupt from None
        raise
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.unraisablehook = report


def raise_if_interrupted() -> None:
    """Raise KeyboardInterrupt when an interrupt was remembered: a library may have dropped it."""
    if _seen.is_set():
        raise KeyboardInterrupt


def _remember(number: int, frame: FrameType | None) -> None:
    _seen.set()
    signal.default_int_handler(number, frame)
