"""A restored process whose pages have not come yet, and everything that may touch them meanwhile: itself, the kernel on
its behalf, its children, debuggers. Pages come on demand only, so nothing is there by luck."""

from __future__ import annotations

import errno
import os
import signal
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest

from lazyproc.dump.checkpoint import checkpoint
from lazyproc.dump.explain import explain
from lazyproc.errors import CannotBeDone, TraceeError
from lazyproc.events import ignore
from lazyproc.kernel import proc
from lazyproc.kernel import sys as kernel
from lazyproc.kernel._core import ffi, lib
from lazyproc.kernel.arch_x86_64 import SYS
from lazyproc.kernel.tracee import Tracee, memory
from lazyproc.model import PAGE, MemoryObject, ObjectKind
from lazyproc.restore.lazy import finish
from lazyproc.uffd.device import Outcome
from tests.live.arrivals import END_S, Arrival, arriving, dump, leave, wait_for_fault
from tests.live.programs import running, wait_until
from tests.needs import lacking

# As trap_lazy.c has them.
ARENA, STRIDE, PAGES = 0x610000000000, 0x100000, 16
DEEDS = (
    "protect", "write", "read", "direct", "vmsplice", "fork", "vfork", "unmap",
    "altstack", "stack", "heap", "threads", "wipe", "poll", "rest", "exec", "abort", "nothing",
)  # fmt: skip
NOBODY = 65534
PTRACE_PEEKDATA = 2
STOP_MS = 2000

T = TypeVar("T")


def page_of(deed: str, page: int = 0) -> int:
    return ARENA + DEEDS.index(deed) * STRIDE + page * PAGE


def begin(work: Callable[[], T]) -> Future[T]:
    """Something that may be held up by a missing page, in a thread of its own."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


@contextmanager
def arrived(
    directory: Path, deed: str = "nothing", *, uid: int = 0, start: bool = True, late: int | None = None
) -> Iterator[Arrival]:
    """trap_lazy, restored before its deed. The page at the address `late` does not come by itself."""
    left = leave("trap_lazy", *((deed, uid) if uid else (deed,)), directory=directory)
    obj = MemoryObject(ObjectKind.TASK, left.pid)
    with arriving(left, start=start, late={} if late is None else {obj: late}) as it:
        yield it


# --- what the process does --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("deed", "touched"),
    [
        ("protect", (0, PAGES - 1)),  # PROT_NONE and PROT_READ when it arrived
        ("write", (0,)),
        ("read", (0,)),
        ("direct", (0, 1, 2)),
        ("vmsplice", (0,)),
        ("fork", range(PAGES)),
        ("vfork", range(PAGES)),
        ("unmap", range(PAGES // 2, PAGES)),
        ("altstack", (PAGES - 1,)),
    ],
)
def test_missing_memory_is_used(deed: str, touched: range | tuple[int, ...], tmp_path: Path) -> None:
    with arrived(tmp_path, deed) as it:
        assert not any(it.was_missed(page_of(deed, page)) for page in range(PAGES))
        it.go()
        it.end_well()
        assert all(it.was_missed(page_of(deed, page)) for page in touched)


@pytest.mark.parametrize("deed", ["write", "read", "vmsplice", "fork"])
def test_an_unprivileged_process(deed: str, tmp_path: Path) -> None:
    """Its userfaultfd was made before it dropped its privileges, so the kernel's own faults are served too."""
    with arrived(tmp_path, deed, uid=NOBODY) as it:
        status = proc.status(proc.read(it.pid, "status"))
        assert status.uid.effective == NOBODY
        assert status.cap_effective == 0
        it.go()
        it.end_well()
        assert it.was_missed(page_of(deed))


def test_a_handler_runs_on_missing_stack_and_the_stack_grows_below_what_is_registered(tmp_path: Path) -> None:
    with arrived(tmp_path, "stack") as it:
        stack = next(v for v in it.tree.checkpoint.root.mm.vmas if v.name == "[stack]")  # type: ignore[union-attr]
        it.go()
        counters = it.end_well()
        assert any(stack.start <= fault.addr < stack.end for fault in it.faults())
        below = [fault for fault in it.faults() if stack.start - (1 << 21) < fault.addr < stack.start]
        assert len(below) > 100
        assert {fault.source for fault in below} == {"zero"}
        assert counters.outcomes["zero"][Outcome.INSTALLED] >= len(below)


