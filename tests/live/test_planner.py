"""What was waited for is told, what is named comes first, and nobody waits for whoever decides that."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from lazyproc.model import PAGE, MemoryObject, ObjectKind
from lazyproc.uffd.pager import Pager, PagerState
from lazyproc.uffd.planner import follow
from lazyproc.uffd.policy import Chunk, Page, sequential
from tests.live.lazy_rig import DEADLINE, TASK, Rig, rig, whole

PAGES = 512
NOBODY = MemoryObject(ObjectKind.TASK, 9999)


def touch(r: Rig, page: int) -> None:
    assert r.child.call("digest", addr=r.at(page), length=PAGE) == r.expect(page, 1)


@contextmanager
def held_in_bulk(r: Rig) -> Iterator[list[int]]:
    """Bulk has asked for what it may, from page 0 on, and gets it when the block ends; what it asks for then."""
    held = r.server.hold("bulk", r.at(0))
    r.start(bulk=True)
    r.server.wait_for("bulk", r.at(0))
    later: list[int] = []
    yield later
    held.set()
    r.finish_in_bulk()
    assert bulk_requests(r)[:4] == [0, 4, 8, 12]
    later += bulk_requests(r)[4:]


def bulk_requests(r: Rig) -> list[int]:
    return [(asked.addr - r.addr) // PAGE for asked in r.server.log if asked.channel == "bulk"]


def test_what_is_waited_for_is_told_in_its_order() -> None:
    with rig() as r:
        r.start()
        assert r.pager.faulted(0) == []
        for page in (3, 1, 7):
            touch(r, page)
        assert r.pager.faulted(DEADLINE) == [Page(TASK, r.at(page)) for page in (3, 1, 7)]
        assert r.pager.faulted(0) == []


def test_whoever_asks_for_faults_is_told_of_the_end() -> None:
    with rig(1) as r:
        r.start()
        answers: list[Sequence[Page] | None] = []
        asking = threading.Thread(target=lambda: answers.append(r.pager.faulted(DEADLINE)))
        asking.start()
        r.pager.stop()
        asking.join(DEADLINE)
        assert answers == [None]
        assert r.pager.faulted(DEADLINE) is None


def test_a_pager_that_is_done_has_no_more_faults() -> None:
    with rig(1) as r:
        r.start()
        touch(r, 0)
        assert r.pager.wait(DEADLINE)
        assert r.pager.faulted(DEADLINE) is None


def test_of_many_faults_the_latest_are_told() -> None:
    pages, kept = 1100, 1024
    with rig(pages + 1) as r:
        r.start()
        for page in range(pages):  # one by one: memcpy(3) goes through a range as it likes
            assert r.child.call("digest", addr=r.at(page), length=PAGE) == r.expect(page, 1)
        assert r.pager.faulted(0) == [Page(TASK, r.at(page)) for page in range(pages - kept, pages)]


def test_what_is_named_comes_before_the_plan() -> None:
    with rig(PAGES) as r:
        r.pager.plan(sequential({TASK: whole(r.addr, PAGES)}))
        with held_in_bulk(r) as asked:
            r.pager.bring_ahead([Chunk(TASK, r.at(50), 1)])  # replaced
            beyond = r.addr + 2 * PAGES * PAGE
            r.pager.bring_ahead(
                [
                    Chunk(NOBODY, 0, 1),
                    Chunk(TASK, beyond, 8),
                    Chunk(TASK, r.at(0), 2),
                    Chunk(TASK, r.at(300), 6),
                ]
            )
        assert asked[:2] == [300, 304]
        assert asked[2] < 50
        assert len(set(asked)) == len(asked)


def test_before_the_map_only_the_plan_comes() -> None:
    with rig(PAGES) as r:
        r.pager.plan([Chunk(TASK, r.at(100), 40)])
        r.pager.bring_ahead([Chunk(TASK, r.at(300), 8)])
        r.start(bulk=True, known=False)
        assert r.pager.wait_plan(DEADLINE)
        assert sorted(bulk_requests(r)) == [*range(100, 140, 4)]
        r.pager.apply_map({TASK: whole(r.addr, PAGES)})
        r.finish_in_bulk()


def test_a_plan_that_does_not_come_is_not_waited_for_without_end() -> None:
    with rig(PAGES) as r:
        held = r.server.hold("bulk", r.at(139))
        r.pager.plan([Chunk(TASK, r.at(100), 40)])
        r.start(bulk=True, known=False)
        assert not r.pager.wait_plan(0.05)
        assert r.pager.state is PagerState.RUNNING
        held.set()
        assert r.pager.wait_plan(DEADLINE)
        r.pager.stop()
        assert not r.pager.wait_plan(DEADLINE)


class Third:
    """Names the page that is 200 behind each fault."""

    def __init__(self, faults: Sequence[Page] = ()) -> None:
        self.faults = tuple(faults)

    def after(self, faults: Sequence[Page]) -> Third:
        return Third([*self.faults, *faults])

    def ahead(self) -> Iterator[Chunk]:
        for obj, addr in self.faults:
            yield Chunk(obj, addr + 200 * PAGE, 1)


def test_a_reaction_sees_faults_and_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    named, told = [], threading.Semaphore(0)
    really = Pager.bring_ahead

    def watched(self: Pager, chunks: Iterator[Chunk]) -> None:
        named.append(list(chunks))
        really(self, named[-1])
        told.release()

    monkeypatch.setattr(Pager, "bring_ahead", watched)
    with rig(PAGES) as r:
        with held_in_bulk(r) as asked:
            follow(r.pager, Third())
            touch(r, 150)
            assert told.acquire(timeout=DEADLINE)
            touch(r, 120)
            assert told.acquire(timeout=DEADLINE)
        assert named == [
            [Chunk(TASK, r.at(350), 1)],
            [Chunk(TASK, r.at(350), 1), Chunk(TASK, r.at(320), 1)],
        ]
        assert asked[:2] == [350, 320]
    for thread in threading.enumerate():
        if thread.name == "planner":
            thread.join(DEADLINE)
            assert not thread.is_alive()
