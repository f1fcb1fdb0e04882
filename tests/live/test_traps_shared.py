"""Shared memory of restored processes. A page of it is missing once for all of them, and whoever reaches the object
past a registered mapping would read zeros: only what nothing but mappings can reach is lazy."""

from __future__ import annotations

import mmap
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lazyproc.kernel import proc
from lazyproc.kernel._core import ffi
from lazyproc.kernel.sys import read_memory, syscall
from lazyproc.kernel.visit import call_in
from lazyproc.model import PAGE, MemFd, MemoryObject, ObjectKind, SharedKind, SharedMemory
from lazyproc.restore.pages import LazyRange
from tests.live.arrivals import Arrival, arriving, leave, wait_for_fault
from tests.live.programs import Phase, wait_until

FIRST = 3  # the page that both processes look at first, as in trap_shared.c
PAGES = 16
SYS_SHMAT, SYS_SHMCTL, SYS_SHMDT = 30, 31, 67
IPC_RMID, SHM_RDONLY = 0, 0o10000


@contextmanager
def arrived(directory: Path, *, start: bool = True, hold: bool = False) -> Iterator[Arrival]:
    left = leave("trap_shared", directory=directory)
    (segment,) = (s for s in left.checkpoint().shared.values() if s.kind is SharedKind.SYSV)
    (anonymous,) = (s for s in left.checkpoint().shared.values() if s.kind is SharedKind.ANON)
    late = {MemoryObject(ObjectKind.SHARED, anonymous.id): FIRST * PAGE} if hold else {}
    remove(segment)  # the original: its number must be free
    try:
        with arriving(left, start=start, late=late) as it:
            yield it
    finally:
        remove(segment)


def remove(segment: SharedMemory) -> None:
    with suppress(OSError):  # removed already
        syscall(SYS_SHMCTL, segment.sysv_shmid, IPC_RMID, 0)


def object_of(it: Arrival, kind: SharedKind, name: str = "") -> SharedMemory:
    (found,) = (s for s in it.tree.checkpoint.shared.values() if s.kind is kind and s.name == name)
    return found


def content(it: Arrival, shared: SharedMemory) -> bytes:
    return it.source.read(MemoryObject(ObjectKind.SHARED, shared.id), 0, PAGES)


def test_every_kind_of_shared_memory_goes_on(tmp_path: Path) -> None:
    with arrived(tmp_path) as it:
        it.go()
        counters = it.end_well()
        assert counters.urgent >= 2 * PAGES  # the anonymous object and the memfd without a descriptor


def test_two_processes_want_the_same_missing_page_at_the_same_time(tmp_path: Path) -> None:
    """A copy through the userfaultfd of one of them wakes nobody who waits in the other."""
    with arrived(tmp_path, hold=True) as it:
        root = it.tree.checkpoint.root.vpid
        (child,) = (site.pid for vpid, site in it.tree.sites.items() if vpid != root)
        os.kill(child, signal.SIGTERM)
        it.wait_for(FIRST * PAGE)
        it.go()
        wait_until(lambda: it.watch.read().phase is Phase.FINAL, "the root is at its look")
        wait_for_fault(it.pid)
        it.let_come(FIRST * PAGE)
        it.end_well()
        key = MemoryObject(ObjectKind.SHARED, object_of(it, SharedKind.ANON).id).key
        waited = [fault for fault in it.faults() if (fault.object, fault.object_addr) == (key, FIRST * PAGE)]
        assert len({fault.vpid for fault in waited}) == 2


def test_what_one_process_removes_before_it_has_come_is_gone_for_both(tmp_path: Path) -> None:
    with arrived(tmp_path) as it:
        (at,) = (r for r in it.tree.lazy if r.vpid == it.tree.checkpoint.root.vpid and shows_anonymous(it, r))
        call_in(it.pid, "madvise", at.addr + FIRST * PAGE, 2 * PAGE, mmap.MADV_REMOVE)
        call_in(it.pid, "madvise", at.addr + 8 * PAGE, PAGE, mmap.MADV_DONTNEED)
        data = bytearray(content(it, object_of(it, SharedKind.ANON)))
        data[FIRST * PAGE : (FIRST + 2) * PAGE] = bytes(2 * PAGE)
        assert {read_memory(site.pid, at.addr, PAGES * PAGE) for site in it.tree.sites.values()} == {
            bytes(data)
        }
        assert it.pager.counters().dropped == 2


def shows_anonymous(it: Arrival, r: LazyRange) -> bool:
    return r.object == MemoryObject(ObjectKind.SHARED, object_of(it, SharedKind.ANON).id)


def test_a_memfd_with_a_descriptor_has_its_content_before_any_page_comes(tmp_path: Path) -> None:
    with arrived(tmp_path, start=False) as it:
        named, nameless = (object_of(it, SharedKind.MEMFD, name) for name in ("named", "nameless"))
        assert (named.lazy, nameless.lazy) == (False, True)
        (descriptor,) = (
            d.fd
            for d in it.tree.checkpoint.root.descriptors
            if it.tree.checkpoint.files[d.file_id].resource == MemFd(named.id)
        )
        fd = os.open(f"/proc/{it.pid}/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
        with (
            open(fd, "rb", buffering=0) as file,
            mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ) as mapping,
        ):
            assert os.pread(file.fileno(), PAGES * PAGE, 0) == content(it, named)
            assert mapping[:] == content(it, named)
        assert registered_objects(it) == {"/dev/zero", "/memfd:nameless"}


def registered_objects(it: Arrival) -> set[str]:
    """The shared objects of which some mapping of the root is registered with a userfaultfd."""
    return {
        entry.entry.path
        for entry in proc.smaps(proc.read(it.pid, "smaps"))
        if "um" in entry.vm_flags and entry.entry.perms.endswith("s")
    }


def test_a_sysv_segment_has_its_content_before_any_page_comes(tmp_path: Path) -> None:
    with arrived(tmp_path, start=False) as it:
        segment = object_of(it, SharedKind.SYSV)
        addr = syscall(SYS_SHMAT, segment.sysv_shmid, 0, SHM_RDONLY)
        try:
            assert ffi.buffer(ffi.cast("char *", addr), PAGES * PAGE)[:] == content(it, segment)
        finally:
            syscall(SYS_SHMDT, addr)
