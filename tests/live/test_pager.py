"""The pager against real processes: where pages come from, and that each one counts once."""

from __future__ import annotations

import mmap
import os
import tempfile

import pytest

from lazyproc.errors import LazyprocError, UsageError
from lazyproc.kernel import proc
from lazyproc.model import PAGE, Extent
from lazyproc.runs import Segment
from lazyproc.uffd.device import Outcome
from lazyproc.uffd.pager import PagerState
from lazyproc.uffd.policy import sequential
from tests.live.arrivals import waits_for_page
from tests.live.lazy_rig import DEADLINE, SHARED, TASK, child, content, digest, pager, rig, server, whole
from tests.live.programs import wait_until


def test_a_touched_page_comes_on_demand() -> None:
    with rig() as r:
        r.start()
        assert r.child.call("digest", addr=r.at(3), length=PAGE) == r.expect(3, 1)
        counters = r.pager.counters()
        assert (counters.urgent, counters.bulk, counters.remaining) == (1, 0, r.pages - 1)
        assert counters.fault_us.count == 1
        assert 0 < counters.fault_us.p50 <= counters.fault_us.max


def test_what_has_come_is_acknowledged_once_a_link() -> None:
    with rig() as r:
        r.start()
        assert not list(r.pager.acknowledge())
        r.child.call("digest", addr=r.at(3), length=PAGE)
        assert list(r.pager.acknowledge()) == [(TASK.key, r.at(3), 1)]
        r.child.call("digest", addr=r.at(2), length=3 * PAGE)
        assert list(r.pager.acknowledge()) == [(TASK.key, r.at(2), 1), (TASK.key, r.at(4), 1)]
        assert not list(r.pager.acknowledge())
        r.pager.forget_acknowledged()
        assert list(r.pager.acknowledge()) == [(TASK.key, r.at(2), 3)]


def test_what_was_asked_for_and_discarded_is_acknowledged_when_the_request_is_answered() -> None:
    """Who has freed a page by the time the request gets there would think that it is lost."""
    with rig(8) as r:
        held = r.server.hold("bulk", r.at(0))
        r.start(bulk=True)
        r.server.wait_for("bulk", r.at(0))
        r.child.call("madvise", addr=r.addr, length=2 * PAGE, advice=mmap.MADV_DONTNEED)
        wait_until(lambda: r.pager.counters().remaining == 6, "nobody waits for two pages")
        assert not list(r.pager.acknowledge())
        held.set()
        r.finish_in_bulk()
        assert sum(pages for _, _, pages in r.pager.acknowledge()) == 2
        assert list(r.pager.acknowledge()) == [(TASK.key, r.at(2), 6)]


def test_everything_on_demand() -> None:
    with rig(64) as r:
        r.start()
        assert r.child.call("digest", addr=r.addr, length=r.length) == r.expect(0, 64)
        r.finish_in_bulk()
        assert r.pager.counters().urgent == 64


@pytest.mark.parametrize("wakes", [False, True])
def test_bulk_begins_when_it_is_told(wakes: bool) -> None:
    with rig(64) as r:
        r.start()
        assert r.child.call("digest", addr=r.at(3), length=PAGE) == r.expect(3, 1)
        assert r.pager.counters().remaining == 63
        r.pager.start_bulk(wakes=wakes)
        r.finish_in_bulk()
        assert r.pager.counters().bulk == 63
        with pytest.raises(LazyprocError):
            r.pager.start_bulk()


