"""What a process may do to memory that has not arrived yet. Each hazard is forced: the server withholds an answer, or
nothing has been asked for, until the process has done it."""

from __future__ import annotations

import os
import signal
import tempfile

import pytest

from lazyproc.kernel.ready import readable
from lazyproc.model import PAGE
from lazyproc.pages.server import crc32c
from lazyproc.runs import Segment
from lazyproc.uffd.device import Outcome
from lazyproc.uffd.pager import PagerState
from tests.live.lazy_rig import (
    ABSENT,
    DEADLINE,
    HEADER,
    LAST,
    PAGES,
    SHARED,
    TASK,
    UNDER_WAY,
    balanced,
    child,
    content,
    digest,
    pager,
    rig,
    server,
    whole,
)
from tests.live.programs import wait_until

MADV_DONTNEED = 4
MADV_REMOVE = 9
MREMAP_MAYMOVE, MREMAP_FIXED, MREMAP_DONTUNMAP = 1, 2, 4
PROT_NONE, PROT_READ = 0, 1
ZEROS = digest(bytes(PAGE))


def test_two_threads_want_the_same_page() -> None:
    with rig() as r:
        r.start()
        held = r.server.hold("urgent", r.at(3))
        reading = [r.child.begin("digest", addr=r.at(3), length=PAGE) for _ in range(2)]
        r.server.wait_for("urgent", r.at(3))
        r.child.call("digest", addr=r.at(2), length=0)  # both threads have been started
        held.set()
        assert {future.result(DEADLINE) for future in reading} == {r.expect(3, 1)}
        assert [asked.addr for asked in r.server.log].count(r.at(3)) == 1


def test_the_kernel_itself_faults() -> None:
    with rig() as r:
        r.start()
        assert r.child.call("read_into", addr=r.at(2) + 100, text="hello") == 5
        expected = bytearray(r.data[2 * PAGE : 3 * PAGE])
        expected[100:105] = b"hello"
        assert r.child.call("digest", addr=r.at(2), length=PAGE) == digest(bytes(expected))


def test_discarding_a_missing_page() -> None:
    with rig() as r:
        r.start()
        r.child.call("madvise", addr=r.at(4), length=2 * PAGE, advice=MADV_DONTNEED)
        assert r.child.call("digest", addr=r.at(4), length=PAGE) == ZEROS
        assert r.child.call("digest", addr=r.at(6), length=PAGE) == r.expect(6, 1)
        assert r.pager.counters().dropped == 2


def test_discarding_an_installed_page() -> None:
    with rig() as r:
        r.start()
        assert r.child.call("digest", addr=r.at(4), length=PAGE) == r.expect(4, 1)
        r.child.call("madvise", addr=r.at(4), length=PAGE, advice=MADV_DONTNEED)
        assert r.child.call("digest", addr=r.at(4), length=PAGE) == ZEROS
        assert (r.pager.counters().dropped, r.pager.counters().urgent) == (0, 1)


def test_discarding_a_page_that_is_on_its_way() -> None:
    with rig() as r:
        r.start()
        held = r.server.hold("urgent", r.at(4))
        reading = r.child.begin("digest", addr=r.at(4), length=PAGE)
        r.server.wait_for("urgent", r.at(4))
        r.child.call("madvise", addr=r.at(4), length=PAGE, advice=MADV_DONTNEED)
        assert reading.result(DEADLINE) == ZEROS  # without the answer
        held.set()
        assert r.child.call("digest", addr=r.at(5), length=PAGE) == r.expect(5, 1)
        assert r.child.call("digest", addr=r.at(4), length=PAGE) == ZEROS  # nor afterwards
        assert r.pager.counters().dropped == 1


