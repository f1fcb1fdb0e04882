"""What has to be seen to when the images are a dump of CRIU's."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from lazyproc.facts import replace
from lazyproc.kernel import elf
from lazyproc.kernel.netfilter import Flow, Hold
from lazyproc.model import PAGE, Checkpoint, Extent, InetSocket, MemoryObject, Mm, ObjectKind, VmaKind
from lazyproc.pages import PageSource
from lazyproc.pages.eager import Read, eager_pages
from lazyproc.restore.aio import demand_fetched
from lazyproc.restore.sockets import flows_to_hold
from lazyproc.runs import IN_PARENT, LAZY, Extents

_END = 1 << 64
_PARENT_IS_LAZY = bytes(kind | LAZY * bool(kind & IN_PARENT) for kind in range(256))


def fitted(checkpoint: Checkpoint, source: PageSource) -> Checkpoint:
    """The checkpoint with the pages eager that our restore needs at once (CRIU is another program and needs others),
    and with the build id of the vdso, of which CRIU writes all pages.

    Raises RestoreError for what CRIU carries over in an AIO ring and we do not.
    """
    memory, tasks = dict(checkpoint.memory), []
    for task in checkpoint.tasks:
        obj = MemoryObject(ObjectKind.TASK, task.vpid)
        if task.mm is not None and obj in memory:
            read = _reader(source, obj)
            demand_fetched(task.vpid, task.mm.vmas, read)
            memory[obj] = _eager_at(_lazy_in_parents(memory[obj]), eager_pages(task.mm, task.threads, read))
            task = replace(task, mm=replace(task.mm, vdso_build_id=_vdso_build_id(task.mm, read)))
        tasks.append(task)
    return replace(checkpoint, tasks=tuple(tasks), memory=memory)


def _vdso_build_id(mm: Mm, read: Read) -> bytes:
    vdso = next((vma for vma in mm.vmas if vma.kind is VmaKind.VDSO), None)
    return elf.build_id(read(vdso.start, vdso.length)) if vdso else b""


def _lazy_in_parents(memory: Iterable[Extent]) -> Extents:
    """CRIU marks no page as lazy whose content is in a parent."""
    extents = Extents.of(memory)
    return Extents(extents.addrs, extents.counts, extents.kinds.translate(_PARENT_IS_LAZY))


def _eager_at(extents: Extents, pages: Iterable[int]) -> Extents:
    parts, at = [], 0
    for page in sorted(pages):
        parts += [extents.within(at, page), extents.within(page, page + PAGE).as_eager()]
        at = page + PAGE
    return Extents.joined([*parts, extents.within(at, _END)])


def _reader(source: PageSource, obj: MemoryObject) -> Read:
    def read(addr: int, size: int) -> bytes:
        first = addr & -PAGE
        count = (addr + size - first + PAGE - 1) // PAGE
        return source.read(obj, first, count)[addr - first :][:size]

    return read


@contextmanager
def taken_over(checkpoint: Checkpoint, lock: str | None) -> Iterator[Callable[[], None]]:
    """Packets that the dump holds back (`lock` as images.foreign.network_lock gives it) are held back by us instead
    until what the block is given is called; by the dump's rules again when the block ends by an exception.
    """
    flows = [
        Flow(file.resource.protocol, file.resource.local, file.resource.remote)
        for file in checkpoint.files.values()
        if isinstance(file.resource, InetSocket) and file.resource.protocol == socket.IPPROTO_TCP
    ]
    connections = [flow for flow in flows if flow.remote]
    if lock is None or not connections:
        yield lambda: None
        return
    from lazyproc.kernel import criulock  # subprocess: a tree without connections does not need it

    with Hold(f"of_{checkpoint.root.vpid}") as hold:
        hold.add(flows_to_hold(checkpoint))
        with criulock.lifted(connections, lock):
            yield hold.release
