"""What a process, its kernel and others do to a page that is on its way at that very moment: its GET lies with the
server, who withholds the answer until it is done. What is done to pages nobody has asked for is in
tests/live/test_pager_hazards.py and test_traps_lazy.py.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from lazyproc.errors import TraceeError
from lazyproc.kernel import proc
from lazyproc.kernel.sys import read_memory
from lazyproc.kernel.tracee import Tracee, memory
from lazyproc.model import PAGE
from tests.live.arrivals import waits_for_page
from tests.live.lazy_rig import (
    DEADLINE,
    TASK,
    Rig,
    balanced,
    child,
    content,
    digest,
    held_read,
    pager,
    rig,
    server,
    whole,
)
from tests.live.programs import wait_until
from tests.live.test_traps_lazy import STOP_MS, begin, in_core
from tests.needs import lacking

MADV_DONTNEED, MADV_FREE, MADV_PAGEOUT = 4, 8, 21
PROT_NONE, PROT_ALL = 0, 3
ZEROS = digest(bytes(PAGE))


def waiting_thread(pid: int) -> int:
    """Of the process, the one that the kernel holds for a page."""
    found: list[int] = []

    def found_it() -> bool:
        found[:] = [tid for tid in proc.task_ids(pid) if waits_for_page(pid, tid)]
        return bool(found)

    wait_until(found_it, f"a thread of pid {pid} waits for a page")
    return found[0]


def is_whole(r: Rig) -> bool:
    """Everything else is right."""
    return bool(r.child.call("digest", addr=r.at(8), length=8 * PAGE) == r.expect(8, 8))


# --- discarded --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("advice", [MADV_DONTNEED, MADV_FREE], ids=["DONTNEED", "FREE"])
def test_discarded(advice: int) -> None:
    with rig() as r:
        r.start()
        held, reading = held_read(r, 4)
        r.child.call("madvise", addr=r.at(4), length=PAGE, advice=advice)
        assert reading.result(DEADLINE) == ZEROS
        held.set()
        assert is_whole(r)
        assert r.child.call("digest", addr=r.at(4), length=PAGE) == ZEROS
        assert r.pager.counters().dropped == 1


def test_freed_before_and_after_it_came() -> None:
    """MADV_FREE lets the kernel take the page whenever it likes; it is never asked for again."""
    with rig() as r:
        r.start()
        r.child.call("madvise", addr=r.at(2), length=PAGE, advice=MADV_FREE)
        assert r.child.call("digest", addr=r.at(2), length=PAGE) == ZEROS
        assert r.child.call("digest", addr=r.at(3), length=PAGE) == r.expect(3, 1)
        r.child.call("madvise", addr=r.at(3), length=PAGE, advice=MADV_FREE)
        assert r.child.call("digest", addr=r.at(3), length=PAGE) in (ZEROS, r.expect(3, 1))
        assert [asked.addr for asked in r.server.log] == [r.at(3)]
        r.child.call("madvise", addr=r.at(3), length=PAGE, advice=MADV_PAGEOUT)  # reclaims what was freed
        assert r.child.call("digest", addr=r.at(3), length=PAGE) in (ZEROS, r.expect(3, 1))
        assert is_whole(r)
        assert [asked.addr for asked in r.server.log].count(r.at(3)) == 1


# --- mapped anew ------------------------------------------------------------------------------------------------


def test_protected_under_a_thread_in_the_kernel() -> None:
    """It gets EFAULT, and the page is there when the protection is gone."""
    with rig() as r:
        r.start()
        held = r.server.hold("urgent", r.at(4))
        reading = r.child.begin("read_into", addr=r.at(4), text="x")
        r.server.wait_for("urgent", r.at(4))
        r.child.call("mprotect", addr=r.at(4), length=PAGE, prot=PROT_NONE)
        held.set()
        with pytest.raises(RuntimeError, match="Bad address"):
            reading.result(DEADLINE)
        r.child.call("mprotect", addr=r.at(4), length=PAGE, prot=PROT_ALL)
        assert r.child.call("digest", addr=r.at(4), length=PAGE) == r.expect(4, 1)
        assert is_whole(r)


def test_protected_while_it_comes_in_bulk() -> None:
    with rig() as r:
        held = r.server.hold("bulk", r.at(0))
        r.start(bulk=True)
        r.server.wait_for("bulk", r.at(0))
        r.child.call("mprotect", addr=r.at(0), length=4 * PAGE, prot=PROT_NONE)
        held.set()
        r.finish_in_bulk()
        r.child.call("mprotect", addr=r.at(0), length=4 * PAGE, prot=PROT_ALL)
        assert r.child.call("digest", addr=r.addr, length=r.length) == r.expect(0, r.pages)


def test_the_heap_shrinks_and_grows_again() -> None:
    data = content(8)
    with child() as process, pager() as made:
        at = process.call("sbrk", pages=9)
        addr = (at + PAGE - 1) & -PAGE
        end = at + 9 * PAGE
        with server({TASK.key: (addr, data)}) as source:
            space = made.add_space(process.register((addr, 8 * PAGE)))
            made.add_region(space, addr, 8 * PAGE, TASK, addr)
            made.serve_remote(*source.connect())
            made.apply_map({TASK: whole(addr, 8)})
            made.start(bulk=False)
            late = addr + 6 * PAGE
            held = source.hold("urgent", late)
            reading = process.begin("read_into", addr=late, text="x")
            source.wait_for("urgent", late)
            process.call("sbrk", pages=-5, top=end)
            with pytest.raises(RuntimeError, match="Bad address"):
                reading.result(DEADLINE)
            process.call("sbrk", pages=5, top=end - 5 * PAGE)
            held.set()
            kept = (end - 5 * PAGE - addr) // PAGE
            fresh = addr + (kept + 1) * PAGE
            assert process.call("digest", addr=addr, length=kept * PAGE) == digest(data[: kept * PAGE])
            assert process.call("digest", addr=fresh, length=PAGE) == ZEROS
            assert process.call("digest", addr=late, length=PAGE) == ZEROS


# --- the process ends or becomes another ------------------------------------------------------------------------


def test_exec_under_a_waiting_thread() -> None:
    with rig() as r:
        r.start()
        held, _ = held_read(r, 4)
        r.child.begin("exec")
        assert r.child.process.wait(DEADLINE) == 0
        held.set()
        r.finish_in_bulk()
        assert r.pager.counters().dropped == r.pages


def test_exit_under_a_waiting_thread() -> None:
    with rig() as r:
        r.start()
        held, _ = held_read(r, 4)
        r.child.begin("exit")
        assert r.child.process.wait(DEADLINE) == 0
        held.set()
        r.finish_in_bulk()
        assert r.pager.counters().dropped == r.pages


def test_vfork_and_exec_beside_a_waiting_thread() -> None:
    with rig() as r:
        r.start()
        held, reading = held_read(r, 4)
        assert r.child.call("spawn") == 0
        assert not reading.done()
        held.set()
        assert reading.result(DEADLINE) == r.expect(4, 1)
        assert is_whole(r)


def test_a_core_dump_does_not_wait_for_the_page(tmp_path: Path) -> None:
    if Path("/proc/sys/kernel/core_pattern").read_text().startswith(("|", "/")):
        lacking("cores go elsewhere", "sysctl kernel.core_pattern=core")
    with rig() as r:
        r.start()
        assert r.child.call("digest", addr=r.at(3), length=PAGE) == r.expect(3, 1)
        held, _ = held_read(r, 4)
        r.child.begin("abort", directory=str(tmp_path))
        assert r.child.process.wait(DEADLINE) == -signal.SIGABRT
        (core,) = tmp_path.glob("core*")
        assert digest(in_core(core, r.at(3))) == r.expect(3, 1)
        assert in_core(core, r.at(4)) == bytes(PAGE)
        held.set()
        r.finish_in_bulk()
        assert r.pager.counters().dropped == r.pages - 1


# --- the kernel and others need it ------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["digest_sealed", "digest_spliced"], ids=["O_DIRECT", "vmsplice"])
def test_pinned_by_the_kernel(way: str, tmp_path: Path) -> None:
    with rig() as r:
        r.start()
        held = r.server.hold("urgent", r.at(4))
        more = {"path": str(tmp_path / "direct")} if way == "digest_sealed" else {}
        reading = r.child.begin(way, addr=r.at(4), length=PAGE, **more)
        r.server.wait_for("urgent", r.at(4))
        waiting_thread(r.child.process.pid)
        assert not reading.done()
        held.set()
        assert reading.result(DEADLINE) == r.expect(4, 1)


def test_written_from_outside() -> None:
    """process_vm_writev(2) of a part of the page: the rest is the source's."""
    with rig() as r:
        r.start()
        held = r.server.hold("urgent", r.at(4))
        writing = begin(lambda: write_memory(r.child.process.pid, r.at(4) + 100, b"outside"))
        r.server.wait_for("urgent", r.at(4))
        assert not writing.done()
        held.set()
        assert writing.result(DEADLINE) == 7
        expected = bytearray(r.data[4 * PAGE : 5 * PAGE])
        expected[100:107] = b"outside"
        assert r.child.call("digest", addr=r.at(4), length=PAGE) == digest(bytes(expected))


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def write_memory(pid: int, addr: int, data: bytes) -> int:
    """process_vm_writev(2): bytes written."""
    buffer = ctypes.create_string_buffer(data, len(data))
    ours, theirs = _Iovec(ctypes.addressof(buffer), len(data)), _Iovec(addr, len(data))
    libc = ctypes.CDLL(None, use_errno=True)
    written = int(libc.process_vm_writev(pid, ctypes.byref(ours), 1, ctypes.byref(theirs), 1, 0))
    if written < 0:
        raise OSError(ctypes.get_errno(), "process_vm_writev")
    return written