def test_unmapping_missing_pages_under_a_waiting_thread() -> None:
    with rig() as r:
        r.start()
        held = r.server.hold("urgent", r.at(4))
        reading = r.child.begin(
            "read_into", addr=r.at(4), text="x"
        )  # the kernel reports EFAULT, not a signal
        r.server.wait_for("urgent", r.at(4))
        r.child.call("munmap", addr=r.at(4), length=3 * PAGE)
        with pytest.raises(RuntimeError, match="Bad address"):
            reading.result(DEADLINE)
        held.set()
        assert r.child.call("digest", addr=r.at(7), length=9 * PAGE) == r.expect(7, 9)
        assert r.child.call("digest", addr=r.at(0), length=4 * PAGE) == r.expect(0, 4)
        r.finish_in_bulk()
        assert r.pager.counters().dropped == 3


def test_moving_missing_pages() -> None:
    with rig() as r:
        r.start()
        there = r.child.call("mmap", length=8 * PAGE)
        r.child.call(
            "mremap", addr=r.at(4), old=4 * PAGE, new=4 * PAGE, flags=MREMAP_MAYMOVE | MREMAP_FIXED, to=there
        )
        assert r.child.call("digest", addr=there, length=4 * PAGE) == r.expect(4, 4)
        assert r.child.call("digest", addr=r.at(0), length=4 * PAGE) == r.expect(0, 4)
        assert r.child.call("digest", addr=r.at(8), length=8 * PAGE) == r.expect(8, 8)
        r.finish_in_bulk()


def test_moving_a_page_that_is_on_its_way() -> None:
    with rig() as r:
        r.start(bulk=True)
        r.finish_in_bulk()
    with rig() as r:
        held = r.server.hold("bulk", r.at(0))
        r.start(bulk=True)
        r.server.wait_for("bulk", r.at(0))
        there = r.child.call("mmap", length=r.length)
        r.child.call(
            "mremap", addr=r.addr, old=r.length, new=r.length, flags=MREMAP_MAYMOVE | MREMAP_FIXED, to=there
        )
        held.set()
        r.finish_in_bulk()
        assert r.pager.counters().bulk == r.pages
        assert r.child.call("digest", addr=there, length=r.length) == r.expect(0, r.pages)


def test_growing_and_leaving_behind() -> None:
    with rig() as r:
        r.start()
        grown = r.child.call("mremap", addr=r.addr, old=r.length, new=2 * r.length, flags=MREMAP_MAYMOVE)
        assert r.child.call("digest", addr=grown, length=2 * r.length) == digest(r.data + bytes(r.length))
        r.finish_in_bulk()
    with rig() as r:
        r.start()
        moved = r.child.call(
            "mremap", addr=r.addr, old=r.length, new=r.length, flags=MREMAP_MAYMOVE | MREMAP_DONTUNMAP
        )
        assert r.child.call("digest", addr=r.at(3), length=PAGE) == ZEROS
        assert r.child.call("digest", addr=moved, length=r.length) == r.expect(0, r.pages)


def test_shrinking() -> None:
    with rig() as r:
        r.start()
        assert r.child.call("mremap", addr=r.addr, old=r.length, new=4 * PAGE, flags=0) == r.addr
        assert r.child.call("digest", addr=r.addr, length=4 * PAGE) == r.expect(0, 4)
        r.finish_in_bulk()
        assert r.pager.counters().dropped == 12


def test_what_is_on_no_other_way_after_all_is_asked_for_again() -> None:
    """A source that frees pages says so of what it has sent over the other connection, where it may be lost."""
    with rig() as r:
        frames, lost = r.server.frames, {r.at(3), r.at(4)}

        def answer(key: int, addr: int, tag: int, last: bool) -> bytes:
            if addr not in lost:
                return frames(key, addr, tag, last)
            lost.remove(addr)
            return HEADER.pack(PAGES, UNDER_WAY | last * LAST, 0, 1, key, addr, tag, 0)

        r.server.frames = answer  # type: ignore[method-assign]
        r.start(bulk=True)
        r.finish_in_bulk()
        assert r.pager.counters().bulk == r.pages
        assert r.child.call("digest", addr=r.addr, length=r.length) == r.expect(0, r.pages)


