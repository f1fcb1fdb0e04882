"""A guest that stands still while a command works on it, and goes on when that is killed.

What a tracer has stopped runs when the tracer dies. What QEMU's monitor has stopped stands until somebody says `cont`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Event

from lazyproc.kernel.family import daemon, keep_only
from lazyproc.migrate.guest_source import standing
from lazyproc.migrate.held_guest import HeldGuest
from lazyproc.qemu.qmp import Qmp


class _Told(Event):
    """Set, it is also told to whoever reads the pipe: before anything is done after which the guest may not go on."""

    def __init__(self, pipe: int) -> None:
        super().__init__()
        self._pipe = pipe

    def set(self) -> None:
        with suppress(BrokenPipeError):  # the watcher was killed
            os.write(self._pipe, b"\0")
        super().set()


@contextmanager
def watched(qmp: Qmp, held: HeldGuest, called_off: Callable[[], object] = lambda: None) -> Iterator[Event]:
    """As `standing`, with an event that is given. Who is killed before that was set leaves the guest running."""
    reading, writing = os.pipe()
    told = _Told(writing)
    try:
        if held.guest.running:
            daemon(lambda: _watch(reading, held, called_off), "lazyproc-watch")
        with held.alone(), standing(qmp, held, told, called_off=called_off):
            yield told
    finally:
        told.set()  # whoever is not killed has let it go on, or has left it as somebody else wants it
        os.close(reading)
        os.close(writing)


def _watch(reading: int, held: HeldGuest, called_off: Callable[[], object]) -> None:
    keep_only(reading)  # the monitor for one, where nobody else is heard as long as it is open
    if not os.read(reading, 1):
        held.let_run()
        called_off()