def test_a_debugger_attaches_to_the_waiting_thread() -> None:
    """It stops within the fault, the page comes meanwhile, and it goes on with it."""
    with rig() as r, memory(r.child.process.pid) as mem:
        r.start()
        held, reading = held_read(r, 4)
        tracee = Tracee(waiting_thread(r.child.process.pid))
        tracee.seize(0)
        tracee.interrupt()
        tracee.wait_stop(STOP_MS)
        with pytest.raises(TraceeError, match="Input/output error"):
            mem.read(r.at(4), 8)
        held.set()
        assert read_memory(r.child.process.pid, r.at(4), PAGE) == r.data[4 * PAGE : 5 * PAGE]
        assert not reading.done()
        tracee.detach()
        assert reading.result(DEADLINE) == r.expect(4, 1)


# --- little memory ----------------------------------------------------------------------------------------------


@contextmanager
def swap_on_zram() -> Iterator[None]:
    """64 MiB of compressed memory as swap."""
    control = Path("/sys/class/zram-control")
    if not control.exists():
        lacking("there is no zram", "modprobe zram")
    number = control.joinpath("hot_add").read_text().strip()
    device = f"/dev/zram{number}"
    try:
        Path(f"/sys/block/zram{number}/disksize").write_text(str(64 << 20))
        wait_until(lambda: Path(device).exists(), f"{device} is there")
        subprocess.run(["mkswap", device], check=True, capture_output=True)
        subprocess.run(["swapon", device], check=True, capture_output=True)
        try:
            yield
        finally:
            wait_until(lambda: _swapped_in(device), f"{device} is no swap any more")
    finally:
        control.joinpath("hot_remove").write_text(number)


