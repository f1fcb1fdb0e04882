"""The source after COMMIT, when its link is lost and its pages are. The other side is the test."""

from __future__ import annotations

import socket
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from lazyproc.errors import ConnectionLost, LostAfterCommit, NoSuchProcess, Parked
from lazyproc.migrate import talk
from lazyproc.migrate.link import NOT_KNOWN, Chain, Link
from lazyproc.migrate.releasing import Releaser
from lazyproc.migrate.serving import Serving
from lazyproc.model import PAGE, MemoryObject, ObjectKind
from lazyproc.pages.channel import Channel
from lazyproc.pages.dial import Declined
from lazyproc.pages.server import PageServer
from lazyproc.runs import Segment
from lazyproc.wire.native import Abort, Ack, Committed, MapEntry, Running
from tests.live.ends import called_off, linked
from tests.live.programs import wait_until

TASK = MemoryObject(ObjectKind.TASK, 42)
HEADER = struct.Struct("<BBHIQQII")
GET, PAGES, LAST = 1, 2, 2
CONTENT = bytes(range(256)) * (PAGE // 256)


@contextmanager
def served() -> Iterator[PageServer]:
    """One page, which may be released."""
    with tempfile.TemporaryFile() as file:
        file.write(CONTENT)
        file.flush()
        with PageServer([Segment(TASK.key, 0, PAGE, file.fileno(), 0)], releasing=True) as server:
            yield server


def serving(server: PageServer, first: Link, dial_again: Callable[[], Link]) -> Serving:
    chain = Chain("5e", first, dial_again, 0, lambda _: None)
    return Serving(chain, server, dict, 1, lambda _: None)


def nobody() -> Link:
    raise ConnectionLost("nobody is there")


def request(channel: Channel) -> None:
    channel.socket.sendall(HEADER.pack(GET, 0, 0, 1, TASK.key, 0, 0, 0))


def answer(channel: Channel) -> tuple[int, int]:
    """Its kind and flags; pages follow it."""
    kind, flags = HEADER.unpack(channel.socket.recv(HEADER.size, socket.MSG_WAITALL))[:2]
    return kind, flags


# --- links that are lost --------------------------------------------------------------------------------------------


def test_a_link_that_is_lost_before_it_says_anything_is_not_the_last() -> None:
    with served() as server, linked() as first, linked() as second, linked() as third:
        links = iter((second.source, third.source))
        first.destination.hang_up()
        second.destination.hang_up()
        third.say(Committed(), Running({"root_pid": 7}))
        assert serving(server, first.source, lambda: next(links)).until_running() == {"root_pid": 7}


def test_what_was_heard_last_is_why_it_is_parked() -> None:
    with served() as server, linked() as first, linked() as second:
        links: Iterator[Callable[[], Link]] = iter((lambda: second.source, nobody))
        first.destination.hang_up()
        second.say(Abort({"reason": "this was the last word"}))
        with pytest.raises(Parked, match="this was the last word"):
            serving(server, first.source, lambda: next(links)()).until_running()


def test_who_does_not_know_the_session_any_more_is_not_asked_for_ever() -> None:
    asked: list[None] = []

    def decline() -> Link:
        asked.append(None)
        assert len(asked) == 1
        raise Declined(NOT_KNOWN)

    with served() as server, linked() as first:
        first.destination.hang_up()
        with pytest.raises(Parked, match=NOT_KNOWN):
            serving(server, first.source, decline).until_running()


def test_a_destination_that_says_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a cable is cut."""
    monkeypatch.setattr(talk, "DEAD_S", 0.2)
    with served() as server, linked() as ends:
        source = serving(server, ends.source, nobody)
        source.answer(ends.source)
        with pytest.raises(Parked, match="nothing heard"):
            source.until_drained(None)


def test_what_was_on_its_way_over_a_lost_link_is_sent_again() -> None:
    with served() as server, linked() as first, linked() as second:
        source = serving(server, first.source, nobody)
        source.answer(first.source)
        request(first.destination.urgent)
        assert answer(first.destination.urgent) == (PAGES, LAST)
        source.answer(second.source)
        request(second.destination.bulk)
        assert answer(second.destination.bulk) == (PAGES, LAST)


# --- pages that are lost --------------------------------------------------------------------------------------------


def test_a_page_that_was_freed_is_said_to_be_lost_over_the_next_link() -> None:
    """The last one went before anybody could be told."""
    with served() as server, linked() as first, linked() as second:
        source = serving(server, first.source, lambda: second.source)
        source.answer(first.source)
        assert server.release(TASK, 0, 1) == 1
        request(first.destination.urgent)
        wait_until(lambda: server.freed_and_asked_for() == 0, "it is asked for")
        first.destination.hang_up()
        second.say(Committed(), Running({}))
        with pytest.raises(LostAfterCommit, match="asks again for the page at 0x0"):
            source.until_drained(None)
        assert "asks again" in called_off(second.destination)


class Gone(Releaser):
    """Of a process that was killed just then."""

    def __init__(self) -> None: ...

    def release(self, entries: Any) -> None:
        raise NoSuchProcess("it is gone", where="pid 1", remedy="none")


def test_a_process_that_is_gone_when_its_memory_is_to_be_freed() -> None:
    with served() as server, linked() as ends:
        ends.say(Ack([MapEntry(TASK.key, 0, 1)]))
        with pytest.raises(LostAfterCommit, match="the parked process has ended"):
            serving(server, ends.source, nobody).until_drained(Gone())
        assert "has ended" in called_off(ends.destination)