@pytest.mark.parametrize("here", [False, True])
def test_mappings_split_by_mprotect(here: bool) -> None:
    """Pages that are here are placed many at a time, and those that are asked for one by one at first."""
    with rig(64) as r, tempfile.TemporaryFile() as file:
        r.child.call("mprotect", addr=r.at(5), length=3 * PAGE, prot=PROT_NONE)
        r.child.call("mprotect", addr=r.at(20), length=PAGE, prot=PROT_READ)
        if here:
            file.write(r.data)
            file.flush()
            r.pager.serve_segments([Segment(TASK.key, r.addr, r.at(64), file.fileno(), 0)])
            r.pager.apply_map({TASK: whole(r.addr, r.pages)})
            r.pager.start()
        else:
            r.start(bulk=True)
        r.finish_in_bulk()
        assert r.pager.counters().bulk == 64
        r.child.call("mprotect", addr=r.at(5), length=3 * PAGE, prot=PROT_READ)
        assert r.child.call("digest", addr=r.addr, length=r.length) == r.expect(0, 64)


def test_fork_while_everything_is_missing() -> None:
    with rig() as r:
        r.start()
        assert r.child.call("fork_digest", addr=r.addr, length=r.length) == r.expect(0, r.pages)
        assert r.child.call("digest", addr=r.addr, length=r.length) == r.expect(0, r.pages)
        r.finish_in_bulk()
        assert r.pager.counters().urgent == r.pages
        assert len(r.server.log) == r.pages  # what comes for one is put into both


def test_fork_while_a_page_is_on_its_way() -> None:
    with rig() as r:
        r.start(bulk=False)
        held = r.server.hold("urgent", r.at(0))
        reading = r.child.begin("digest", addr=r.addr, length=r.length)
        r.server.wait_for("urgent", r.at(0))
        forked = r.child.begin("fork_digest", addr=r.addr, length=r.length)
        held.set()
        assert {reading.result(DEADLINE), forked.result(DEADLINE)} == {r.expect(0, r.pages)}
        r.finish_in_bulk()


def test_the_parent_discards_what_its_child_still_needs() -> None:
    with rig(4) as r:
        r.start()
        held = r.server.hold("urgent", r.at(0))
        forked = r.child.begin("fork_digest", addr=r.addr, length=r.length)
        r.server.wait_for("urgent", r.at(0))  # the child has been born
        r.child.call("madvise", addr=r.addr, length=r.length, advice=MADV_DONTNEED)
        assert not list(r.pager.acknowledge())
        held.set()
        assert forked.result(DEADLINE) == r.expect(0, 4)
        assert list(r.pager.acknowledge()) == [(TASK.key, r.addr, 4)]
        assert r.child.call("digest", addr=r.addr, length=r.length) == digest(bytes(r.length))
        r.finish_in_bulk()
        assert (r.pager.counters().urgent, r.pager.counters().dropped) == (4, 0)


def test_a_child_that_is_gone_is_not_waited_for() -> None:
    with rig(600) as r:
        r.start()
        assert r.child.call("fork_digest", addr=r.at(1), length=PAGE) == r.expect(1, 1)
        assert r.child.call("digest", addr=r.addr, length=r.length) == r.expect(0, 600)
        r.finish_in_bulk()
        assert (r.pager.counters().urgent, r.pager.counters().dropped) == (600, 0)


def test_a_process_that_ends_drops_its_pages() -> None:
    with rig() as r:
        r.start()
        assert r.child.call("digest", addr=r.at(3), length=PAGE) == r.expect(3, 1)
        r.child.process.send_signal(signal.SIGKILL)
        r.child.process.wait()
        r.finish_in_bulk()
        assert r.pager.counters().dropped == r.pages - 1
        assert r.pager.spaces() == ()


