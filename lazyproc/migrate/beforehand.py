"""Pages that are in place before a tree that CRIU restores runs: the kernel touches them where it cannot wait.

A thread that ends while its tid word, its robust list or a mutex that it holds is missing causes no userfaultfd event:
its joiner hangs (docs/traps.md). CRIU leaves these pages out like all others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial

from lazyproc.images.lazy import Places, places
from lazyproc.model import PAGE, MemoryObject
from lazyproc.pages.eager import held_futexes
from lazyproc.pages.private import PrivatePages, object_of
from lazyproc.uffd.device import Outcome, Userfaultfd

ZERO_PAGE = bytes(PAGE)


class Beforehand:
    """They are put there through the userfaultfds, behind the pager's back: it finds them there."""

    def __init__(self, pages: PrivatePages) -> None:
        """`pages` has to stay open until all are in place. Raises ImageError."""
        self._pages = pages
        memory = {each.vpid: each for each in pages.memory}
        wanted: dict[int, set[int]] = defaultdict(set)
        for vpid, thread in places(pages.images):
            read = partial(_read, pages, object_of(memory[vpid]))
            wanted[vpid] |= {addr & -PAGE for addr in _touched(thread, read) if memory[vpid].covers(addr)}
        self._left = {object_of(memory[vpid]): sorted(addrs) for vpid, addrs in wanted.items() if addrs}

    @property
    def pending(self) -> bool:
        return bool(self._left)

    def place(self, userfaultfds: Mapping[int, int]) -> None:
        """As many as can be: until its memory is registered a process has room for none. Raises OSError."""
        left = {}
        for obj, addrs in self._left.items():
            device = Userfaultfd.from_fd(userfaultfds[obj.id])
            if rest := [addr for addr in addrs if not self._placed(device, obj, addr)]:
                left[obj] = rest
        self._left = left

    def _placed(self, device: Userfaultfd, obj: MemoryObject, addr: int) -> bool:
        data = self._pages.read(obj, addr, 1)
        done = device.zeropage(addr, PAGE) if data == ZERO_PAGE else device.copy(addr, data)
        return done.outcome in (Outcome.INSTALLED, Outcome.PRESENT)


def _touched(thread: Places, read: Callable[[int, int], bytes]) -> set[int]:
    found = {thread.clear_child_tid, thread.fs_base, thread.sp}
    if thread.rseq:
        found |= {thread.rseq, thread.rseq + max(thread.rseq_size, 1) - 1}
    if thread.robust_list:
        found |= {thread.robust_list, *held_futexes(thread.robust_list, read)}
    return found


def _read(pages: PrivatePages, obj: MemoryObject, addr: int, length: int) -> bytes:
    """What is there, and zeros for what is nowhere."""
    start = addr & -PAGE
    count = (addr + length - start + PAGE - 1) // PAGE
    return pages.read(obj, start, count)[addr - start : addr - start + length]
