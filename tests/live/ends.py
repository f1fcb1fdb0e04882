"""Both ends of a session's link, for tests that are one of the two sides."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

from lazyproc.migrate.link import ROLES, Link
from lazyproc.pages.channel import Channel
from lazyproc.pages.session import Session
from lazyproc.wire.native import Abort, Event, Party, Welcome


@dataclass(frozen=True)
class Ends:
    source: Link
    destination: Link

    def say(self, *what: Event) -> None:
        for event in what:
            self.destination.control.send(event)


@contextmanager
def linked() -> Iterator[Ends]:
    session = Session.new()
    sources, destinations = [], []
    for role in ROLES:
        one, other = socket.socketpair()
        source, destination = Channel(one, Party.SOURCE, dialled="there"), Channel(other, Party.DESTINATION)
        source.send(session.hello(role))
        destination.receive(10)
        destination.welcome()
        assert isinstance(source.receive(10), Welcome)
        sources.append(source)
        destinations.append(destination)
    with closing(Link(session, *sources)) as ours, closing(Link(session, *destinations)) as theirs:
        yield Ends(ours, theirs)


def called_off(link: Link) -> str:
    """Why, when that is said."""
    while not isinstance(event := link.control.receive(10), Abort):
        assert event is not None
    return str(event.fields["reason"])
