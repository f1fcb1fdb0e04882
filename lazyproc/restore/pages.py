"""Which memory is lazy, and the pages that have to be there before the first instruction."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from lazyproc.errors import RestoreError
from lazyproc.kernel.remote import Call
from lazyproc.kernel.sys import pidfd_getfd
from lazyproc.model import PAGE, Checkpoint, Extent, MemoryObject, ObjectKind, Vma, VmaKind
from lazyproc.pages import PageSource
from lazyproc.restore.site import Site
from lazyproc.uffd.device import Userfaultfd

O_NONBLOCK_CLOEXEC = os.O_NONBLOCK | os.O_CLOEXEC
PIECE = 256  # pages read and written at a time: 1 MiB
ZERO_PAGE = bytes(PAGE)


@dataclass(frozen=True, slots=True)
class LazyRange:
    """A registered range of a task: `length` bytes at `addr` hold the pages of `object` from `object_addr` on."""

    vpid: int
    addr: int
    length: int
    object: MemoryObject
    object_addr: int
    huge: bool


def lazy_ranges(checkpoint: Checkpoint) -> Iterator[LazyRange]:
    """What can be lazy: private anonymous memory that is not locked, and shared objects marked so."""
    for task in checkpoint.tasks:
        for vma in task.mm.vmas if task.mm else ():
            if vma.kind is VmaKind.ANON and "lo" not in vma.vm_flags:
                obj = MemoryObject(ObjectKind.TASK, task.vpid)
                yield LazyRange(task.vpid, vma.start, vma.length, obj, vma.start, vma.huge_pages > 0)
            elif vma.kind is VmaKind.SHARED and checkpoint.shared[vma.object_id].lazy:
                obj = MemoryObject(ObjectKind.SHARED, vma.object_id)
                yield LazyRange(task.vpid, vma.start, vma.length, obj, vma.offset, False)


def register(
    sites: Mapping[int, Site], checkpoint: Checkpoint, stack: ExitStack
) -> tuple[dict[int, int], tuple[LazyRange, ...]]:
    """A userfaultfd in every task that has lazy ranges, taken over by us and registered. Closed by `stack`."""
    ranges = tuple(lazy_ranges(checkpoint))
    userfaultfds = {}
    for vpid, site in sites.items():
        mine = [r for r in ranges if r.vpid == vpid]
        if not mine:
            continue
        (theirs,) = site.run(Call("userfaultfd", (O_NONBLOCK_CLOEXEC,)))
        fd = userfaultfds[vpid] = pidfd_getfd(site.pidfd, theirs)
        stack.callback(os.close, fd)
        site.run(Call("close", (theirs,)))
        device = Userfaultfd.from_fd(fd)
        device.api()
        for r in mine:
            device.register(r.addr, r.length)
    return userfaultfds, ranges


def fill(
    sites: Mapping[int, Site],
    checkpoint: Checkpoint,
    source: PageSource,
    userfaultfds: Mapping[int, int],
    objects: Mapping[int, int],
) -> None:
    """Put the eager pages in place; without userfaultfds that is every page there is."""
    for obj, extents in checkpoint.memory.items():
        wanted = [extent for extent in extents if not extent.lazy or not userfaultfds]
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


def _fill_task(site: Site, obj: MemoryObject, extents: Sequence[Extent], source: PageSource, uffd: int) -> None:
    """Registered pages by UFFDIO_COPY (a write would wait for a pager), the others past their protection."""
    assert site.task.mm is not None
    device = Userfaultfd.from_fd(uffd) if uffd >= 0 else None
    for addr, data in _pieces(extents, source, obj):
        vma = _vma_at(site.task.mm.vmas, addr)
        if device is not None and vma.kind is VmaKind.ANON and "lo" not in vma.vm_flags:
            device.copy(addr, data)
        elif data != ZERO_PAGE * (len(data) // PAGE) or vma.kind is not VmaKind.ANON:
            site.memory.write(addr, data)


def _vma_at(vmas: Sequence[Vma], addr: int) -> Vma:
    return next(vma for vma in vmas if vma.start <= addr < vma.end)
