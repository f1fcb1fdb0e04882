"""Waiting for what the other side has to say next."""

from __future__ import annotations

import time
from typing import TypeVar

from lazyproc.errors import CannotBeDone, ConnectionLost, LazyprocError, ProtocolError
from lazyproc.pages.transport import Channel
from lazyproc.wire.native import Abort, Event

E = TypeVar("E", bound=Event)


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


def milliseconds(since: float) -> float:
    """Since a reading of time.monotonic()."""
    return (time.monotonic() - since) * 1e3
