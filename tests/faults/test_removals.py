"""What processes take out of the shared memory that is on its way to them (MADV_REMOVE) is gone for all of them, and
what they only let go of (MADV_DONTNEED) still comes. To a pager both are the same event.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pytest

from lazyproc.hosts import Pair
from lazyproc.kernel import proc
from lazyproc.kernel.arch_x86_64 import SYS
from lazyproc.kernel.sys import read_memory
from lazyproc.kernel.visit import call_in
from lazyproc.model import PAGE
from lazyproc.restore.lazy import note_removals
from lazyproc.restore.lazytree import LazyTask, LazyTree
from lazyproc.uffd.pager import Pager, rebind
from tests.faults.helpers import DESTINATION, journal, kill, sessions
from tests.live.lazy_rig import (
    DEADLINE,
    SHARED,
    Child,
    Server,
    balanced,
    child,
    content,
    digest,
    pager,
    server,
    whole,
)
from tests.live.moving import receiving, run_cli
from tests.live.programs import running, wait_until
from tests.live.real import ending, migrating
from tests.live.test_traps_lazy import begin

MADV_DONTNEED, MADV_REMOVE, MADV_DONTNEED_LOCKED = 4, 9, 24
MREMAP_TO = 3  # MREMAP_MAYMOVE | MREMAP_FIXED
SOMEWHERE = 0x6000_0000_0000  # where nobody maps anything unasked
ZEROS = digest(bytes(PAGE))
BOTH = pytest.mark.parametrize("advice", [MADV_REMOVE, MADV_DONTNEED], ids=["REMOVE", "DONTNEED"])


@dataclass
class SharedRig:
    """Processes that map one object of `pages` missing pages, each at its own of the `addrs`."""

    children: tuple[Child, ...]
    addrs: tuple[int, ...]
    userfaultfds: tuple[int, ...]
    pager: Pager
    server: Server
    data: bytes

    @property
    def pages(self) -> int:
        return len(self.data) // PAGE

    def expect(self, page: int) -> str:
        return digest(self.data[page * PAGE : (page + 1) * PAGE])

    def digest(self, which: int, page: int, count: int = 1) -> str:
        at = self.addrs[which] + page * PAGE
        return str(self.children[which].call("digest", addr=at, length=count * PAGE))

    def advise(self, which: int, page: int, advice: int, count: int = 1) -> None:
        at = self.addrs[which] + page * PAGE
        self.children[which].call("madvise", addr=at, length=count * PAGE, advice=advice)

    def start(self, *, bulk: bool = False) -> None:
        self.pager.serve_remote(*self.server.connect())
        self.pager.apply_map({SHARED: whole(0, self.pages)})
        self.pager.start(bulk=bulk)

    def is_what_is_left(self, *removed: int) -> bool:
        """For all of them, and each page is accounted for."""
        left = bytearray(self.data)
        for page in removed:
            left[page * PAGE : (page + 1) * PAGE] = bytes(PAGE)
        seen = {self.digest(which, 0, self.pages) for which in range(len(self.children))}
        return seen == {digest(bytes(left))} and self.pager.wait(DEADLINE) and balanced(self.pager)


@contextmanager
def shared_rig(processes: int = 1, pages: int = 16, *, known: bool = True) -> Iterator[SharedRig]:
    """With `known` the pager is told the processes' numbers."""
    with ExitStack() as stack:
        children = tuple(stack.enter_context(child()) for _ in range(processes))
        made = stack.enter_context(pager())
        data = content(pages)
        source = stack.enter_context(server({SHARED.key: (0, data)}))
        addrs = mapped(children, pages * PAGE)
        userfaultfds = []
        for process, addr in zip(children, addrs, strict=True):
            userfaultfds.append(process.register((addr, pages * PAGE)))
            space = made.add_space(userfaultfds[-1], pid=process.process.pid if known else 0)
            made.add_region(space, addr, pages * PAGE, SHARED, 0)
        made.watch_removals()
        yield SharedRig(children, addrs, tuple(userfaultfds), made, source, data)


def mapped(children: tuple[Child, ...], length: int) -> tuple[int, ...]:
    memory = os.memfd_create("shared")
    try:
        os.ftruncate(memory, length)
        return tuple(each.call("map_memfd", pid=os.getpid(), fd=memory, length=length) for each in children)
    finally:
        os.close(memory)


# --- one process ------------------------------------------------------------------------------------------------


@BOTH
def test_missing(advice: int) -> None:
    with shared_rig() as r:
        r.start()
        r.advise(0, 2, advice)
        removed = [2] if advice == MADV_REMOVE else []
        assert r.is_what_is_left(*removed)
        assert r.pager.counters().dropped == len(removed)


