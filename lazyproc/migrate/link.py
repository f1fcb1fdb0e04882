"""The three connections of a session, dialled or let in."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress

from lazyproc.errors import ConnectionLost, LazyprocError, ProtocolError
from lazyproc.events import Listener, Note, StateChanged
from lazyproc.facts import dataclass
from lazyproc.pages.channel import Channel
from lazyproc.pages.dial import Declined, dial
from lazyproc.pages.door import Door
from lazyproc.pages.peer import Trust
from lazyproc.pages.session import Session
from lazyproc.wire.native import Hello, Party, Role

MAX_INCOMPLETE = 64  # sessions
FIRST_PAUSE_S, LAST_PAUSE_S = 0.05, 5.0  # between two attempts to reconnect
NOT_KNOWN = "no such session here"
ROLES = (Role.CONTROL, Role.URGENT, Role.BULK)


@dataclass(frozen=True, slots=True)
class Link:
    """Urgent and bulk never share a queue, and neither shares one with what the two sides agree on."""

    session: Session
    control: Channel
    urgent: Channel
    bulk: Channel

    @property
    def sockets(self) -> list[socket.socket]:
        """In the order of ROLES."""
        return [channel.socket for channel in (self.control, self.urgent, self.bulk)]

    def hang_up(self) -> None:
        """`close`, and for whoever has duplicates as well: the other side is to notice."""
        with suppress(OSError):
            self.control.socket.shutdown(socket.SHUT_RDWR)
        self.close()

    def close(self) -> None:
        """What has been detached belongs to somebody else."""
        for channel in (self.control, self.urgent, self.bulk):
            channel.close()


def linked(target: str, side: Party, trust: Trust, session: Session, *, resume: bool = False) -> Link:
    """The session's connections to whoever listens at `target`; `resume`: to go on, not to begin.

    Raises what pages.dial.dial does; Declined when the session is not known there.
    """
    with ExitStack() as stack:
        control, urgent, bulk = (
            stack.enter_context(dial(target, session.hello(role, resume=resume), side, trust=trust))
            for role in ROLES
        )
        stack.pop_all()
        return Link(session, control, urgent, bulk)


@contextmanager
def dialled(target: str, side: Party, trust: Trust) -> Iterator[Link]:
    """A new session with whoever listens at `target`, closed at the end."""
    with closing(linked(target, side, trust, Session.new())) as link:
        yield link


class Chain:
    """The links of one session, each opened when the one before it was lost.

    `retry_for`: for how many seconds a lost link is tried again, None without end.
    """

    def __init__(
        self,
        session: str,
        first: Link | None,
        dial_again: Callable[[], Link],
        retry_for: float | None,
        listener: Listener,
    ) -> None:
        self.session = session
        self.reconnects = 0
        self._link = first
        self._opened = 0.0
        self._rest = FIRST_PAUSE_S  # after a link that was of no use
        self._dial_again = dial_again
        self._retry_for = retry_for
        self._listener = listener

    @property
    def current(self) -> Link:
        """Raises ConnectionLost before the first one."""
        if self._link is None:
            raise ConnectionLost("the connection went with the process that had it")
        return self._link

    def close(self) -> None:
        if self._link is not None:
            self._link.close()

    def relink(self, lost: LazyprocError) -> Link:
        """The next link, in place of one that is `lost`. Raises `lost` when time is up, Declined when the session is
        not known there.
        """
        if self._link is not None:
            self._link.close()
            self._listener(Note(f"the connection was lost and is opened again: {lost}"))
        self._listener(StateChanged("reconnecting", time.monotonic()))
        if time.monotonic() - self._opened < LAST_PAUSE_S:  # who answers, and only rubbish
            time.sleep(self._rest)
            self._rest = min(2 * self._rest, LAST_PAUSE_S)
        else:
            self._rest = FIRST_PAUSE_S
        until = None if self._retry_for is None else time.monotonic() + self._retry_for
        pause, told = FIRST_PAUSE_S, ""
        while True:
            try:
                self._link = self._dial_again()
                self._opened = time.monotonic()
                self.reconnects += 1
                return self._link
            except LazyprocError as error:  # also who is not trusted, or files for TLS that are being renewed
                if isinstance(error, Declined):
                    raise
                if str(error) != told:
                    told = str(error)
                    self._listener(Note(f"not yet: {told}"))
                if until is not None and time.monotonic() + pause > until:
                    raise lost from None
            time.sleep(pause)
            pause = min(2 * pause, LAST_PAUSE_S)


class Redial:
    """The destination calls again, for whoever has other things to do meanwhile."""

    greeted = False  # who is called still has to learn that the tree runs here

    def __init__(self, target: str, trust: Trust, session: Session, listener: Listener) -> None:
        self._target = target
        self._trust = trust
        self._session = session
        self._listener = listener
        self._pause, self._next, self._told = FIRST_PAUSE_S, 0.0, ""

    def link(self) -> Link | None:
        """A new link, or None: not yet. Raises Declined when the session is not known there."""
        if time.monotonic() < self._next:
            return None
        try:
            link = self._dial()
        except LazyprocError as error:
            self._next = time.monotonic() + self._pause
            self._pause = min(2 * self._pause, LAST_PAUSE_S)
            if isinstance(error, Declined):
                raise
            if str(error) != self._told:
                self._told = str(error)
                self._listener(Note(f"session {self._session.id}: {error}; it is tried again"))
            return None
        self._pause, self._told = FIRST_PAUSE_S, ""
        return link

    def _dial(self) -> Link:
        return linked(self._target, Party.DESTINATION, self._trust, self._session, resume=True)


class Gathering:
    """Sessions whose connections come one by one, the control connection first."""

    def __init__(self, known: Session | None = None) -> None:
        """`known`: a session that was handed over and may be gone on with; no other is then taken in."""
        self._known = known
        self._open: dict[str, tuple[Session, dict[Role, Channel]]] = {}

    def add(self, channel: Channel) -> Link | None:
        """Welcome a connection, or refuse it; the Link when it was a session's last."""
        hello = channel.hello
        assert hello is not None, "the listener has read the HELLO"
        if hello.role is Role.CONTROL and self._may_open(hello):
            self._make_room()
            self._forget(hello.session)  # who begins anew has lost what came before
            self._open[hello.session] = Session(hello.session, hello.token), {}
        session, channels = self._open.get(hello.session, (None, {}))
        if session is None or not session.owns(hello) or hello.role in channels:
            channel.refuse(NOT_KNOWN)
            return None
        channel.welcome()
        channels[hello.role] = channel
        if len(channels) < len(ROLES):
            return None
        del self._open[hello.session]
        return Link(session, channels[Role.CONTROL], channels[Role.URGENT], channels[Role.BULK])

    def _may_open(self, hello: Hello) -> bool:
        if self._known is None:
            return not hello.resume and hello.session not in self._open
        return hello.resume and self._known.owns(hello)

    def next(self, door: Door, timeout: float) -> Link | None:
        """The next whole link, None when none is whole after `timeout` seconds of quiet."""
        while (channel := door.accept(timeout)) is not None:
            try:
                link = self.add(channel)
            except (ConnectionLost, ProtocolError) as error:  # gone before it was answered
                door.ended(channel, error)
                continue
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
        for channel in self._open.pop(session, (None, {}))[1].values():
            channel.close()