def test_a_process_that_ends_with_the_lowest_memory_there_is() -> None:
    """As Wine reserves it."""
    pages, lowest = 4, 0x10000  # the default vm.mmap_min_addr
    with child() as process, pager() as made:
        addr = process.call("mmap", length=pages * PAGE)
        flags = MREMAP_MAYMOVE | MREMAP_FIXED
        process.call("mremap", addr=addr, old=pages * PAGE, new=pages * PAGE, flags=flags, to=lowest)
        with server({TASK.key: (lowest, content(pages))}) as source:
            space = made.add_space(process.register((lowest, pages * PAGE)))
            made.add_region(space, lowest, pages * PAGE, TASK, lowest)
            made.serve_remote(*source.connect())
            made.apply_map({TASK: whole(lowest, pages)})
            made.start(bulk=False)
            assert process.call("digest", addr=lowest, length=PAGE) == digest(content(pages)[:PAGE])
            process.process.kill()
            assert made.wait(DEADLINE)
            assert made.counters().dropped == pages - 1


def test_shared_memory_mapped_twice_and_shrunk() -> None:
    pages = 8
    data = content(pages)
    with child() as process, pager() as made, server({SHARED.key: (0, data)}) as source:
        memory = os.memfd_create("shared")
        os.ftruncate(memory, pages * PAGE)
        addr = process.call("map_memfd", pid=os.getpid(), fd=memory, length=pages * PAGE)
        os.close(memory)
        space = made.add_space(process.register((addr, pages * PAGE)))
        made.add_region(space, addr, pages * PAGE, SHARED, 0)
        made.serve_remote(*source.connect())
        made.apply_map({SHARED: whole(0, pages)})
        made.start(bulk=False)
        second = process.call("mremap", addr=addr, old=0, new=pages * PAGE, flags=MREMAP_MAYMOVE)
        assert process.call("digest", addr=second, length=2 * PAGE) == digest(data[: 2 * PAGE])
        process.call("munmap", addr=addr, length=pages * PAGE)  # the second mapping still shows it
        assert process.call("digest", addr=second, length=4 * PAGE) == digest(data[: 4 * PAGE])
        process.call("madvise", addr=second, length=2 * PAGE, advice=MADV_REMOVE)  # of pages that have come
        assert process.call("digest", addr=second, length=2 * PAGE) == digest(bytes(2 * PAGE))
        process.call(
            "madvise", addr=second + 4 * PAGE, length=PAGE, advice=MADV_DONTNEED
        )  # shared: no discard
        assert process.call("digest", addr=second + 4 * PAGE, length=PAGE) == digest(
            data[4 * PAGE : 5 * PAGE]
        )
        process.call("munmap", addr=second, length=pages * PAGE)
        assert made.wait(DEADLINE)
        assert balanced(made)
        assert made.counters().dropped == 3


def test_a_second_mapping_of_shared_memory_ends_where_other_memory_begins() -> None:
    """mremap(2) of length 0 does not tell how long the second mapping is."""
    pages, second, apart = 8, 2, content(4, seed=2)
    data = content(pages)
    with child() as process, pager() as made:
        shared = process.call("mmap", length=pages * PAGE, shared=True)
        room = process.call("mmap", length=(second + 4) * PAGE)
        addr = room + second * PAGE
        with server({SHARED.key: (0, data), TASK.key: (addr, apart)}) as source:
            space = made.add_space(process.register((shared, pages * PAGE), (addr, 4 * PAGE)))
            made.add_region(space, shared, pages * PAGE, SHARED, 0)
            made.add_region(space, addr, 4 * PAGE, TASK, addr)
            made.serve_remote(*source.connect())
            made.apply_map({SHARED: whole(0, pages), TASK: whole(addr, 4)})
            made.start(bulk=False)
            flags = MREMAP_MAYMOVE | MREMAP_FIXED
            process.call("mremap", addr=shared, old=0, new=second * PAGE, flags=flags, to=room)
            assert process.call("digest", addr=room, length=second * PAGE) == digest(data[: second * PAGE])
            assert process.call("digest", addr=addr, length=4 * PAGE) == digest(apart)
            assert process.call("digest", addr=shared, length=pages * PAGE) == digest(data)
            assert made.wait(DEADLINE)
            assert balanced(made)