@BOTH
def test_on_its_way(advice: int) -> None:
    with shared_rig() as r:
        r.start()
        held = r.server.hold("urgent", 2 * PAGE)
        reading = r.children[0].begin("digest", addr=r.addrs[0] + 2 * PAGE, length=PAGE)
        r.server.wait_for("urgent", 2 * PAGE)
        r.advise(0, 2, advice)
        if advice == MADV_REMOVE:
            assert reading.result(DEADLINE) == ZEROS  # without the answer
        held.set()
        removed = [2] if advice == MADV_REMOVE else []
        assert reading.result(DEADLINE) == (ZEROS if removed else r.expect(2))
        assert r.is_what_is_left(*removed)


@BOTH
def test_on_its_way_in_bulk(advice: int) -> None:
    with shared_rig() as r:
        held = r.server.hold("bulk", 0)
        r.start(bulk=True)
        r.server.wait_for("bulk", 0)
        r.advise(0, 5, advice, count=2)
        held.set()
        assert r.pager.wait(DEADLINE)
        assert r.is_what_is_left(*([5, 6] if advice == MADV_REMOVE else []))


@BOTH
def test_already_there(advice: int) -> None:
    with shared_rig() as r:
        r.start()
        assert r.digest(0, 2) == r.expect(2)
        r.advise(0, 2, advice)
        assert r.is_what_is_left(*([2] if advice == MADV_REMOVE else []))
        assert [asked.addr for asked in r.server.log].count(2 * PAGE) == 1
        assert r.pager.counters().dropped == 0


@pytest.mark.parametrize("channel", ["urgent", "bulk"])
def test_written_after_it_was_removed_and_before_it_comes(channel: str) -> None:
    with shared_rig() as r:
        late = 3 if channel == "urgent" else 0
        held = r.server.hold(channel, late * PAGE)
        r.start(bulk=channel == "bulk")
        reading = None
        if channel == "urgent":
            reading = r.children[0].begin("digest", addr=r.addrs[0] + 3 * PAGE, length=PAGE)
        r.server.wait_for(channel, late * PAGE)
        r.advise(0, 3, MADV_REMOVE)
        if reading is not None:
            assert reading.result(DEADLINE) == ZEROS
        r.children[0].call("poke", addr=r.addrs[0] + 3 * PAGE, text="mine")
        held.set()
        assert r.digest(0, 4) == r.expect(4)
        if channel == "bulk":
            assert r.pager.wait(DEADLINE)
        assert r.digest(0, 3) == digest(b"mine" + bytes(PAGE - 4))


def test_a_call_over_several_mappings_and_memory_between() -> None:
    """One event each for the parts of one call; a mapping that nobody watches lies among them."""
    with shared_rig() as r:
        r.start()
        r.children[0].call("mprotect", addr=r.addrs[0] + 3 * PAGE, length=2 * PAGE, prot=1 | 2 | 4)
        r.advise(0, 2, MADV_REMOVE, count=6)
        r.advise(0, 9, MADV_DONTNEED, count=2)
        assert r.is_what_is_left(*range(2, 8))


def test_let_go_of_after_part_of_it_was_removed() -> None:
    with shared_rig() as r:
        r.start()
        r.advise(0, 2, MADV_REMOVE)
        r.advise(0, 2, MADV_DONTNEED, count=3)
        assert r.is_what_is_left(2)


def test_other_memory_let_go_of_where_some_was_removed() -> None:
    with shared_rig() as r:
        r.start()
        r.advise(0, 2, MADV_REMOVE, count=2)
        to, length = r.addrs[0] + 2 * PAGE, 2 * PAGE
        r.children[0].call(
            "mremap", addr=r.addrs[0] + 8 * PAGE, old=length, new=length, flags=MREMAP_TO, to=to
        )
        r.advise(0, 2, MADV_DONTNEED, count=2)
        assert r.digest(0, 2, 2) == digest(r.data[8 * PAGE : 10 * PAGE])


def test_let_go_of_after_it_could_not_be_removed() -> None:
    """EINVAL: it is locked. That call had no event; the next one has."""
    with shared_rig() as r:
        r.start()
        r.children[0].call("lock_when_touched", addr=r.addrs[0], length=r.pages * PAGE)
        with pytest.raises(RuntimeError, match="Invalid argument"):
            r.advise(0, 2, MADV_REMOVE, count=3)
        r.advise(0, 2, MADV_DONTNEED_LOCKED, count=3)
        assert r.is_what_is_left()


