"""The destination after the hand-over, over one link after another. The source is the test; of the tree there is one
process, whose memory is missing."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from lazyproc.errors import ConnectionLost
from lazyproc.migrate import talk
from lazyproc.migrate.drain import Drain
from lazyproc.migrate.link import Link
from lazyproc.model import PAGE
from lazyproc.pages.server import PageServer
from lazyproc.restore.lazytree import LazyTree
from lazyproc.runs import Segment
from lazyproc.uffd.policy import named
from lazyproc.wire.native import Ack, Map, MapEntry
from tests.live.ends import Ends, linked
from tests.live.lazy_rig import TASK, Rig, rig
from tests.live.programs import wait_until


@dataclass(frozen=True)
class Draining:
    rig: Rig
    server: PageServer
    drain: Drain

    def attach(self, ends: Ends) -> None:
        """The source says over this link where there are pages, and serves them."""
        self.server.new_link()
        self.server.serve(ends.source.urgent.detach(), "urgent")
        self.server.serve(ends.source.bulk.detach(), "bulk")
        self.drain.attach(ends.destination)
        ends.source.control.send(Map([MapEntry(TASK.key, self.rig.addr, self.rig.pages)]))

    def step_until_acknowledged(self, ends: Ends) -> list[MapEntry]:
        while True:
            self.drain.step(0.01)
            if isinstance(event := ends.source.control.receive(0), Ack):
                return list(event.entries)


@contextmanager
def draining() -> Iterator[Draining]:
    with rig() as r, tempfile.TemporaryFile() as file:
        file.write(r.data)
        file.flush()
        tree = LazyTree(r.child.process.pid, 1, r.child.process.pid, (), (), (), 0)
        with PageServer(
            [Segment(TASK.key, r.addr, r.at(r.pages), file.fileno(), 0)], releasing=True
        ) as server:
            r.pager.start(bulk=False)
            yield Draining(r, server, Drain(r.pager, tree, named("sequential"), lambda _: None))


def has_ended(link: Link) -> bool:
    try:
        while link.control.receive(1) is not None:
            pass
    except ConnectionLost:
        return True
    return False


def test_over_a_new_link_the_source_is_told_again_what_has_come() -> None:
    """What was said over the last one may not have been heard."""
    with draining() as it, linked() as first, linked() as second:
        it.drain.acknowledge()
        it.attach(first)
        page = it.rig.child.begin("digest", addr=it.rig.at(3), length=PAGE)
        wanted = [MapEntry(TASK.key, it.rig.at(3), 1)]
        assert it.step_until_acknowledged(first) == wanted
        assert page.result() == it.rig.expect(3, 1)
        it.attach(second)
        assert it.step_until_acknowledged(second) == wanted


def test_a_link_in_whose_place_another_one_comes_is_hung_up() -> None:
    """Although somebody has a duplicate: the source is to notice."""
    with draining() as it, linked() as first, linked() as second:
        with first.destination.control.socket.dup():
            it.attach(first)
            it.attach(second)
            assert has_ended(first.source)
        assert it.drain.linked


def test_a_source_that_says_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(talk, "DEAD_S", 0.2)

    with draining() as it, linked() as ends:
        it.attach(ends)

        def is_lost() -> bool:
            it.drain.step(0.01)
            return not it.drain.linked

        wait_until(is_lost, "it is lost")
        assert "nothing heard" in it.drain.reason