def test_part_of_shared_memory_is_moved() -> None:
    pages = 8
    data = content(pages)
    with child() as process, pager() as made, server({SHARED.key: (0, data)}) as source:
        addr = process.call("mmap", length=pages * PAGE, shared=True)
        there = process.call("mmap", length=2 * PAGE, shared=True)
        made.add_region(made.add_space(process.register((addr, pages * PAGE))), addr, pages * PAGE, SHARED, 0)
        made.serve_remote(*source.connect())
        made.apply_map({SHARED: whole(0, pages)})
        made.start(bulk=False)
        process.call(
            "mremap",
            addr=addr + 2 * PAGE,
            old=2 * PAGE,
            new=2 * PAGE,
            flags=MREMAP_MAYMOVE | MREMAP_FIXED,
            to=there,
        )
        assert process.call("digest", addr=there, length=2 * PAGE) == digest(data[2 * PAGE : 4 * PAGE])
        assert process.call("digest", addr=addr, length=2 * PAGE) == digest(data[: 2 * PAGE])
        assert process.call("digest", addr=addr + 4 * PAGE, length=4 * PAGE) == digest(data[4 * PAGE :])
        assert made.wait(DEADLINE)
        assert made.counters().urgent == pages


def test_a_forked_child_shares_shared_memory() -> None:
    pages = 8
    data = content(pages)
    with child() as process, pager() as made, server({SHARED.key: (0, data)}) as source:
        addr = process.call("mmap", length=pages * PAGE, shared=True)
        made.add_region(made.add_space(process.register((addr, pages * PAGE))), addr, pages * PAGE, SHARED, 0)
        made.serve_remote(*source.connect())
        made.apply_map({SHARED: whole(0, pages)})
        made.start(bulk=False)
        assert process.call("fork_digest", addr=addr, length=4 * PAGE) == digest(data[: 4 * PAGE])
        assert process.call("digest", addr=addr, length=pages * PAGE) == digest(data)
        assert made.wait(DEADLINE)
        assert made.counters().urgent == pages == len(source.log)


# --- a source that fails ---


def test_a_lost_connection_parks_the_faults_until_another_one() -> None:
    with rig() as r:
        r.start(bulk=True, known=False)
        held = r.server.hold("urgent", r.at(3))
        reading = r.child.begin("digest", addr=r.at(3), length=PAGE)
        r.server.wait_for("urgent", r.at(3))
        assert not readable([r.pager.news], 0)
        r.server.hang_up()
        held.set()
        assert readable([r.pager.news], DEADLINE)
        assert not r.pager.wait(DEADLINE)
        assert r.pager.state == PagerState.LOST
        assert "connection broke" in r.pager.reason
        assert not reading.done()
        late = r.child.begin("digest", addr=r.at(5), length=PAGE)  # touched while there is no source
        r.pager.apply_map({TASK: whole(r.addr, r.pages)})
        held = r.server.hold("bulk", r.at(0))
        r.pager.serve_remote(*r.server.connect())
        assert reading.result(DEADLINE) == r.expect(3, 1)
        assert late.result(DEADLINE) == r.expect(5, 1)
        assert not readable([r.pager.news], 0)
        held.set()
        assert readable([r.pager.news], DEADLINE)
        r.finish_in_bulk()
        assert r.pager.counters().reconnects == 1
        assert r.child.call("digest", addr=r.addr, length=r.length) == r.expect(0, r.pages)


def test_a_process_that_ends_wants_nothing_of_a_lost_source() -> None:
    with rig() as r:
        r.start()
        assert r.child.call("digest", addr=r.at(3), length=PAGE) == r.expect(3, 1)
        r.server.hang_up()
        wait_until(lambda: r.pager.state == PagerState.LOST, "the loss is noticed")
        r.child.process.send_signal(signal.SIGKILL)
        r.child.process.wait()
        wait_until(lambda: r.pager.wait(0), "it is done")
        assert balanced(r.pager)
        assert r.pager.counters().dropped == r.pages - 1


def damaged(key: int, addr: int, page: bytes, tag: int) -> bytes:
    return HEADER.pack(PAGES, LAST, 0, 1, key, addr, tag, crc32c(page) ^ 1) + page