@pytest.mark.parametrize("known", [True, False])
def test_many_threads_remove_let_go_and_read(known: bool) -> None:
    """Most calls are made while the pager is about to read something else."""
    pages = 256
    with shared_rig(2, pages, known=known) as r:
        held = r.server.hold("bulk", 0)
        r.start(bulk=True)
        calls = []
        for page in range(0, pages, 4):
            for which, offset, advice in ((0, 0, MADV_REMOVE), (1, 1, MADV_DONTNEED), (1, 2, MADV_REMOVE)):
                at = r.addrs[which] + (page + offset) * PAGE
                calls.append(r.children[which].begin("madvise", addr=at, length=PAGE, advice=advice))
            at = r.addrs[0] + (page + 3) * PAGE
            calls.append(r.children[0].begin("digest", addr=at, length=PAGE))
        for call in calls:
            call.result(DEADLINE)
        held.set()
        assert r.pager.wait(DEADLINE)
        assert r.is_what_is_left(*range(0, pages, 4), *range(2, pages, 4))


# --- more than one process --------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [True, False])
def test_removed_by_another_process(known: bool) -> None:
    with shared_rig(2, known=known) as r:
        r.start()
        held = r.server.hold("urgent", 4 * PAGE)
        reading = r.children[1].begin("digest", addr=r.addrs[1] + 4 * PAGE, length=PAGE)
        r.server.wait_for("urgent", 4 * PAGE)
        r.advise(0, 2, MADV_REMOVE, count=3)
        assert reading.result(DEADLINE) == ZEROS
        held.set()
        assert r.digest(1, 3) == ZEROS
        assert r.is_what_is_left(2, 3, 4)
        assert r.pager.counters().dropped == 3


@BOTH
def test_a_child_that_was_forked_meanwhile(advice: int) -> None:
    with shared_rig(known=True) as r:
        r.start()
        seen = r.children[0].call("fork_digest", addr=r.addrs[0] + 2 * PAGE, length=PAGE, advice=advice)
        assert seen == (ZEROS if advice == MADV_REMOVE else r.expect(2))
        assert r.is_what_is_left(*([2] if advice == MADV_REMOVE else []))


def test_the_parent_of_a_child_that_was_forked_meanwhile() -> None:
    with shared_rig() as r:
        r.start()
        held = r.server.hold("urgent", 0)
        seen = r.children[0].begin("fork_digest", addr=r.addrs[0], length=2 * PAGE)
        r.server.wait_for("urgent", 0)  # the child has been born
        r.advise(0, 1, MADV_REMOVE)
        held.set()
        assert seen.result(DEADLINE) == digest(r.data[:PAGE] + bytes(PAGE))
        assert r.is_what_is_left(1)


def test_a_stranger_with_other_memory_at_the_same_address() -> None:
    pages = 4
    data = content(pages)
    with child() as ours, child() as stranger, pager() as made, server({SHARED.key: (0, data)}) as source:
        for process in (ours, stranger):
            at = process.call("mmap", length=pages * PAGE, shared=True)
            process.call("mremap", addr=at, old=pages * PAGE, new=pages * PAGE, flags=MREMAP_TO, to=SOMEWHERE)
        space = made.add_space(ours.register((SOMEWHERE, pages * PAGE)), pid=ours.process.pid)
        made.add_region(space, SOMEWHERE, pages * PAGE, SHARED, 0)
        made.watch_removals()
        made.serve_remote(*source.connect())
        made.apply_map({SHARED: whole(0, pages)})
        made.start(bulk=False)
        stranger.call("madvise", addr=SOMEWHERE, length=pages * PAGE, advice=MADV_REMOVE)
        ours.call("madvise", addr=SOMEWHERE, length=pages * PAGE, advice=MADV_DONTNEED)
        assert ours.call("digest", addr=SOMEWHERE, length=pages * PAGE) == digest(data)


# --- more than one pager ----------------------------------------------------------------------------------------


def waits_in_madvise(pid: int, threads: int = 1) -> bool:
    """By then their events have been queued."""
    waiting = 0
    for tid in proc.task_ids(pid):
        blocked = proc.syscall(proc.read(pid, f"task/{tid}/syscall"))
        waiting += blocked is not None and blocked.nr == SYS["madvise"]
    return waiting == threads


@contextmanager
def taken_over(r: SharedRig) -> Iterator[Pager]:
    """Another pager of the same ledger, which has not begun."""
    with Pager(ledger=r.pager.ledger) as second:
        second.serve_remote(*r.server.connect())
        yield second


@BOTH
def test_removed_while_no_pager_was_there(advice: int) -> None:
    with shared_rig() as r:
        r.start()
        r.pager.stop()
        calling = r.children[0].begin("madvise", addr=r.addrs[0] + 2 * PAGE, length=PAGE, advice=advice)
        wait_until(lambda: waits_in_madvise(r.children[0].process.pid), "it waits for a pager")
        with taken_over(r) as second:
            second.start(bulk=False)
            calling.result(DEADLINE)
            removed = [2] if advice == MADV_REMOVE else []
            assert [r.digest(0, page) for page in range(4)] == [
                ZEROS if page in removed else r.expect(page) for page in range(4)
            ]
            assert second.counters().dropped == len(removed)


