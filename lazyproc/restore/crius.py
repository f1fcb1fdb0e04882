"""What has to be seen to when the images are a dump of CRIU's."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from lazyproc.facts import replace
from lazyproc.kernel.netfilter import Flow, Hold
from lazyproc.model import PAGE, Checkpoint, InetSocket, MemoryObject, ObjectKind
from lazyproc.pages import PageSource
from lazyproc.pages.eager import Read, eager_pages
from lazyproc.restore.aio import demand_fetched
from lazyproc.restore.sockets import flows_to_hold
from lazyproc.runs import Extents

_END = 1 << 64


def fitted(checkpoint: Checkpoint, source: PageSource) -> Checkpoint:
    """The checkpoint with the pages eager that our restore needs at once: CRIU's is another program and needs others.

    Raises RestoreError for what CRIU carries over in an AIO ring and we do not.
    """
    memory = dict(checkpoint.memory)
    for task in checkpoint.tasks:
        obj = MemoryObject(ObjectKind.TASK, task.vpid)
        if task.mm is not None and obj in memory:
            read = _reader(source, obj)
            demand_fetched(task.vpid, task.mm.vmas, read)
            memory[obj] = _eager_at(Extents.of(memory[obj]), eager_pages(task.mm, task.threads, read))
    return replace(checkpoint, memory=memory)


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
