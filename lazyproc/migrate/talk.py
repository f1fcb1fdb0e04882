"""Waiting for what the other side has to say next."""

from __future__ import annotations

import time
from typing import TypeVar

from lazyproc.errors import CannotBeDone, ConnectionLost, LazyprocError, ProtocolError
from lazyproc.pages.channel import Channel
from lazyproc.wire.native import Abort, Event, Ping

E = TypeVar("E", bound=Event)
PING_S = 1.0
DEAD_S = 5.0  # a peer that has not even answered for so long is gone


class Refused(LazyprocError):
    """The other side called it off; nothing has changed on either."""


class Unfit(CannotBeDone):
    """The destination lacks what the tree needs; found before anything was frozen."""


def expect(channel: Channel, kind: type[E], timeout: float) -> E:
    """The next event, which must be a `kind`, within `timeout` seconds.

    Raises Refused with the other side's reason, ConnectionLost, ProtocolError.
    """
    return checked(next_event(channel, timeout, kind.__name__), kind, channel)


def next_event(channel: Channel, timeout: float, what: str) -> Event:
    """Whatever comes next, within `timeout` seconds; `what` should. Raises ConnectionLost, ProtocolError."""
    event = channel.receive(timeout)
    if event is None:
        raise ConnectionLost(
            f"no {what} within {timeout:.0f} s", where=channel.peer, remedy="look at the other side's log"
        )
    return event


def checked(event: Event, kind: type[E], channel: Channel) -> E:
    """`event` when it is a `kind`."""
    if isinstance(event, Abort):
        raise Refused(f"{event.fields.get('reason')!s:.400}", where=channel.peer)
    if not isinstance(event, kind):
        raise ProtocolError(f"{type(event).__name__} instead of {kind.__name__}", where=channel.peer)
    return event


class Pulse:
    """Whether the other side of a control channel is still there: a cable that is cut says nothing, and TCP notices
    only what was sent.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._channel.patience = DEAD_S  # who waits to send does not look for an answer meanwhile
        self._asked = 0.0

    def check(self) -> None:
        """To be called again and again between calls of `receive`. Raises ConnectionLost."""
        now = time.monotonic()
        if now - self._channel.heard > DEAD_S:
            raise ConnectionLost(f"nothing heard for {DEAD_S:.0f} s", where=self._channel.peer)
        if now - self._asked > PING_S:
            self._asked = now
            self._channel.send(Ping())