def test_the_heap_grows_beyond_what_is_registered(tmp_path: Path) -> None:
    with arrived(tmp_path, "heap") as it:
        it.go()
        it.end_well()


def test_threads_that_vanish_are_joined_and_their_robust_mutexes_are_free(tmp_path: Path) -> None:
    """They touch nothing before they end; each mutex is on a page of its own."""
    with arrived(tmp_path, "threads") as it:
        assert len(proc.task_ids(it.pid)) == PAGES + 1
        it.go()
        it.end_well()


def test_a_child_finds_zeros_in_what_a_fork_wipes(tmp_path: Path) -> None:
    """Nothing of it is missing, which would come to the child: the kernel leaves such pages out, not their faults."""
    with arrived(tmp_path, "wipe") as it:
        it.go()
        it.end_well()
        assert not any(it.was_missed(page_of("wipe", page)) for page in range(PAGES))


@pytest.mark.parametrize("call", ["poll", "rest"])
def test_a_sleep_that_reads_or_writes_across_the_end_of_a_page(call: str, tmp_path: Path) -> None:
    """It is made once more before there is a pager."""
    number = {"poll": SYS["poll"], "rest": SYS["nanosleep"]}[call]
    with running("trap_lazy", call, directory=tmp_path) as program:
        wait_until(lambda: any_in_call(program.pid, number), "a thread sleeps")
        program.watch.wait_beats(1)
        left = dump(program.pid, program.watch, tmp_path)
    with arriving(left) as it:
        it.go()
        it.end_well()


def any_in_call(pid: int, number: int) -> bool:
    calls = [proc.syscall(proc.read(pid, f"task/{tid}/syscall")) for tid in proc.task_ids(pid)]
    return any(call is not None and call.nr == number for call in calls)


def test_exec_ends_the_old_memory(tmp_path: Path) -> None:
    with arrived(tmp_path, "exec") as it:
        it.go()
        counters = it.end_well()
        assert counters.dropped >= PAGES
        assert not it.was_missed(page_of("exec"))


def test_the_end_of_the_process_is_the_end_of_the_pager(tmp_path: Path) -> None:
    with arrived(tmp_path) as it:
        it.go()
        counters = it.end_well()
        assert counters.dropped >= PAGES
        finish(it.pager, it.remains)
        assert it.pager.spaces() == ()


def test_a_page_that_is_unmapped_before_it_came_is_dropped(tmp_path: Path) -> None:
    late = page_of("unmap", 2)
    with arrived(tmp_path, "unmap", late=late) as it:
        reading = begin(lambda: kernel.read_memory(it.pid, late, PAGE))
        it.wait_for(late)
        it.go()
        with pytest.raises(OSError, match=r"Bad address|process_vm_readv"):
            reading.result(END_S)
        it.let_come(late)
        assert it.end_well().dropped >= PAGES // 2


# --- before the pager, and without one --------------------------------------------------------------------------


def test_who_needs_a_page_waits_until_there_is_a_pager(tmp_path: Path) -> None:
    with arrived(tmp_path, "write", start=False) as it:
        it.go()
        wait_for_fault(it.pid)
        assert it.watch.read().errors == 0
        it.start()
        it.end_well()


def test_a_waiting_process_can_be_killed(tmp_path: Path) -> None:
    with arrived(tmp_path, "write", start=False) as it:
        it.go()
        wait_for_fault(it.pid)
        os.kill(it.pid, signal.SIGKILL)
        assert it.wait_exit() == 128 + signal.SIGKILL
        it.start()
        assert it.pager.wait(END_S)


def test_arguments_and_environment_are_readable_before_any_page_has_come(tmp_path: Path) -> None:
    left = leave("trap_lazy", "nothing", directory=tmp_path)
    with arriving(left, start=False) as it:
        for name, wanted in (("cmdline", f"{left.watch.path}\0nothing\0"), ("environ", "PATH=")):
            reading = begin(lambda name=name: proc.read(it.pid, name).decode())  # type: ignore[misc]
            assert wanted in reading.result(END_S)


