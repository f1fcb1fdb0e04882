"""Memory that is lost for good: touching a page of it is SIGBUS, whoever does and however often, and never a zero."""

from __future__ import annotations

import os
import signal
from concurrent.futures import Future
from typing import Any

import pytest

from lazyproc.model import PAGE
from lazyproc.runs import Segment
from lazyproc.uffd.pager import Pager, PagerState
from tests.live.lazy_rig import (
    DEADLINE,
    SHARED,
    TASK,
    Child,
    Rig,
    balanced,
    child,
    digest,
    pager,
    rig,
    whole,
)
from tests.live.programs import wait_until

MADV_DONTNEED = 4
MAYMOVE, FIXED = 1, 2
ZEROS = digest(bytes(PAGE))


def is_lost(process: Child, addr: int) -> bool:
    """The kernel itself, asked by the process to touch the page, gets EFAULT where the process gets SIGBUS."""
    error = process.begin("read_into", addr=addr, text="x").exception(DEADLINE)
    return error is not None and "Bad address" in str(error)


def dies_of_sigbus(process: Child, touching: Future[Any] | None, addr: int) -> None:
    if touching is None:
        process.begin("digest", addr=addr, length=PAGE)
    assert process.process.wait(DEADLINE) == -signal.SIGBUS


def give_up(r: Rig, *, known: bool = True) -> None:
    if known:
        r.pager.apply_map({TASK: whole(r.addr, r.pages)})
    r.pager.alone(poison=True)
    r.pager.start()
    assert r.pager.wait(DEADLINE)
    assert balanced(r.pager)


@pytest.mark.parametrize("known", [True, False], ids=["by the map", "without a map"])
def test_every_missing_page_is_lost_and_stays_so_when_the_pager_has_gone(known: bool) -> None:
    with rig() as r:
        give_up(r, known=known)
        counters = r.pager.counters()
        assert (counters.total, counters.poisoned, counters.remaining) == (r.pages, r.pages, 0)
        assert not r.pager.shares_poison
        r.pager.finish()
        assert all(is_lost(r.child, r.at(page)) for page in range(r.pages))
        dies_of_sigbus(r.child, None, r.at(3))


def test_a_thread_that_waits_is_let_go_by_sigbus() -> None:
    with rig() as r:
        touching = r.child.begin("digest", addr=r.at(5), length=PAGE)
        give_up(r)
        dies_of_sigbus(r.child, touching, r.at(5))


def test_what_had_come_what_is_zero_and_what_a_file_holds_is_right() -> None:
    with rig(8) as r:
        file = os.memfd_create("segment")
        os.write(file, r.data[2 * PAGE : 4 * PAGE])
        r.pager.mark_installed(TASK, r.at(0), 1)
        r.pager.serve_segments([Segment(TASK.key, r.at(2), r.at(4), file, 0)])
        r.pager.apply_map({TASK: whole(r.at(2), 4)})  # 2, 3 in the file, 4, 5 lost, the others zero
        r.pager.alone(poison=True)
        r.pager.start()
        assert r.pager.wait(DEADLINE)
        os.close(file)
        assert r.pager.counters().poisoned == 2
        assert r.child.call("digest", addr=r.at(2), length=2 * PAGE) == r.expect(2, 2)
        assert r.child.call("digest", addr=r.at(6), length=2 * PAGE) == digest(bytes(2 * PAGE))
        assert [is_lost(r.child, r.at(page)) for page in range(2, 8)] == [
            False,
            False,
            True,
            True,
            False,
            False,
        ]


def test_what_the_process_discards_is_zero_as_ever_and_what_it_moves_stays_lost() -> None:
    with rig() as r:
        give_up(r)
        r.child.call("madvise", addr=r.at(2), length=PAGE, advice=MADV_DONTNEED)
        assert r.child.call("digest", addr=r.at(2), length=PAGE) == ZEROS
        to = r.child.call("mmap", length=4 * PAGE)
        r.child.call("mremap", addr=r.at(4), old=4 * PAGE, new=4 * PAGE, flags=MAYMOVE | FIXED, to=to)
        assert is_lost(r.child, to)
        r.pager.finish()
        assert is_lost(r.child, to + PAGE)


@pytest.mark.parametrize("when", ["before", "after", "after the end"])
def test_a_forked_child_has_no_zeros_either(when: str) -> None:
    with rig() as r:
        if when == "before":
            forked = r.child.begin("fork_digest", addr=r.at(1), length=PAGE)
            give_up(r)
            assert forked.result(DEADLINE) == ""  # it died before it could say anything
            return
        give_up(r)
        if when == "after the end":
            r.pager.finish()
        assert r.child.call("fork_digest", addr=r.at(1), length=PAGE) == ""


def shared_between(first: Child, made: Pager, pages: int) -> int:
    addr = int(first.call("mmap", length=pages * PAGE, shared=True))
    space = made.add_space(first.register((addr, pages * PAGE)))
    made.add_region(space, addr, pages * PAGE, SHARED, 0)
    return addr


def test_shared_memory_is_lost_at_each_mapping_and_at_those_that_are_made_later() -> None:
    with child() as process, pager() as made:
        addr = shared_between(process, made, 8)
        made.apply_map({SHARED: whole(0, 8)})
        made.alone(poison=True)
        made.start()
        assert made.wait(DEADLINE)
        assert made.shares_poison
        assert made.counters().poisoned == 8
        assert is_lost(process, addr)
        process.call(
            "madvise", addr=addr, length=PAGE, advice=MADV_DONTNEED
        )  # the mark goes, the loss does not
        assert is_lost(process, addr)
        doubled = process.call("mremap", addr=addr, old=0, new=8 * PAGE, flags=MAYMOVE)  # a second mapping
        assert is_lost(process, doubled + 3 * PAGE)
        assert process.call("fork_digest", addr=addr + 5 * PAGE, length=PAGE) == ""
        dies_of_sigbus(process, None, addr + 7 * PAGE)
        wait_until(lambda: not made.spaces(), "the pager sees that nobody is left")


def test_without_poison_what_no_file_holds_waits_and_the_rest_comes() -> None:
    """The first page that is lacking stops neither the bulk transfer nor other faults."""
    with rig(8) as r:
        file = os.memfd_create("segment")
        os.write(file, r.data[4 * PAGE :])
        r.pager.serve_segments([Segment(TASK.key, r.at(4), r.at(8), file, 0)])
        r.pager.apply_map({TASK: whole(r.at(0), 8)})
        r.pager.alone()
        reading = r.child.begin("digest", addr=r.at(1), length=PAGE)
        r.pager.start()
        wait_until(lambda: r.pager.counters().remaining == 4, "all that the file holds")
        os.close(file)
        assert r.pager.state is PagerState.LOST
        assert "no segment holds" in r.pager.reason
        assert r.child.call("digest", addr=r.at(4), length=4 * PAGE) == r.expect(4, 4)
        assert not reading.done()
        r.pager.serve_remote(*r.server.connect())  # it comes back after all
        assert reading.result(DEADLINE) == r.expect(1, 1)
        assert r.pager.wait(DEADLINE)
        assert balanced(r.pager)
        assert r.child.call("digest", addr=r.addr, length=r.length) == digest(r.data)
