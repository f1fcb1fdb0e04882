"""The three connections of a session, dialled or let in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from lazyproc.facts import dataclass
from lazyproc.pages.peer import Trust
from lazyproc.pages.transport import Channel, Listener, Session, dial
from lazyproc.wire.native import Party, Role

MAX_INCOMPLETE = 64  # sessions
ROLES = (Role.CONTROL, Role.URGENT, Role.BULK)


@dataclass(frozen=True, slots=True)
class Link:
    """Urgent and bulk never share a queue, and neither shares one with what the two sides agree on."""

    session: Session
    control: Channel
    urgent: Channel
    bulk: Channel


@contextmanager
def dialled(target: str, side: Party, trust: Trust) -> Iterator[Link]:
    """A new session with whoever listens at `target`. Raises what transport.dial does."""
    session = Session.new()
    with ExitStack() as stack:
        control, urgent, bulk = (
            stack.enter_context(dial(target, session.hello(role), side, trust=trust)) for role in ROLES
        )
        yield Link(session, control, urgent, bulk)


class Gathering:
    """Sessions whose connections come one by one, the control connection first."""

    def __init__(self) -> None:
        self._open: dict[str, tuple[Session, dict[Role, Channel]]] = {}

    def add(self, channel: Channel) -> Link | None:
        """Welcome a connection, or refuse it; the Link when it was a session's last."""
        hello = channel.hello
        assert hello is not None, "the listener has read the HELLO"
        if hello.role is Role.CONTROL and hello.session not in self._open:
            self._make_room()
            self._open[hello.session] = Session(hello.session, hello.token), {}
        session, channels = self._open.get(hello.session, (None, {}))
        if session is None or not session.owns(hello) or hello.role in channels:
            channel.refuse("no such session here")
            return None
        channel.welcome()
        channels[hello.role] = channel
        if len(channels) < len(ROLES):
            return None
        del self._open[hello.session]
        return Link(session, channels[Role.CONTROL], channels[Role.URGENT], channels[Role.BULK])

    def next(self, door: Listener, timeout: float) -> Link | None:
        """The next whole link, None when none is whole after `timeout` seconds of quiet."""
        while (channel := door.accept(timeout)) is not None:
            link = self.add(channel)
            if link is not None:
                return link
        return None

    def _make_room(self) -> None:
        """Who began a session and never completed it has to go, the oldest first."""
        if len(self._open) == MAX_INCOMPLETE:
            self._forget(next(iter(self._open)))

    def close(self) -> None:
        for session in list(self._open):
            self._forget(session)

    def _forget(self, session: str) -> None:
        for channel in self._open.pop(session)[1].values():
            channel.close()