def test_part_of_it_is_let_go_of_at_the_same_time() -> None:
    """The later event is read first."""
    with shared_rig() as r:
        pid, at = r.children[0].process.pid, r.addrs[0] + 2 * PAGE
        r.start()
        r.pager.stop()
        calls = [r.children[0].begin("madvise", addr=at, length=6 * PAGE, advice=MADV_REMOVE)]
        wait_until(lambda: waits_in_madvise(pid), "it waits for a pager")
        calls.append(
            r.children[0].begin("madvise", addr=at + 3 * PAGE, length=3 * PAGE, advice=MADV_DONTNEED)
        )
        wait_until(lambda: waits_in_madvise(pid, 2), "both wait for a pager")
        with taken_over(r) as second:
            second.start(bulk=False)
            for call in calls:
                call.result(DEADLINE)
            assert r.digest(0, 2, 6) == digest(bytes(6 * PAGE))
            assert r.digest(0, 8) == r.expect(8)


@BOTH
def test_removed_while_nobody_was_there_who_watched(advice: int) -> None:
    """As `resume` finds it: all helpers are gone, and with them what they had opened."""
    with shared_rig() as r:
        pid = r.children[0].process.pid
        r.start()
        r.pager.stop()
        calling = r.children[0].begin("madvise", addr=r.addrs[0] + 2 * PAGE, length=PAGE, advice=advice)
        wait_until(lambda: waits_in_madvise(pid), "it waits for a pager")
        started = proc.stat(proc.read(pid, "stat")).start_time
        rebind(r.pager.ledger, r.pager.cradle, r.userfaultfds)
        with taken_over(r) as second:
            note_removals(
                second, LazyTree(pid, pid, pid, (LazyTask(pid, pid, started, -1, -1, -1),), (), (), 0)
            )
            second.start(bulk=False)
            calling.result(DEADLINE)
            assert r.digest(0, 2) == (ZEROS if advice == MADV_REMOVE else r.expect(2))
            assert r.digest(0, 3) == r.expect(3)
            r.advise(0, 4, MADV_REMOVE)  # and it is watched again
            assert r.digest(0, 4) == ZEROS


def test_what_was_removed_stays_so_for_the_next_pager() -> None:
    with shared_rig() as r:
        r.start()
        r.advise(0, 2, MADV_REMOVE)
        r.pager.stop()
        with taken_over(r) as second:
            second.start(bulk=True)
            assert second.wait(DEADLINE)
            assert r.digest(0, 2) == ZEROS
            assert r.digest(0, 3) == r.expect(3)
            assert balanced(second)


# --- a migration ------------------------------------------------------------------------------------------------


def shared_anonymous(pid: int) -> tuple[int, int]:
    """Where it is mapped, and its length."""
    (entry,) = (e for e in proc.maps(proc.read(pid, "maps")) if e.path == "/dev/zero")
    return entry.start, entry.end - entry.start


def test_removed_after_a_migration_and_while_all_helpers_are_dead(pair: Pair) -> None:
    with running("trap_shared", directory=pair.shared, host=pair.source) as program:
        at, length = shared_anonymous(program.pid)
        data = bytearray(read_memory(program.pid, at, length))
        with (
            receiving(pair.destination) as receiver,
            migrating(pair.source, receiver, program.pid, "--no-bulk") as journey,
        ):
            journey.wait_running()
            root = pair.destination.pid(journal(pair.destination, DESTINATION)["tree"]["root_pid"])
            with ending(root):
                call_in(root, "madvise", at + 2 * PAGE, PAGE, MADV_REMOVE)
                kill(pair.destination, DESTINATION, "keeper", "pager", "guard")
                calling = begin(lambda: call_in(root, "madvise", at + 5 * PAGE, PAGE, MADV_REMOVE))
                wait_until(lambda: waits_in_madvise(root), "it waits for a pager")
                (orphan,) = sessions(pair.destination)
                resuming = begin(lambda: run_cli(pair.destination, "resume", orphan["id"]))
                calling.result(DEADLINE)
                call_in(root, "madvise", at + 7 * PAGE, PAGE, MADV_REMOVE)
                call_in(root, "madvise", at + 9 * PAGE, PAGE, MADV_DONTNEED)
                for page in (2, 5, 7):
                    data[page * PAGE : (page + 1) * PAGE] = bytes(PAGE)
                (child,) = proc.children_of(root, root)
                assert {bytes(read_memory(pid, at, length)) for pid in (root, child)} == {bytes(data)}
            resuming.result(DEADLINE)