def test_while_a_process_comes_to_life_the_pages_that_follow_come_with_the_one_it_waits_for() -> None:
    """Eight are fetched alone first, to see what more would cost; not what is there, nor what lies behind the end."""
    with rig(402, zero=frozenset({9, 12, 13})) as r:
        r.start()
        assert r.child.call("digest", addr=r.at(10), length=PAGE) == r.expect(10, 1)
        r.pager.start_bulk(wakes=True)
        assert r.child.call("digest", addr=r.addr, length=r.length) == r.expect(0, 402)
        r.finish_in_bulk()
        waited = [each for each in r.server.log if each.channel == "urgent"]
        alone = next((n for n, each in enumerate(r.server.log) if each.channel == "bulk"), len(r.server.log))
        expected = [
            (10, 1),
            *((page, 1) for page in range(8)),
            (8, 2),
            *((page, 4) for page in range(11, 40, 4)),
        ]
        seen = [((each.addr - r.addr) // PAGE, each.count) for each in waited]
        both = list(zip(seen, expected, strict=False))[: max(0, alone - 2)]
        assert [got for got, _ in both] == [wanted for _, wanted in both]
        assert all(each.addr + each.count * PAGE <= r.addr + r.length for each in waited)


def test_before_the_map_is_known_a_fault_brings_its_page_alone() -> None:
    """What follows may be none of the source's."""
    with rig(64) as r:
        r.start(known=False)
        r.pager.start_bulk(wakes=True)
        assert r.child.call("digest", addr=r.addr, length=32 * PAGE) == r.expect(0, 32)
        r.pager.apply_map({TASK: whole(r.addr, 64)})
        r.finish_in_bulk()
        assert [each.count for each in r.server.log if each.channel == "urgent"] == [1] * 32


def test_everything_in_bulk() -> None:
    with rig(600) as r:
        r.start(bulk=True)
        r.finish_in_bulk()
        counters = r.pager.counters()
        assert (counters.bulk, counters.urgent, counters.fault_us.count) == (600, 0, 0)
        assert counters.outcomes["bulk"][Outcome.INSTALLED] == 600
        assert r.child.call("digest", addr=r.addr, length=r.length) == r.expect(0, 600)


def test_zero_pages_are_counted_as_such() -> None:
    with rig(8, zero=frozenset({2, 3})) as r:
        r.start(bulk=True)
        r.finish_in_bulk()
        assert (r.pager.counters().zero, r.pager.counters().bulk) == (2, 6)
        assert r.child.call("digest", addr=r.addr, length=r.length) == r.expect(0, 8)


def test_a_page_under_way_in_bulk_is_asked_for_urgently() -> None:
    with rig(8) as r:
        held = r.server.hold("bulk", r.at(0))
        r.start(bulk=True)
        r.server.wait_for("bulk", r.at(3))
        assert r.child.call("digest", addr=r.at(3), length=PAGE) == r.expect(3, 1)
        held.set()
        r.finish_in_bulk()
        assert (r.pager.counters().urgent, r.pager.counters().bulk) == (1, 7)
        assert r.child.call("digest", addr=r.addr, length=r.length) == r.expect(0, 8)


def test_bulk_releases_who_waits_for_an_urgent_answer() -> None:
    with rig(4) as r:
        urgent, bulk = r.server.hold("urgent", r.at(1)), r.server.hold("bulk", r.at(0))
        r.start(bulk=True)
        r.server.wait_for("bulk", r.at(1))
        reading = r.child.begin("digest", addr=r.at(1), length=PAGE)
        r.server.wait_for("urgent", r.at(1))
        bulk.set()
        assert reading.result(DEADLINE) == r.expect(1, 1)
        assert r.pager.counters().fault_us.count == 1
        urgent.set()
        r.finish_in_bulk()
        assert r.pager.counters().bulk == 4


def test_faults_before_the_map() -> None:
    with rig(8) as r:
        r.server.objects[TASK.key] = (r.addr, r.data[: 6 * PAGE])  # the source has nothing for the last two
        r.start(known=False)
        assert r.child.call("digest", addr=r.at(0), length=2 * PAGE) == r.expect(0, 2)
        reading = r.child.begin("digest", addr=r.at(7), length=PAGE)
        r.server.wait_for("urgent", r.at(7))
        assert not r.pager.wait(0.01)
        r.pager.apply_map({TASK: whole(r.addr, 6)})
        assert reading.result(DEADLINE) == digest(bytes(PAGE))
        assert r.child.call("digest", addr=r.at(2), length=4 * PAGE) == r.expect(2, 4)
        r.finish_in_bulk()
        assert (r.pager.counters().total, r.pager.counters().urgent) == (6, 6)


def test_zero_before_the_map_is_not_in_the_map() -> None:
    with rig(4, zero=frozenset({3})) as r:
        r.start(known=False)
        assert r.child.call("digest", addr=r.at(3), length=PAGE) == digest(bytes(PAGE))
        r.pager.apply_map({TASK: whole(r.addr, 3)})
        assert r.child.call("digest", addr=r.addr, length=3 * PAGE) == r.expect(0, 3)
        r.finish_in_bulk()
        assert (r.pager.counters().total, r.pager.counters().zero) == (3, 0)


def test_a_map_may_name_more_than_there_is() -> None:
    with rig() as r:
        r.pager.serve_remote(*r.server.connect())
        r.pager.apply_map({TASK: [Extent(0, (1 << 52) - 1, lazy=True)]})
        r.pager.start()
        r.finish_in_bulk()
        assert r.pager.counters().total == r.pages


def test_eager_pages_count_once() -> None:
    with rig(8) as r:
        r.pager.add_eager(5)
        r.pager.mark_installed(TASK, r.at(2), 2)  # of those five, two lie in a lazy region
        r.start(bulk=True)
        r.finish_in_bulk()
        counters = r.pager.counters()
        assert (counters.total, counters.eager, counters.bulk) == (11, 5, 6)


def test_extents_that_are_not_lazy_are_not_the_pagers() -> None:
    with rig(4) as r:
        r.start(known=False)
        r.pager.apply_map({TASK: [Extent(r.at(0), 2, lazy=True), Extent(r.at(2), 2, lazy=False)]})
        assert r.pager.counters().total == 2


def test_local_segments() -> None:
    with child() as process, pager() as made:
        data = content(64)
        addr = process.call("mmap", length=96 * PAGE)
        image = os.memfd_create("pages-1.img")
        os.write(image, data)
        space = made.add_space(process.register((addr, 96 * PAGE)))
        made.add_region(space, addr, 96 * PAGE, TASK, addr)
        # the first half of the file lies behind the second in memory
        half = 32 * PAGE
        made.serve_segments(
            [
                Segment(TASK.key, addr + half, addr + 2 * half, image, 0),
                Segment(TASK.key, addr, addr + half, image, half),
            ]
        )
        made.apply_map({TASK: whole(addr, 64)})
        made.start(bulk=False)
        assert process.call("digest", addr=addr + half, length=PAGE) == digest(data[:PAGE])
        assert process.call("digest", addr=addr + 80 * PAGE, length=PAGE) == digest(bytes(PAGE))
        made.plan(sequential({TASK: whole(addr + half, 32)}))
        assert process.call("digest", addr=addr, length=64 * PAGE) == digest(data[half:] + data[:half])
        assert made.wait(DEADLINE)
        os.close(image)


def test_local_segments_in_bulk_then_finish() -> None:
    with child() as process, pager() as made:
        data = content(300)
        addr = process.call("mmap", length=300 * PAGE)
        image = os.memfd_create("pages-1.img")
        os.write(image, data)
        made.add_region(made.add_space(process.register((addr, 300 * PAGE))), addr, 300 * PAGE, TASK, addr)
        made.serve_segments([Segment(TASK.key, addr, addr + 300 * PAGE, image, 0)])
        os.close(image)  # it is mapped
        made.apply_map({TASK: whole(addr, 200)})
        made.start()
        assert made.wait(DEADLINE)
        assert made.finish() == 0
        assert made.spaces() == ()
        assert process.call("digest", addr=addr, length=300 * PAGE) == digest(
            data[: 200 * PAGE] + bytes(100 * PAGE)
        )


@pytest.mark.parametrize(
    "segments",
    [[(0, 2, 0), (1, 3, 2)], [(0, 3, 2)], [(0, 1, 5)], [(2, 2, 0)]],
    ids=["overlapping", "longer than the file", "behind its end", "empty"],
)
def test_segments_that_no_file_has(segments: list[tuple[int, int, int]]) -> None:
    with pager() as made, tempfile.TemporaryFile() as file:
        file.truncate(4 * PAGE)
        rows = [
            Segment(TASK.key, start * PAGE, end * PAGE, file.fileno(), at * PAGE)
            for start, end, at in segments
        ]
        with pytest.raises(UsageError, match="the segments cannot be served"):
            made.serve_segments(rows)


def test_no_memory_is_two_things() -> None:
    with rig() as r:
        for first, count in ((0, 1), (r.pages - 1, 2), (-1, r.pages + 2)):
            with pytest.raises(LazyprocError, match="File exists"):
                r.pager.add_region(r.space, r.at(first), count * PAGE, SHARED, 0)
        r.pager.add_region(r.space, r.at(r.pages), PAGE, SHARED, 0)


def test_what_a_map_names_twice_counts_once() -> None:
    with rig() as r:
        r.pager.serve_remote(*r.server.connect())
        r.pager.apply_map({TASK: [*whole(r.addr, 8), *whole(r.at(4), 12)]})
        r.pager.start()
        r.finish_in_bulk()
        assert r.pager.counters().total == r.pages


def test_a_map_that_names_nothing_leaves_no_page_out() -> None:
    """It is applied in slices of 65536 pages."""
    pages = 2 * 65536 + 1
    with child() as process, pager() as made:
        addr = process.call("mmap", length=pages * PAGE)
        made.add_region(
            made.add_space(process.register((addr, pages * PAGE))), addr, pages * PAGE, TASK, addr
        )
        made.apply_map({})
        assert made.counters().remaining == 0
        made.start()
        assert made.wait(DEADLINE)
        assert process.call("digest", addr=addr + 65536 * PAGE, length=PAGE) == digest(bytes(PAGE))


def test_local_faults_before_the_map() -> None:
    """Content is served at once; whether a page without any is zero, only the map knows."""
    with child() as process, pager() as made:
        data = content(8)
        addr = process.call("mmap", length=16 * PAGE)
        image = os.memfd_create("pages-1.img")
        os.write(image, data)
        made.add_region(made.add_space(process.register((addr, 16 * PAGE))), addr, 16 * PAGE, TASK, addr)
        made.serve_segments([Segment(TASK.key, addr, addr + 8 * PAGE, image, 0)])
        os.close(image)
        made.start()
        assert process.call("digest", addr=addr + PAGE, length=PAGE) == digest(data[PAGE : 2 * PAGE])
        reading = process.begin("digest", addr=addr + 8 * PAGE, length=PAGE)
        pid = process.process.pid
        wait_until(lambda: any(waits_for_page(pid, tid) for tid in proc.task_ids(pid)), "somebody waits")
        assert not made.wait(0.01)
        assert (made.counters().bulk, made.counters().total) == (0, 0)
        assert not reading.done()
        made.apply_map({TASK: whole(addr, 8)})
        assert reading.result(DEADLINE) == digest(bytes(PAGE))
        assert made.wait(DEADLINE)
        counters = made.counters()
        assert (counters.total, counters.urgent, counters.bulk) == (8, 1, 7)
        assert process.call("digest", addr=addr, length=16 * PAGE) == digest(data + bytes(8 * PAGE))


def test_a_rate_limit_holds() -> None:
    with rig(64) as r:
        r.start(bulk=True, max_rate=64 * PAGE * 4)  # a quarter of a second for all of it
        assert not r.pager.wait(0.05)
        r.finish_in_bulk()


def test_a_plan_is_followed_and_replaced() -> None:
    with rig(512) as r:
        r.pager.serve_remote(*r.server.connect())
        first = r.server.hold("bulk", r.at(256))
        r.pager.plan(sequential({TASK: whole(r.at(256), 256)}))
        r.pager.start()
        assert r.server.asked.get(timeout=DEADLINE).addr == r.at(256)
        first.set()
        r.pager.apply_map({TASK: whole(r.addr, 512)})
        r.finish_in_bulk()


def test_shared_memory_of_two_processes() -> None:
    pages = 32
    data = content(pages)
    with child() as one, child() as two, pager() as made, server({SHARED.key: (0, data)}) as source:
        memory = os.memfd_create("shared")
        os.ftruncate(memory, pages * PAGE)
        addrs = [
            process.call("map_memfd", pid=os.getpid(), fd=memory, length=pages * PAGE)
            for process in (one, two)
        ]
        os.close(memory)
        for process, addr in zip((one, two), addrs, strict=True):
            space = made.add_space(process.register((addr, pages * PAGE)))
            made.add_region(space, addr, pages * PAGE, SHARED, 0)
        held = source.hold("urgent", 4 * PAGE)
        made.serve_remote(*source.connect())
        made.apply_map({SHARED: whole(0, pages)})
        made.start(bulk=False)
        both = [
            process.begin("digest", addr=addr + 4 * PAGE, length=PAGE)
            for process, addr in zip((one, two), addrs, strict=True)
        ]
        source.wait_for("urgent", 4 * PAGE)
        held.set()
        assert [future.result(DEADLINE) for future in both] == [digest(data[4 * PAGE : 5 * PAGE])] * 2
        for process, addr in zip((one, two), addrs, strict=True):
            assert process.call("digest", addr=addr, length=pages * PAGE) == digest(data)
        assert made.wait(DEADLINE)
        assert made.counters().urgent == made.counters().total == pages  # each page of the object once


@pytest.mark.parametrize("state", [PagerState.IDLE, PagerState.RUNNING, PagerState.STOPPED])
def test_states(state: PagerState) -> None:
    with rig() as r:
        if state != PagerState.IDLE:
            r.start()
        if state == PagerState.STOPPED:
            r.pager.stop()
        assert r.pager.state == state
