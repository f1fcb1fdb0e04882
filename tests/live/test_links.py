"""The links of a session: who is let in to one, and how the next one is sought when it is lost."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager

import pytest

from lazyproc import events
from lazyproc.errors import ConnectionLost
from lazyproc.migrate.link import MAX_INCOMPLETE, NOT_KNOWN, ROLES, Chain, Gathering, Link, Redial
from lazyproc.pages.channel import Channel
from lazyproc.pages.dial import Declined
from lazyproc.pages.door import listen
from lazyproc.pages.peer import Trust
from lazyproc.pages.session import Session
from lazyproc.wire.native import Abort, Hello, Party, Role, Welcome
from tests.live.programs import wait_until

US = Trust()
LOST = ConnectionLost("of the test")


class Callers:
    """Who dials a Gathering, and what becomes of it."""

    def __init__(self, gathering: Gathering) -> None:
        self._gathering = gathering
        self._stack = ExitStack()

    def call(self, hello: Hello) -> tuple[Channel, Link | None]:
        """Our end, and the link if it is whole now."""
        ends = socket.socketpair()
        ours = self._stack.enter_context(Channel(ends[0], Party.SOURCE, dialled="there"))
        theirs = self._stack.enter_context(Channel(ends[1], Party.DESTINATION))
        ours.send(hello)
        assert theirs.receive(10) == hello
        return ours, self._gathering.add(theirs)

    def close(self) -> None:
        self._stack.close()


@pytest.fixture
def anybody() -> Iterator[Callers]:
    with closing(Gathering()) as gathering, closing(Callers(gathering)) as callers:
        yield callers


KNOWN = Session.new()


@pytest.fixture
def known() -> Iterator[Callers]:
    with closing(Gathering(KNOWN)) as gathering, closing(Callers(gathering)) as callers:
        yield callers


def is_welcome(channel: Channel) -> bool:
    answer = channel.receive(10)
    assert isinstance(answer, Welcome | Abort)
    return isinstance(answer, Welcome)


def is_closed(channel: Channel) -> bool:
    """After what it was told."""
    try:
        while channel.receive(10) is not None:
            pass
    except ConnectionLost:
        return True
    return False


# --- who is let in ------------------------------------------------------------------------------------------------


def test_three_connections_are_a_link(anybody: Callers) -> None:
    session = Session.new()
    whole = [anybody.call(session.hello(role))[1] for role in ROLES]
    assert whole[:2] == [None, None]
    assert whole[2] is not None
    assert [channel.hello for channel in (whole[2].control, whole[2].urgent, whole[2].bulk)] == [
        session.hello(role) for role in ROLES
    ]


@pytest.mark.parametrize(
    "what", ["a second time", "another secret", "before it was begun", "to go on", "begun once more"]
)
def test_who_does_not_belong_to_a_session_is_refused(anybody: Callers, what: str) -> None:
    session = Session.new()
    if what not in {"before it was begun", "to go on"}:
        assert is_welcome(anybody.call(session.hello(Role.CONTROL))[0])
        assert is_welcome(anybody.call(session.hello(Role.URGENT))[0])
    hello = {
        "a second time": session.hello(Role.URGENT),
        "another secret": Session(session.id, "70").hello(Role.BULK),
        "before it was begun": session.hello(Role.BULK),
        "to go on": session.hello(Role.CONTROL, resume=True),
        "begun once more": session.hello(Role.CONTROL),
    }[what]
    channel, link = anybody.call(hello)
    assert link is None
    assert not is_welcome(channel)
    if what not in {"before it was begun", "to go on"}:  # which has harmed nobody
        assert anybody.call(session.hello(Role.BULK))[1] is not None


@pytest.mark.parametrize(
    "hello",
    [KNOWN.hello(Role.CONTROL), Session.new().hello(Role.CONTROL, resume=True)],
    ids=["anew", "other"],
)
def test_where_a_session_goes_on_no_other_is_begun(known: Callers, hello: Hello) -> None:
    assert not is_welcome(known.call(hello)[0])


def test_who_goes_on_once_more_has_lost_what_came_before(known: Callers) -> None:
    first = known.call(KNOWN.hello(Role.CONTROL, resume=True))[0]
    for role in ROLES:
        channel, link = known.call(KNOWN.hello(role, resume=True))
        assert is_welcome(channel)
    assert link is not None
    assert is_closed(first)


def test_the_oldest_session_that_was_never_completed_has_to_go(anybody: Callers) -> None:
    sessions = [Session.new() for _ in range(MAX_INCOMPLETE + 1)]
    ends = [anybody.call(session.hello(Role.CONTROL))[0] for session in sessions]
    assert is_closed(ends[0])
    assert not is_welcome(anybody.call(sessions[0].hello(Role.URGENT))[0])
    assert is_welcome(anybody.call(sessions[1].hello(Role.URGENT))[0])


# --- the next link ------------------------------------------------------------------------------------------------


def made() -> Link:
    """Of nobody."""
    channels = [Channel(socket.socketpair()[0], Party.SOURCE) for _ in ROLES]
    return Link(Session.new(), *channels)


def test_a_link_that_is_hung_up_ends_for_whoever_has_duplicates() -> None:
    link = made()
    ours, theirs = socket.socketpair()
    with (
        ours,
        theirs,
        ours.dup(),
        closing(Link(link.session, Channel(ours, Party.SOURCE), link.urgent, link.bulk)) as it,
    ):
        it.hang_up()
        theirs.settimeout(10)
        assert theirs.recv(1) == b""


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    return slept


def chain(answer: Callable[[], Link], first: Link | None = None, retry_for: float | None = None) -> Chain:
    return Chain("5e", first, answer, retry_for, lambda _: None)


def test_links_that_are_lost_at_once_are_opened_at_a_growing_pace(pauses: list[float]) -> None:
    first = made()
    with closing(chain(made, first)) as it:
        for number in range(1, 5):
            before = it.current
            assert it.relink(LOST) is it.current
            assert before.control.socket.fileno() == -1  # it is closed
            assert it.reconnects == number
    assert pauses == [0.05, 0.1, 0.2]


def test_who_cannot_be_reached_in_time_is_lost(pauses: list[float]) -> None:
    def refuse() -> Link:
        raise ConnectionLost("nobody is there")

    with pytest.raises(ConnectionLost, match="of the test"):
        chain(refuse, retry_for=0).relink(LOST)
    assert not pauses


def test_who_does_not_know_the_session_is_not_asked_again(pauses: list[float]) -> None:
    def decline() -> Link:
        raise Declined(NOT_KNOWN)

    with pytest.raises(Declined):
        chain(decline).relink(LOST)
    assert not pauses


# --- and of the destination ---------------------------------------------------------------------------------------


@contextmanager
def serving(session: Session, port: int) -> Iterator[None]:
    """Somebody listens there, until the session is whole."""
    with (
        listen(f"127.0.0.1:{port}", Party.SOURCE, trust=US, report=lambda _: None) as door,
        closing(Gathering(session)) as gathering,
        ThreadPoolExecutor(1) as pool,
    ):
        letting_in = pool.submit(gathering.next, door, 10)
        yield
        link = letting_in.result()
        assert link is not None
        link.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        return int(silent.getsockname()[1])


def is_linked(redial: Redial) -> bool:
    link = redial.link()
    if link is not None:
        link.close()
    return link is not None


def test_who_calls_again_does_so_at_its_pace() -> None:
    """And says once why nobody answers; once more when somebody has answered meanwhile."""
    notes: list[events.Event] = []
    port, session = free_port(), Session.new()
    redial = Redial(f"127.0.0.1:{port}", US, session, notes.append)
    assert redial.link() is None
    with socket.create_server(("127.0.0.1", port)) as there:
        there.setblocking(False)
        assert redial.link() is None
        with pytest.raises(BlockingIOError):  # nobody has called
            there.accept()
    assert len(notes) == 1
    with serving(session, port):
        wait_until(lambda: is_linked(redial), "somebody answers")
    assert redial.link() is None
    assert len(notes) == 2


def test_who_is_not_known_any_more_does_not_call_again() -> None:
    with (
        listen("127.0.0.1:0", Party.SOURCE, trust=US, report=lambda _: None) as door,
        ThreadPoolExecutor(1) as pool,
    ):
        redial = Redial(f"127.0.0.1:{door.port}", US, Session.new(), lambda _: None)
        calling = pool.submit(redial.link)
        channel = door.accept(10)
        assert channel is not None
        channel.refuse(NOT_KNOWN)
        with pytest.raises(Declined):
            calling.result()
