"""Brings a pager's trace out of its ring before it is overwritten, in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress

from lazyproc.errors import ConnectionLost, ProtocolError
from lazyproc.uffd.pager import Pager

# The ring holds 65536 faults and one thread serves them, at more than 2 us each: it takes longer to be full.
PERIOD_S = 0.1

Sink = Callable[[bytes, int], None]
"""Takes records as docs/trace.md has them, and how many have been lost so far."""


class Recorder:
    """Hands the faults of a started pager to `sink`, in pieces, until `close`, which ends with the last of them."""

    def __init__(self, pager: Pager, sink: Sink) -> None:
        self._pager = pager
        self._sink = sink
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="trace", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """From now on the sink is called by `drain` only."""
        self._stopping.set()
        self._thread.join()

    def close(self) -> None:
        self.stop()
        self.drain()

    def drain(self, end: int | None = None) -> None:
        """What has come since, up to the pager's fault number `end`. Once stopped."""
        with suppress(ConnectionLost, ProtocolError):  # whoever reads that connection says so
            for records, lost in self._pager.trace(end):
                self._sink(records, lost)

    def _run(self) -> None:
        while not self._stopping.wait(PERIOD_S):
            self.drain()
