"""Which memory is lazy, and the pages that have to be there before the first instruction."""

from __future__ import annotations

import fcntl
import operator
import os
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from lazyproc.errors import ImageError, RestoreError
from lazyproc.facts import replace
from lazyproc.kernel.remote import Call
from lazyproc.kernel.sys import pidfd_getfd
from lazyproc.kernel.tracee import Memory
from lazyproc.model import (
    PAGE,
    Checkpoint,
    Extent,
    MemoryObject,
    ObjectKind,
    SharedMemory,
    Task,
    Vma,
    VmaKind,
)
from lazyproc.pages import PageSource
from lazyproc.restore.memory import VDSO_KINDS
from lazyproc.restore.site import Site
from lazyproc.runs import Extents
from lazyproc.uffd.device import Outcome, Userfaultfd
from lazyproc.uffd.pager import Pager, register_regions

O_NONBLOCK_CLOEXEC = os.O_NONBLOCK | os.O_CLOEXEC
ABOVE_TRANSPORT = 3  # see the nursery's start: it uses two numbers above its socket
PIECE = 256  # pages read and written at a time: 1 MiB
ZERO_PAGE = bytes(PAGE)
ATTEMPTS = 16
ADDRESS_LIMIT = 1 << 64
_MADE_ANEW = (*VDSO_KINDS, VmaKind.AIO)


class LazyRange(NamedTuple):
    """A registered range of a task: `length` bytes at `addr` hold the pages of `object` from `object_addr` on.

    A tuple, not a dataclass: there may be thousands of them.
    """

    vpid: int
    addr: int
    length: int
    object: MemoryObject
    object_addr: int
    huge: bool


def arranged(checkpoint: Checkpoint, *, lazy: bool) -> Checkpoint:
    """The checkpoint with extents that end where a mapping ends, lazy only in memory that can be.

    Images join neighbours of different mappings, CRIU marks pages lazy by another rule than ours, and the kernel
    makes vdso and AIO rings anew. Raises ImageError for a page that lies in no mapping.
    """
    mappings = {task.vpid: task.mm.vmas for task in checkpoint.tasks if task.mm}
    memory = {}
    for obj, runs in checkpoint.memory.items():
        extents = Extents.of(runs)
        if obj.kind is ObjectKind.TASK:
            memory[obj] = Extents.joined(_cut(extents, mappings.get(obj.id, ()), lazy, f"pid {obj.id}"))
        else:
            memory[obj] = extents if lazy and checkpoint.shared[obj.id].lazy else extents.as_eager()
    return replace(checkpoint, memory=memory)


def _cut(extents: Extents, vmas: Sequence[Vma], lazy: bool, where: str) -> Iterator[Extents]:
    """What lies in each mapping; the work does not grow with the number of extents in it."""
    at, first, starts = 0, 0, extents.addrs
    for vma in vmas:
        reaches = starts[first - 1] + extents.counts[first - 1] * PAGE if first else 0  # the one before
        # Most mappings have nothing before them, and many nothing in them.
        if reaches > at or (first < len(starts) and starts[first] < vma.start):
            _demand_none(extents.within(at, vma.start), where)
        last = bisect_left(starts, vma.end, first)
        if (last > first or reaches > vma.start) and vma.kind not in _MADE_ANEW:
            inside = extents.within(vma.start, vma.end)
            yield inside if lazy and vma.may_be_lazy else inside.as_eager()
        at, first = vma.end, last
    _demand_none(extents.within(at, ADDRESS_LIMIT), where)


def _demand_none(stray: Extents, where: str) -> None:
    if stray:
        raise ImageError(
            f"a page at {stray[0].addr:#x} lies in no mapping", where=where, remedy="dump it again"
        )


def lazy_ranges(task: Task, shared: Mapping[int, SharedMemory]) -> Iterator[LazyRange]:
    """What can be lazy: private anonymous memory that is not locked, and shared objects marked so."""
    obj = MemoryObject(ObjectKind.TASK, task.vpid)
    for vma in task.mm.vmas if task.mm else ():
        if vma.may_be_lazy:
            yield LazyRange(task.vpid, vma.start, vma.length, obj, vma.start, vma.huge_pages > 0)
        elif vma.kind is VmaKind.SHARED and shared[vma.object_id].lazy:
            of_many = MemoryObject(ObjectKind.SHARED, vma.object_id)
            yield LazyRange(task.vpid, vma.start, vma.length, of_many, vma.offset, False)


def rows_of(ranges: Iterable[LazyRange]) -> array[int]:
    """As the pager takes them."""
    rows = array("Q")
    for _, addr, length, obj, object_addr, _ in ranges:
        rows.extend((addr, length, obj.id << 8 | obj.kind, object_addr))
    return rows


def keep_userfaultfd(site: Site, pager: Pager) -> None:
    """With the next run the task makes a userfaultfd, and keeps it as an *anchor*, on a number out of the program's
    way: when the last reference to a userfaultfd goes, missing pages read as zeros. So they wait as long as the process
    lives, whatever becomes of us.

    With it go the pager's ledger, which tells whoever completes the tree then what never came from what was dropped and
    which the task may only read, and the pager's cradle, which is to the children that it forks what this is to itself.
    """
    site.run_later(Call("userfaultfd", (O_NONBLOCK_CLOEXEC,)), check=_demand_lowest)
    lowest = site.transport_fd + ABOVE_TRANSPORT
    site.anchor, site.ledger, site.cradle = range(lowest, lowest + 3)
    with read_only(pager.ledger) as ledger:
        site.receive_later([ledger, pager.cradle], [1, 2])
    for fd, number in enumerate((site.anchor, site.ledger, site.cradle)):
        _move_out_of_the_way(site, fd, number)