def misplaced(key: int, addr: int, page: bytes, tag: int) -> bytes:
    return HEADER.pack(PAGES, LAST, 0, 1, key, addr + PAGE, tag, crc32c(page)) + page


def of_another_request(key: int, addr: int, page: bytes, tag: int) -> bytes:
    return HEADER.pack(PAGES, LAST, 0, 1, key, addr, tag + 1, crc32c(page)) + page


def too_many(key: int, addr: int, page: bytes, tag: int) -> bytes:
    return HEADER.pack(PAGES, LAST, 0, 1024, key, addr, tag, crc32c(page)) + page


def without_end(key: int, addr: int, page: bytes, tag: int) -> bytes:
    return HEADER.pack(PAGES, 0, 0, 1, key, addr, tag, crc32c(page)) + page


def noise(_key: int, _addr: int, page: bytes, _tag: int) -> bytes:
    return page


def absent(key: int, addr: int, _page: bytes, tag: int) -> bytes:
    return HEADER.pack(PAGES, LAST | ABSENT, 0, 1, key, addr, tag, 0)


GARBAGE = {
    damaged: "damaged",
    misplaced: "garbage",
    of_another_request: "garbage",
    too_many: "garbage",
    without_end: "garbage",
    noise: "garbage",
    absent: "does not have a page",
}


@pytest.mark.parametrize("answer", GARBAGE, ids=lambda answer: answer.__name__)
@pytest.mark.parametrize("bulk", [False, True], ids=["urgent", "bulk"])
def test_garbage_is_never_installed(answer, bulk: bool) -> None:  # type: ignore[no-untyped-def]
    with rig(1) as r:
        right = r.server.frames
        r.server.frames = lambda key, addr, tag, last: answer(key, addr, r.data, tag)  # type: ignore[method-assign]
        r.start(bulk=bulk)
        reading = r.child.begin("digest", addr=r.addr, length=PAGE)
        assert not r.pager.wait(DEADLINE)
        assert r.pager.state == PagerState.LOST
        assert GARBAGE[answer] in r.pager.reason
        assert not reading.done()
        assert r.pager.counters().outcomes["urgent"][Outcome.INSTALLED] == 0
        assert r.pager.counters().outcomes["bulk"][Outcome.INSTALLED] == 0
        r.server.frames = right  # type: ignore[method-assign]
        r.pager.serve_remote(*r.server.connect())
        assert reading.result(DEADLINE) == r.expect(0, 1)
        r.finish_in_bulk()


def test_a_half_page_is_never_installed() -> None:
    with rig(1) as r:
        right = r.server.frames
        r.server.frames = lambda *request: right(*request)[:-1]  # type: ignore[method-assign]
        r.start()
        reading = r.child.begin("digest", addr=r.addr, length=PAGE)
        r.server.wait_for("urgent", r.addr)
        r.server.hang_up()
        assert not r.pager.wait(DEADLINE)
        assert not reading.done()
        assert r.pager.counters().outcomes["urgent"][Outcome.INSTALLED] == 0


def test_another_pager_takes_over() -> None:
    with rig() as r:
        r.start()
        held = r.server.hold("urgent", r.at(9))
        assert r.child.call("digest", addr=r.at(1), length=PAGE) == r.expect(1, 1)
        reading = r.child.begin("digest", addr=r.at(9), length=PAGE)
        r.server.wait_for("urgent", r.at(9))
        r.pager.stop()  # as good as killed: the fault has been read, its page never comes
        with pager(ledger=r.pager.ledger) as heir:
            held.set()
            heir.serve_remote(*r.server.connect())
            heir.start()
            assert reading.result(DEADLINE) == r.expect(9, 1)
            assert heir.wait(DEADLINE)
            assert balanced(heir)
            assert heir.counters().urgent + heir.counters().bulk == r.pages
            assert heir.finish() == 0
        assert r.child.call("digest", addr=r.addr, length=r.length) == r.expect(0, r.pages)
