"""Signals that are not to end what must not be left half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def deaf() -> Iterator[None]:
    """Ctrl-C and a closed terminal end nothing in the block. Python hears signals in its main thread alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {sig: signal.signal(sig, signal.SIG_IGN) for sig in SIGNALS}
    try:
        yield
    finally:
        for sig, action in before.items():
            signal.signal(sig, action)


def ignore_interrupts() -> None:
    """For the rest of a process that is there for one thing only, and has come to where it must not stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