def lend_userfaultfd(site: Site) -> None:
    """With the next run the task makes a userfaultfd, for `register`, and keeps it no longer than that."""
    site.run_later(Call("userfaultfd", (O_NONBLOCK_CLOEXEC,)), check=_demand_lowest)
    site.anchor = site.transport_fd + ABOVE_TRANSPORT
    _move_out_of_the_way(site, 0, site.anchor)


def take_back(site: Site) -> None:
    """The userfaultfd that was lent goes from the task with its next run."""
    site.run_later(Call("close", (site.anchor,)))
    site.anchor = -1


def _move_out_of_the_way(site: Site, fd: int, number: int) -> None:
    """A descriptor gets a number above all that the program uses; `number` is the lowest free one there."""

    def demand_free(results: list[int]) -> None:
        if results != [number]:
            raise RestoreError(
                f"has {number} open already", where=f"pid {site.task.vpid}", remedy="report it"
            )

    site.run_later(Call("fcntl", (fd, fcntl.F_DUPFD_CLOEXEC, number)), check=demand_free)
    site.run_later(Call("close", (fd,)))


def _demand_lowest(results: list[int]) -> None:
    if results != [0]:
        raise RestoreError("a descriptor table was not empty", where="userfaultfd", remedy="report it")


def register(site: Site, ranges: Iterable[LazyRange], stack: ExitStack) -> int:
    """The userfaultfd that a task keeps, shared with us and registered. Ours is closed by `stack`."""
    fd = pidfd_getfd(site.pidfd, site.anchor)
    stack.callback(os.close, fd)
    Userfaultfd.from_fd(fd).api()
    site.regions = rows_of(ranges)
    register_regions(fd, site.regions)
    return fd


@contextmanager
def read_only(ledger: int) -> Iterator[int]:
    """The ledger once more, for reading only; its mode keeps the task's user from opening it again for writing."""
    os.fchmod(ledger, 0o600)
    fd = os.open(f"/proc/self/fd/{ledger}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def fill(
    sites: Mapping[int, Site],
    checkpoint: Checkpoint,
    source: PageSource,
    userfaultfds: Mapping[int, int],
    objects: Mapping[int, int],
) -> None:
    """Put the eager pages in place."""
    for obj, extents in checkpoint.memory.items():
        wanted = Extents.of(extents).where(lazy=False)
        if obj.kind is ObjectKind.SHARED:
            _fill_object(obj, wanted, source, objects[obj.id])
        else:
            _fill_task(sites[obj.id], obj, wanted, source, userfaultfds.get(obj.id, -1))


def _pieces(extents: Sequence[Extent], source: PageSource, obj: MemoryObject) -> Iterator[tuple[int, bytes]]:
    for extent in extents:
        for addr in range(extent.addr, extent.end, PIECE * PAGE):
            count = min(PIECE, (extent.end - addr) // PAGE)
            yield addr, source.read(obj, addr, count)


def _fill_object(obj: MemoryObject, extents: Sequence[Extent], source: PageSource, fd: int) -> None:
    for addr, data in _pieces(extents, source, obj):
        written = os.pwrite(fd, data, addr)
        if written != len(data):
            raise RestoreError(
                f"only {written} of {len(data)} bytes could be written at {addr:#x}",
                where=f"shared memory object {obj.id}",
                remedy="free memory on this host",
            )


def _fill_task(
    site: Site, obj: MemoryObject, extents: Sequence[Extent], source: PageSource, uffd: int
) -> None:
    """Registered pages by UFFDIO_COPY (a write would wait for a pager), the others past their protection."""
    assert site.task.mm is not None
    device = Userfaultfd.from_fd(uffd) if uffd >= 0 else None
    for addr, data in _pieces(extents, source, obj):
        vma = _vma_at(site.task.mm.vmas, addr)
        if device is not None and vma.may_be_lazy:
            place(device, site.memory, addr, data, f"pid {obj.id}")
        elif data != ZERO_PAGE * (len(data) // PAGE) or vma.kind is not VmaKind.ANON:
            site.memory.write(addr, data)


def place(device: Userfaultfd, memory: Memory, addr: int, data: bytes, where: str) -> None:
    """All of it; where the kernel wants another attempt (its own work on the page tables) it gets some.

    A page that is there already holds zeros: somebody has looked at it from outside before it was registered (ps(1)
    reads the arguments of every process). It is written to, which waits for no pager. Raises RestoreError.
    """
    for _ in range(ATTEMPTS + len(data) // PAGE):
        placed = device.copy(addr, data)
        done = placed.length
        if placed.outcome is Outcome.PRESENT:
            memory.write(addr + done, data[done : done + PAGE])
            done += PAGE
        elif placed.outcome is Outcome.GONE:
            break
        addr, data = addr + done, data[done:]
        if not data:
            return
    raise RestoreError(f"pages at {addr:#x}: {placed.outcome.value}", where=where, remedy="report it")


def _vma_at(vmas: Sequence[Vma], addr: int) -> Vma:
    """`arranged` has seen that there is one."""
    return vmas[bisect_right(vmas, addr, key=_start_of) - 1]


_start_of = operator.attrgetter("start")