def _swapped_in(device: str) -> bool:
    """Not where memory is scarce for a moment, or a signal comes; what is left would be swap for the whole machine."""
    return subprocess.run(["swapoff", device], capture_output=True).returncode == 0


def swapped(pid: int, addr: int) -> bool:
    """Bit 62 of /proc/PID/pagemap (proc_pid_pagemap(5))."""
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as file:
        return bool(int.from_bytes(os.pread(file.fileno(), 8, addr // PAGE * 8), "little") >> 62 & 1)


def swap_out(r: Rig, first: int, count: int) -> None:
    """Pages that have just come may lie in another processor's batch, out of reach for a moment (lru_add_drain)."""

    def swap_all() -> bool:
        r.child.call("madvise", addr=r.at(first), length=count * PAGE, advice=MADV_PAGEOUT)
        return all(swapped(r.child.process.pid, r.at(first + page)) for page in range(count))

    wait_until(swap_all, "they are swapped out")


def test_swap() -> None:
    """What came and was swapped out comes back from there, and is not missing; a page beside it is."""
    with rig() as r, swap_on_zram():
        r.start()
        assert r.child.call("digest", addr=r.at(8), length=8 * PAGE) == r.expect(8, 8)
        held, reading = held_read(r, 4)
        swap_out(r, 8, 8)
        assert not reading.done()
        held.set()
        assert reading.result(DEADLINE) == r.expect(4, 1)
        assert r.child.call("digest", addr=r.addr, length=r.length) == r.expect(0, r.pages)
        assert len(r.server.log) == r.pages
        r.finish_in_bulk()


def test_swapped_out_when_it_comes_once_more() -> None:
    """Its second copy, in bulk, must not hide what the process has written and the kernel has swapped out."""
    with rig() as r, swap_on_zram():
        held = r.server.hold("bulk", r.at(0))
        r.start(bulk=True)
        r.server.wait_for("bulk", r.at(0))
        r.child.call("poke", addr=r.at(3), text="mine")
        swap_out(r, 3, 1)
        held.set()
        r.finish_in_bulk()
        assert r.child.call("digest", addr=r.at(3), length=PAGE) == digest(
            b"mine" + r.data[3 * PAGE + 4 : 4 * PAGE]
        )


@contextmanager
def memory_group() -> Iterator[Path]:
    """A memory cgroup (version 1) of the test's own; unless it says so, nothing of it is swapped out."""
    root = Path("/sys/fs/cgroup/memory")
    if not (root / "memory.limit_in_bytes").exists():
        lacking(
            "there is no memory cgroup (version 1)", "mount -t cgroup -o memory memory /sys/fs/cgroup/memory"
        )
    group = root / f"lazyproc-test-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.swappiness").write_text("0")
        yield group
    finally:
        for pid in (group / "cgroup.procs").read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        wait_until(lambda: not (group / "cgroup.procs").read_text(), "nobody is in the group")
        group.rmdir()


def limit(group: Path, pid: int, pages: int) -> None:
    """From now on the process has room for so many pages more."""
    (group / "cgroup.procs").write_text(str(pid))
    used = int((group / "memory.usage_in_bytes").read_text())
    (group / "memory.limit_in_bytes").write_text(str(used + pages * PAGE))


MANY = 2048  # pages; memory is charged in batches (MEMCG_CHARGE_BATCH)


def test_a_memory_limit_that_waits() -> None:
    """With the killer off, pages wait at the door of a full cgroup and come when the limit is raised."""
    with memory_group() as group, rig(MANY) as r:
        (group / "memory.oom_control").write_text("1")
        limit(group, r.child.process.pid, MANY // 4)
        r.start(bulk=True)
        wait_until(lambda: int((group / "memory.failcnt").read_text()) > 0, "the limit is reached")
        assert not r.pager.wait(1)
        assert r.pager.reason == ""
        (group / "memory.limit_in_bytes").write_text("-1")
        r.finish_in_bulk()
        assert r.child.call("digest", addr=r.addr, length=r.length) == r.expect(0, r.pages)


def test_a_memory_limit_that_kills() -> None:
    """Who does not fit is killed by the kernel; the pager drops what was his and goes on."""
    with memory_group() as group, rig(MANY) as r:
        limit(group, r.child.process.pid, MANY // 4)
        r.start(bulk=True)
        assert r.child.process.wait(DEADLINE) == -signal.SIGKILL
        assert r.pager.wait(DEADLINE), r.pager.reason
        assert balanced(r.pager)
        counters = r.pager.counters()
        assert counters.dropped > 0
        assert counters.bulk > 0
        assert r.pager.spaces() == ()
