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
from lazyproc.pages import PageSource
from lazyproc.pages.eager import held_futexes
from lazyproc.pages.private import PrivatePages, object_of
from lazyproc.uffd.device import Outcome, Userfaultfd

ZERO_PAGE = bytes(PAGE)


class Beforehand:
    """They are put there through the userfaultfds, behind the pager's back: it finds them there."""

    def __init__(self, pages: PrivatePages, source: PageSource) -> None:
        """Their contents come from `source`, now. Raises what that raises."""
        memory = {each.vpid: each for each in pages.memory}
        self._left: dict[MemoryObject, dict[int, bytes]] = defaultdict(dict)
        for vpid, thread in places(pages.images):
            obj = object_of(memory[vpid])
            for addr in _touched(thread, partial(_read, source, obj)):
                if memory[vpid].covers(addr):
                    self._left[obj][addr & -PAGE] = source.read(obj, addr & -PAGE, 1)

    @property
    def pending(self) -> bool:
        return bool(self._left)

    def place(self, userfaultfds: Mapping[int, int]) -> None:
        """As many as can be: until its memory is registered a process has room for none. Raises OSError."""
        for obj, pages in list(self._left.items()):
            device = Userfaultfd.from_fd(userfaultfds[obj.id])
            left = {addr: data for addr, data in pages.items() if not _placed(device, addr, data)}
            if left:
                self._left[obj] = left
            else:
                del self._left[obj]


def _placed(device: Userfaultfd, addr: int, data: bytes) -> bool:
    done = device.zeropage(addr, PAGE) if data == ZERO_PAGE else device.copy(addr, data)
    return done.outcome in (Outcome.INSTALLED, Outcome.PRESENT)


def _touched(thread: Places, read: Callable[[int, int], bytes]) -> set[int]:
    found = {thread.clear_child_tid, thread.fs_base, thread.sp}
    if thread.rseq:
        found |= {thread.rseq, thread.rseq + max(thread.rseq_size, 1) - 1}
    if thread.robust_list:
        found |= {thread.robust_list, *held_futexes(thread.robust_list, read)}
    return found


def _read(source: PageSource, obj: MemoryObject, addr: int, length: int) -> bytes:
    """What is there, and zeros for what is nowhere."""
    start = addr & -PAGE
    count = (addr + length - start + PAGE - 1) // PAGE
    return source.read(obj, start, count)[addr - start : addr - start + length]
