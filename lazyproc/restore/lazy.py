"""A built tree's missing pages handed to a pager."""

from __future__ import annotations

import mmap
import os
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from itertools import accumulate

from lazyproc.errors import LazyprocError, NoSuchProcess
from lazyproc.events import Listener, Note
from lazyproc.kernel import proc
from lazyproc.kernel.arch_x86_64 import SYS
from lazyproc.kernel.sys import pidfd_open
from lazyproc.model import Extent, MemoryObject, ObjectKind
from lazyproc.restore.lazytree import ANCHORS, LazyTree, anchor_holders, members
from lazyproc.restore.pages import LazyRange
from lazyproc.restore.tree import BuiltTree
from lazyproc.runs import Extents
from lazyproc.uffd.pager import Pager

ROUNDS = 8


def introduce(pager: Pager, tree: BuiltTree, listener: Listener) -> None:
    """Tell the pager, whose ledger the tree was built with, of its processes and the pages that are there already."""
    for vpid, fd in tree.userfaultfds.items():
        site = tree.sites[vpid]
        pager.add_regions(pager.add_space(os.dup(fd), vpid, site.pid), site.regions)
    if any(r.object.kind is ObjectKind.SHARED for r in tree.lazy):
        watch_removals(pager, listener)
    count = 0
    lazy = defaultdict[MemoryObject, list[LazyRange]](list)  # there may be thousands of each
    for each in tree.lazy:
        lazy[each.object].append(each)
    for obj, extents in tree.checkpoint.memory.items():
        eager = Extents.of(extents).where(lazy=False)
        count += sum(eager.counts)
        for extent in _inside(eager, lazy.get(obj, ())):
            pager.mark_installed(obj, extent.addr, extent.count)
    pager.add_eager(count)


def watch_removals(pager: Pager, listener: Listener) -> None:
    try:
        pager.watch_removals()
    except OSError as error:
        listener(
            Note(
                f"shared memory: what a process removes (MADV_REMOVE) before it has come is not seen here and comes "
                f"all the same ({error.strerror}; see lazyproc check)"
            )
        )


def note_removals(pager: Pager, tree: LazyTree) -> None:
    """Tell a pager that takes over of the calls that were made while no pager was there: they have waited since."""
    for pid in members(tree):
        with suppress(NoSuchProcess):
            for tid in proc.task_ids(pid):
                blocked = proc.syscall(proc.read(pid, f"task/{tid}/syscall"))
                if blocked and blocked.nr == SYS["madvise"]:
                    start, length, advice, *_ = blocked.args
                    if advice == mmap.MADV_REMOVE:
                        pager.note_removal(pid, tid, start, length)


def _inside(extents: Iterable[Extent], ranges: Iterable[LazyRange]) -> Iterator[Extent]:
    """Extents in order that begin in one of the ranges."""
    spans = [(r.object_addr, r.object_addr + r.length) for r in ranges]
    spans.sort()
    starts = [start for start, _ in spans]
    ends = list(accumulate((end for _, end in spans), max))  # of all that begin no later
    for extent in extents:
        at = bisect_right(starts, extent.addr)
        if at and extent.addr < ends[at - 1]:
            yield extent


def finish(pager: Pager, tree: LazyTree) -> None:
    """Every page is there: the kernel serves the memory alone again, in huge pages where the source had them.

    The anchors go between the pager's two steps: memory that grew while it was registered is let go by that.
    """
    pager.release()
    drop_anchors(tree)
    with ExitStack() as stack:
        pidfds = {}
        for task in tree.tasks:
            with suppress(ProcessLookupError):
                pidfds[task.pid] = pidfd_open(task.pid)
                stack.callback(os.close, pidfds[task.pid])
        pager.finish((pidfds[pid], addr, length) for pid, addr, length in tree.huge if pid in pidfds)


def drop_anchors(tree: LazyTree) -> None:
    """In the tasks, and in the children they have forked meanwhile, which have inherited them: parents first, and
    again until nobody has one, since a child may be forked while we are on our way.
    """
    failed: LazyprocError | None = None
    for _ in range(ROUNDS):
        holders = [holder for name in ANCHORS for holder in anchor_holders(tree, name)]
        if not holders:
            return
        for pid, number in holders:
            try:
                _close_in(pid, number)
            except LazyprocError as error:  # it may just be ending
                failed = error
    if failed is not None:
        raise failed


def _close_in(pid: int, number: int) -> None:
    from lazyproc.kernel.visit import call_in  # the tree runs by now

    call_in(pid, "close", number)
