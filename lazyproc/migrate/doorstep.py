"""Where links come in for a keeper whose `receive` is gone: it listens in its place."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

from lazyproc.errors import CannotListen, UsageError
from lazyproc.migrate.place import Place
from lazyproc.pages.channel import Channel
from lazyproc.pages.door import Door, inherited, listen
from lazyproc.wire.native import Party

LET_LISTEN = {"do": "let listen"}  # of a receiver that begins where a keeper listens
YIELD_S = 2.0  # for it to do so


class Doorstep:
    """Of one session; not of one that dials itself."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._from = 0.0  # on the monotonic clock
        self.door: Door | None = None

    def next(self, alone: Callable[[], bool]) -> Channel | None:
        """Who has come. While there is a `receive`, which hands connections on, nobody listens but who did already."""
        if self._place.dials or not self._place.address:
            return None
        if self.door is None and time.monotonic() >= self._from and alone():
            with suppress(CannotListen, UsageError):  # of files for TLS that are being renewed
                self.door = listen(self._place.address, Party.DESTINATION, trust=self._place.trust)
        return self.door.accept(0) if self.door is not None else None

    def give_up(self) -> None:
        """A `receive` begins, which hands on who comes for us. When it has ended we listen again."""
        self._from = time.monotonic() + YIELD_S
        if self.door is not None:
            self.door.close()
            self.door = None

    def inherit(self) -> None:
        """That of a keeper that is dead, whose descriptors we share."""
        if self._place.address:
            self.door = inherited(self._place.address, Party.DESTINATION, trust=self._place.trust)
