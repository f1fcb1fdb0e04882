"""Answers that find the process or the pager in another state than when they were asked for: each is withheld until it
is so."""

from __future__ import annotations

import ctypes
import fcntl
import socket
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from lazyproc.errors import NoSuchProcess
from lazyproc.kernel import proc
from lazyproc.model import PAGE
from lazyproc.runs import Segment
from lazyproc.uffd.device import Outcome
from lazyproc.uffd.policy import sequential
from tests.faults.test_lazy_hazards import limit, memory_group
from tests.live.arrivals import waits_for_page
from tests.live.lazy_rig import (
    ABSENT,
    DEADLINE,
    HEADER,
    LAST,
    PAGES,
    TASK,
    Rig,
    digest,
    held_read,
    pager,
    rig,
    whole,
)
from tests.live.programs import wait_until

MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2
MADV_POPULATE_READ = 22  # takes no memory of its own
ZEROS = digest(bytes(PAGE))
UFFDIO_COPY, DONTWAKE = 0xC028AA03, 1
COPY = struct.Struct("=QQQQq")  # of struct uffdio_copy: dst, src, len, mode, copy


def put_in_silence(r: Rig, page: int) -> None:
    """The page gets there by somebody else, who wakes nobody."""
    source = ctypes.create_string_buffer(r.data[page * PAGE : (page + 1) * PAGE], PAGE)
    request = COPY.pack(r.at(page), ctypes.addressof(source), PAGE, DONTWAKE, 0)
    fcntl.ioctl(r.pager.spaces()[0], UFFDIO_COPY, bytearray(request))


def waiting(r: Rig) -> int:
    """How many threads of the child wait for a page."""
    pid, count = r.child.process.pid, 0
    for tid in proc.task_ids(pid):
        with suppress(NoSuchProcess):  # it has done what it was told
            count += waits_for_page(pid, tid)
    return count


# --- what the map says meanwhile ----------------------------------------------------------------------------------


def test_a_page_that_was_asked_for_comes_although_the_map_does_not_name_it() -> None:
    """What the source has sent is right; that it is zero was not said of this page."""
    with rig() as r:
        r.start(known=False)
        held, reading = held_read(r, 3)
        r.pager.apply_map({TASK: whole(r.addr, 3)})
        held.set()
        assert reading.result(DEADLINE) == r.expect(3, 1)


def absent(key: int, addr: int, tag: int, last: bool) -> bytes:
    return HEADER.pack(PAGES, ABSENT | last * LAST, 0, 1, key, addr, tag, 0)


def test_who_waits_for_an_urgent_answer_is_let_go_when_bulk_says_that_there_is_none() -> None:
    with rig() as r:
        bulk, urgent = r.server.hold("bulk", r.at(3)), r.server.hold("urgent", r.at(3))
        r.server.frames = absent  # type: ignore[method-assign]
        r.pager.plan(sequential({TASK: whole(r.at(3), 1)}))
        r.start(bulk=True, known=False)
        r.server.wait_for("bulk", r.at(3))
        reading = r.child.begin("digest", addr=r.at(3), length=PAGE)
        r.server.wait_for("urgent", r.at(3))
        r.pager.apply_map({TASK: []})
        bulk.set()
        assert reading.result(DEADLINE) == ZEROS
        urgent.set()


def test_what_was_asked_for_and_is_not_in_the_map_is_zero_for_the_next_pager() -> None:
    """It has nobody to ask."""
    with rig() as r:
        r.start(known=False)
        held, reading = held_read(r, 3)
        r.pager.apply_map({TASK: []})
        r.pager.stop()
        with pager(ledger=r.pager.ledger) as heir:
            heir.start()
            assert reading.result(DEADLINE) == ZEROS
            assert heir.wait(DEADLINE)
        held.set()


# --- what cannot be placed as it came -----------------------------------------------------------------------------


def test_who_waits_for_a_page_that_is_there_is_woken() -> None:
    with rig() as r:
        r.start()
        held, reading = held_read(r, 3)
        put_in_silence(r, 3)
        held.set()
        assert reading.result(DEADLINE) == r.expect(3, 1)
        assert r.pager.counters().outcomes["urgent"][Outcome.PRESENT] == 1


@contextmanager
def local(r: Rig) -> Iterator[None]:
    """Its pages are in a file of this machine: placed many at a time, as soon as bulk begins."""
    with tempfile.TemporaryFile() as file:
        file.write(r.data)
        file.flush()
        r.pager.serve_segments([Segment(TASK.key, r.addr, r.at(r.pages), file.fileno(), 0)])
        r.pager.apply_map({TASK: whole(r.addr, r.pages)})
        r.pager.start(bulk=False)
        yield
        r.pager.start_bulk()
        r.finish_in_bulk()


def test_around_a_page_that_is_there_the_others_are_placed() -> None:
    with rig() as r:
        with local(r):
            put_in_silence(r, 5)
        outcomes = r.pager.counters().outcomes["bulk"]
        assert (outcomes[Outcome.INSTALLED], outcomes[Outcome.PRESENT]) == (r.pages - 1, 1)
        assert r.child.call("digest", addr=r.addr, length=r.length) == r.expect(0, r.pages)


def test_pages_of_which_the_last_lie_first_in_the_process() -> None:
    with rig(8) as r:
        half = r.length // 2
        room = r.child.call("mmap", length=half)
        moved, stays = (4, 0) if room < r.addr else (0, 4)
        with local(r):
            flags = MREMAP_MAYMOVE | MREMAP_FIXED
            r.child.call("mremap", addr=r.at(moved), old=half, new=half, flags=flags, to=room)
        assert r.child.call("digest", addr=r.at(stays), length=half) == r.expect(stays, 4)
        assert r.child.call("digest", addr=room, length=half) == r.expect(moved, 4)


def test_an_urgent_answer_for_which_there_is_no_memory_is_asked_for_again() -> None:
    with memory_group() as group, rig(2048) as r:
        (group / "memory.oom_control").write_text("1")  # the killer is off
        limit(group, r.child.process.pid, 512)
        r.start()
        touching = r.child.begin("madvise", addr=r.addr, length=r.length, advice=MADV_POPULATE_READ)
        asked = r.server.log
        wait_until(lambda: len({each.addr for each in asked}) < len(asked), "one is asked for again")
        (group / "memory.limit_in_bytes").write_text("-1")
        touching.result(DEADLINE)
        assert r.child.call("digest", addr=r.addr, length=r.length) == r.expect(0, r.pages)


# --- requests that do not leave -----------------------------------------------------------------------------------


def test_requests_for_which_the_socket_has_no_room_leave_later() -> None:
    with rig(64) as r:
        urgent, bulk = r.server.connect()
        with socket.socket(fileno=urgent) as small:
            small.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
            small.detach()
        held = [r.server.hold("urgent", r.at(page)) for page in range(r.pages)]
        r.pager.serve_remote(urgent, bulk)
        r.pager.apply_map({TASK: whole(r.addr, r.pages)})
        r.pager.start(bulk=False)
        reading = [r.child.begin("digest", addr=r.at(page), length=PAGE) for page in range(r.pages)]
        wait_until(lambda: waiting(r) == r.pages, "all of them wait")
        assert r.pager.counters().bytes_out < r.pages * HEADER.size
        for each in held:
            each.set()
        assert [future.result(DEADLINE) for future in reading] == [r.expect(n, 1) for n in range(r.pages)]
