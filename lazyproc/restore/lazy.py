"""A built tree's missing pages handed to a pager."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from lazyproc.errors import LazyprocError
from lazyproc.kernel import sys as kernel
from lazyproc.model import Extent, MemoryObject
from lazyproc.restore.pages import LazyRange
from lazyproc.restore.tree import BuiltTree
from lazyproc.uffd.pager import Pager


def pager_of(tree: BuiltTree, *, trace: bool = False) -> Pager:
    """A pager that knows the tree's processes and which of their pages are there already; not started."""
    pager = Pager(trace=trace)
    spaces = {vpid: pager.add_space(os.dup(fd)) for vpid, fd in tree.userfaultfds.items()}
    for r in tree.lazy:
        pager.add_region(spaces[r.vpid], r.addr, r.length, r.object, r.object_addr)
    count = 0
    for obj, extents in tree.checkpoint.memory.items():
        eager = [extent for extent in extents if not extent.lazy]
        count += sum(extent.count for extent in eager)
        for extent in _inside(eager, [r for r in tree.lazy if r.object == obj]):
            pager.mark_installed(obj, extent.addr, extent.count)
    pager.add_eager(count)
    return pager


def _inside(extents: Sequence[Extent], ranges: Sequence[LazyRange]) -> Iterator[Extent]:
    for extent in extents:
        if any(r.object_addr <= extent.addr < r.object_addr + r.length for r in ranges):
            yield extent


def finish(pager: Pager, tree: BuiltTree) -> None:
    """Every page is there: the kernel serves the memory alone again, in huge pages where the source had them."""
    pids = {vpid: site.pid for vpid, site in tree.sites.items()}
    pidfds: dict[int, int] = {}
    try:
        for r in tree.lazy:
            if r.huge and r.vpid not in pidfds:
                pidfds[r.vpid] = kernel.pidfd_open(pids[r.vpid])
        pager.finish((pidfds[r.vpid], r.addr, r.length) for r in tree.lazy if r.vpid in pidfds and r.huge)
    except ProcessLookupError as error:
        raise LazyprocError("the process has ended", where="collapse") from error
    finally:
        for fd in pidfds.values():
            os.close(fd)


def lazy_map(memory: dict[MemoryObject, tuple[Extent, ...]]) -> dict[MemoryObject, tuple[Extent, ...]]:
    """The lazy extents alone."""
    return {obj: tuple(e for e in extents if e.lazy) for obj, extents in memory.items()}