# --- others who look at it --------------------------------------------------------------------------------------


def test_reading_from_outside_waits_for_the_page(tmp_path: Path) -> None:
    late = page_of("nothing", 5)
    with arrived(tmp_path, late=late) as it:
        reading = begin(lambda: kernel.read_memory(it.pid, late, PAGE))
        it.wait_for(late)
        assert not reading.done()
        it.let_come(late)
        assert reading.result(END_S) == it.page_at_source(late)
        it.go()
        it.end_well()


def test_a_tracer_is_told_what_is_missing_and_reads_it_when_it_has_come(tmp_path: Path) -> None:
    """PTRACE_PEEKDATA and /proc/PID/mem cannot wait (access_remote_vm, mm/memory.c, lets no fault drop the lock):
    an error, and no zeros."""
    with arrived(tmp_path) as it, memory(it.pid) as mem:
        addr = page_of("nothing", 7)
        tracee = Tracee(it.pid)
        tracee.seize(0)
        tracee.interrupt()
        tracee.wait_stop(STOP_MS)
        assert peek(it.pid, addr) == -errno.EIO
        with pytest.raises(TraceeError, match="Input/output error"):
            mem.read(addr, 8)
        with pytest.raises(TraceeError, match="Input/output error"):
            mem.write(addr, b"breakpoint")
        page = kernel.read_memory(it.pid, addr, PAGE)
        assert page == it.page_at_source(addr)
        assert peek(it.pid, addr) == struct.unpack_from("<Q", page)[0]
        mem.write(addr, b"breakpoint")
        assert kernel.read_memory(it.pid, addr, PAGE) == b"breakpoint" + page[10:]
        tracee.detach()
        it.go()
        it.end_well()


def peek(pid: int, addr: int) -> int:
    """The word at `addr`, or a negative errno."""
    word = ffi.new("uint64_t *")
    result = int(lib.lp_ptrace(PTRACE_PEEKDATA, pid, addr, int(ffi.cast("uintptr_t", word))))
    return result if result < 0 else int(word[0])


def test_a_core_dump_of_the_kernel_has_what_has_come_and_holes(tmp_path: Path) -> None:
    """The kernel asks nobody for a page while it dumps core (handle_userfault, PF_DUMPCORE; mm/gup.c, FOLL_DUMP)."""
    pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
    if pattern.startswith(("|", "/")):
        lacking(f"cores go to {pattern}", "sysctl kernel.core_pattern=core")
    with arrived(tmp_path, "abort") as it:
        it.go()
        assert it.wait_exit() == 128 + signal.SIGABRT
        (core,) = tmp_path.glob("core*")
        assert in_core(core, page_of("abort")) == it.page_at_source(page_of("abort"))
        assert in_core(core, page_of("abort", 1)) == bytes(PAGE)
        assert it.pager.wait(END_S)


def in_core(core: Path, addr: int) -> bytes:
    """A page from a core file: elf(5), program headers of type PT_LOAD."""
    data = core.read_bytes()
    offset, size, count = *struct.unpack_from("<Q", data, 32), *struct.unpack_from("<HH", data, 54)
    for at in range(offset, offset + size * count, size):
        kind, _, start, vaddr, _, length = struct.unpack_from("<IIQQQQ", data, at)
        if kind == 1 and vaddr <= addr < vaddr + length:
            return data[start + addr - vaddr :][:PAGE]
    raise AssertionError(f"{addr:#x} is not in {core}")


def test_what_still_arrives_is_not_dumped_again(tmp_path: Path) -> None:
    with arrived(tmp_path, start=False) as it:
        whys = [obstacle.why for obstacle in explain(it.pid)]
        assert any("a restore or migration still brings its pages" in why for why in whys)
        with pytest.raises(CannotBeDone, match="wait until every page has come"):
            checkpoint(it.pid, tmp_path / "again", leave_running=True, tcp_close=False, listener=ignore)
        assert not (tmp_path / "again").exists()
        it.start(bulk=True)
        it.drain()
        assert explain(it.pid) == ()
        it.go()
        assert it.wait_exit() == 0
