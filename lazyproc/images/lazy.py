"""What `criu restore --lazy-pages` leaves to userfaultfd, read from a folder of images. Pure.

Whatever else a process has is CRIU's business: images of things that lazyproc cannot restore are fine here.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from lazyproc.errors import ImageError
from lazyproc.facts import dataclass
from lazyproc.images.files import kind_of, record, records
from lazyproc.images.pb import files_pb2 as fdinfo
from lazyproc.images.pb import process_pb2 as pb
from lazyproc.model import Extent

PSTREE = "pstree.img"
_MAP_PRIVATE, _MAP_ANONYMOUS, _MAP_LOCKED, _MAP_HUGETLB = 0x2, 0x20, 0x2000, 0x40000
_VSYSCALL, _VDSO, _VVAR = 1 << 2, 1 << 3, 1 << 12  # status bits of criu/include/image.h

Ranges = tuple[tuple[int, int], ...]
"""(start, end) in bytes, ascending; neighbours are one."""


@dataclass(frozen=True, slots=True)
class LazyMemory:
    """Of one process, by its number in the images. A process without memory (`ranges` None) is a zombie."""

    vpid: int
    ranges: Ranges | None

    def covers(self, addr: int) -> bool:
        ranges = self.ranges or ()
        at = bisect_right(ranges, addr, key=_start) - 1
        return at >= 0 and addr < ranges[at][1]

    def demand_covers(self, lazy: Sequence[Extent]) -> None:
        """Raises ImageError for a page that is marked lazy and lies outside: nobody would bring it."""
        ranges = self.ranges or ()
        for extent in lazy:
            at = bisect_right(ranges, extent.addr, key=_start) - 1
            if at < 0 or extent.end > ranges[at][1]:
                raise ImageError(
                    f"a page at {extent.addr:#x} is lazy, and its mapping cannot be",
                    where=f"pagemap-{self.vpid}.img",
                    remedy="take the checkpoint again, or restore it without --lazy-pages",
                )


def lazy_memory(images: Mapping[str, bytes]) -> tuple[LazyMemory, ...]:
    """Of every process of the tree, in the order of pstree.img. Raises ImageError."""
    found = tuple(
        LazyMemory(entry.pid, _ranges(images, entry.pid))
        for entry, _ in records(images, PSTREE, pb.pstree_entry)
    )
    if not found:
        raise ImageError("has no process", where=PSTREE, remedy="name a folder that `criu dump` has filled")
    return found


class Places(NamedTuple):
    """Where a thread has what the kernel touches on its behalf; 0: nothing there."""

    clear_child_tid: int
    robust_list: int
    rseq: int
    rseq_size: int
    fs_base: int
    sp: int


def places(images: Mapping[str, bytes]) -> Iterator[tuple[int, Places]]:
    """Of every thread that lives, with the number of its process."""
    for entry, _ in records(images, PSTREE, pb.pstree_entry):
        for tid in entry.threads if f"mm-{entry.pid}.img" in images else ():
            core = record(images, f"core-{tid}.img", pb.core_entry)
            info, rest = core.thread_info, core.thread_core
            yield (
                entry.pid,
                Places(
                    info.clear_tid_addr,
                    rest.futex_rla,
                    rest.rseq_entry.rseq_abi_pointer,
                    rest.rseq_entry.rseq_abi_size,
                    info.gpregs.fs_base,
                    info.gpregs.sp,
                ),
            )


def highest_descriptor(images: Mapping[str, bytes]) -> int:
    """The highest number that a process of the tree has open, -1 when there is none."""
    tables = [name for name in images if kind_of(name) == "fdinfo"]
    return max(
        (entry.fd for name in tables for entry, _ in records(images, name, fdinfo.fdinfo_entry)), default=-1
    )


def _ranges(images: Mapping[str, bytes], vpid: int) -> Ranges | None:
    name = f"mm-{vpid}.img"
    if name not in images:
        return None
    joined: list[tuple[int, int]] = []
    for start, end in _lazy(record(images, name, pb.mm_entry).vmas):
        if joined and joined[-1][1] == start:
            start = joined.pop()[0]
        joined.append((start, end))
    return tuple(joined)


def _lazy(vmas: Sequence[pb.vma_entry]) -> Iterator[tuple[int, int]]:
    """CRIU's own rule (criu/include/vma.h, vma_entry_can_be_lazy)."""
    wanted, unwanted = _MAP_ANONYMOUS | _MAP_PRIVATE, _MAP_LOCKED | _MAP_HUGETLB
    for vma in vmas:
        ours = vma.status & (_VDSO | _VVAR | _VSYSCALL) == 0
        if ours and vma.flags & (wanted | unwanted) == wanted:
            yield vma.start, vma.end


def _start(span: tuple[int, int]) -> int:
    return span[0]
