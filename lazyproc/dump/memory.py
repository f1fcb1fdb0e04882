"""Address spaces: what is mapped, and which pages have content that only this process has."""

from __future__ import annotations

import mmap
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from lazyproc.dump import aio
from lazyproc.dump.registry import Refused, Registry
from lazyproc.errors import NoSuchProcess
from lazyproc.facts import replace
from lazyproc.kernel import proc
from lazyproc.kernel import sys as kernel
from lazyproc.kernel import tracee as ptrace
from lazyproc.model import DROPPABLE, PAGE, Extent, Vma, VmaKind

# VmFlags of mappings that cannot be moved, Documentation/filesystems/proc.rst
REFUSED_FLAGS = {
    "ht": ("is a huge page mapping (hugetlbfs)", "let the program use transparent huge pages"),
    "io": ("maps device memory", "let the program close the device"),
    "pf": ("maps memory that is not made of pages (a device or ring)", "let the program close it"),
    "um": (
        "is registered with a userfaultfd: of a restore that still brings its pages, or of the program's own",
        "wait until every page has come, or let the program close it",
    ),
    "uw": ("is write-protected by a userfaultfd of the program's own", "let the program close it"),
    "ss": ("is a shadow stack", "start the program without shadow stacks"),
    "sl": ("is sealed by mseal(2)", "start the program without sealing"),
}
SPECIAL = {"[vdso]": VmaKind.VDSO, "[vvar]": VmaKind.VVAR, "[vvar_vclock]": VmaKind.VVAR_VCLOCK}
MAP_GROWSDOWN, MAP_NORESERVE, MAP_DROPPABLE = 0x100, 0x4000, 0x8  # Python 3.11 knows none
ANON_NAME = "[anon:"
RESERVED = 1 << 30  # bytes; what is smaller is not worth a mapping that its neighbour cannot be joined to


def _is_private_memory(entry: proc.MapsEntry) -> bool:
    """Not by the inode: the first SysV segment has number 0."""
    return entry.path not in SPECIAL and (not entry.path or entry.path.startswith("["))


def kind_of(entry: proc.MapsEntry) -> VmaKind:
    """What lies behind a line of /proc/PID/maps. Refused when nothing that can be moved does."""
    if entry.path in SPECIAL:
        return SPECIAL[entry.path]
    if _is_private_memory(entry):
        return VmaKind.ANON
    if entry.path.startswith("anon_inode:"):
        raise Refused(f"is a mapping of {entry.path}", "let the program close it")
    if entry.path == aio.NAME:
        return VmaKind.AIO
    if entry.deleted and (entry.path == "/dev/zero" or entry.path.startswith(("/memfd:", "/SYSV"))):
        return VmaKind.SHARED
    return VmaKind.FILE


def refusal(smaps: proc.SmapsEntry, kind: VmaKind) -> None:
    """Raise Refused when the mapping has a flag, or a protection key, that cannot be reproduced."""
    if kind in SPECIAL.values():
        return
    # For execute-only memory the kernel itself takes a key.
    if smaps.protection_key and smaps.entry.perms != "--xp":
        raise Refused(
            f"has protection key {smaps.protection_key}", "start the program without protection keys"
        )
    for flag, (why, remedy) in REFUSED_FLAGS.items():
        if flag in smaps.vm_flags:
            raise Refused(why, remedy)


def _is_reserved(smaps: proc.SmapsEntry) -> bool:
    """Pages that come into it until the freeze travel with the images, as those of all that is not lazy."""
    entry = smaps.entry
    empty = not (smaps.rss or smaps.swap) and entry.perms == "---p"
    return empty and entry.end - entry.start >= RESERVED and _is_private_memory(entry)


def lazy_bytes(smaps: Iterable[proc.SmapsEntry]) -> int:
    """Of a process's anonymous mappings, used or not, but for what is reserved."""
    private = (each for each in smaps if _is_private_memory(each.entry) and not _is_reserved(each))
    return sum(each.entry.end - each.entry.start for each in private)


def vma_of(smaps: proc.SmapsEntry) -> Vma:
    """One mapping as it would be passed to mmap(2), without the number of what lies behind it."""
    entry, kind = smaps.entry, kind_of(smaps.entry)
    flags = mmap.MAP_PRIVATE if entry.perms[3] == "p" else mmap.MAP_SHARED
    flags |= mmap.MAP_ANONYMOUS if kind is VmaKind.ANON else 0
    flags |= MAP_GROWSDOWN if "gd" in smaps.vm_flags else 0
    flags |= MAP_NORESERVE if "nr" in smaps.vm_flags else 0
    if DROPPABLE in smaps.vm_flags:
        flags += MAP_DROPPABLE - mmap.MAP_PRIVATE
    return Vma(
        start=entry.start,
        end=entry.end,
        prot=sum(bit for letter, bit in zip("rwx", (1, 2, 4), strict=True) if letter in entry.perms),
        flags=flags,
        kind=kind,
        offset=entry.offset if kind in (VmaKind.FILE, VmaKind.SHARED) else 0,
        vm_flags=smaps.vm_flags,
        name=_name(entry.path, kind),
        huge_pages=smaps.anon_huge // PAGE,
        reserved=_is_reserved(smaps),
    )


def _name(path: str, kind: VmaKind) -> str:
    if kind is not VmaKind.ANON:
        return path if kind in SPECIAL.values() else ""
    return path[len(ANON_NAME) : -1] if path.startswith(ANON_NAME) else path


def runs_of(vmas: Iterable[Vma]) -> list[tuple[int, int]]:
    """The address ranges of mappings, in their order; those that touch are one."""
    runs: list[tuple[int, int]] = []
    for vma in vmas:
        if runs and runs[-1][1] == vma.start:
            runs[-1] = runs[-1][0], vma.end
        else:
            runs.append((vma.start, vma.end))
    return runs


def lazy_extents(pid: int, ranges: Iterable[tuple[int, int]], eager: frozenset[int]) -> tuple[Extent, ...]:
    """The pages with content in lazy mappings, without those at the addresses `eager`. Grows with memory.

    Raises NoSuchProcess, also when it has ended meanwhile: what is not found would be taken for zeros, and a scan finds
    less and less of memory that is being given back (fs/proc/task_mmu.c, do_pagemap_scan, holds no mm_users).
    """
    with ptrace.memory(pid) as memory:
        try:
            with _pagemap(pid) as pagemap:
                own = list(_own_pages(pagemap, ranges))
        except (ProcessLookupError, FileNotFoundError):
            raise NoSuchProcess("has ended", where=f"pid {pid}", remedy="see who has killed it") from None
        memory.demand_there()
    return tuple(extent for start, end in own for extent in _without(start, end, eager))


def eager_extents(pid: int, vmas: Sequence[Vma], pages: Iterable[int]) -> tuple[Extent, ...]:
    """The pages with content that are not lazy: of all mappings that cannot be, and those at the addresses `pages`."""
    fixed = [vma for vma in vmas if not vma.may_be_lazy and vma.flags & mmap.MAP_PRIVATE]
    mapped = runs_of(vma for vma in fixed if vma.kind in (VmaKind.FILE, VmaKind.SHARED))
    anonymous = runs_of(vma for vma in fixed if vma.kind is VmaKind.ANON) + _pages_in(vmas, pages)
    with _pagemap(pid) as pagemap:
        found = [*_own_pages(pagemap, mapped, excluded=kernel.PAGE_IS_FILE), *_own_pages(pagemap, anonymous)]
    return tuple(Extent(start, (end - start) // PAGE, lazy=False) for start, end in sorted(found))


def _pages_in(vmas: Sequence[Vma], pages: Iterable[int]) -> list[tuple[int, int]]:
    """The runs of these pages that lie in lazy mappings."""
    starts = [vma.start for vma in vmas]
    runs: list[tuple[int, int]] = []
    for page in sorted(pages):
        at = bisect_right(starts, page) - 1
        if at < 0 or page >= vmas[at].end or not vmas[at].may_be_lazy:
            continue
        if runs and runs[-1][1] == page:
            runs[-1] = runs[-1][0], page + PAGE
        else:
            runs.append((page, page + PAGE))
    return runs


@contextmanager
def _pagemap(pid: int) -> Iterator[int]:
    fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _own_pages(
    pagemap: int, ranges: Iterable[tuple[int, int]], *, excluded: int = 0
) -> Iterator[tuple[int, int]]:
    """Runs of present or swapped pages of private mappings; in those of a file without PAGE_IS_FILE: what was copied
    (fs/proc/task_mmu.c).
    """
    excluded |= kernel.PAGE_IS_PFNZERO | kernel.guard_category()
    anyof = kernel.PAGE_IS_PRESENT | kernel.PAGE_IS_SWAPPED
    for start, end, _ in kernel.pagemap_scan(pagemap, ranges, excluded=excluded, anyof=anyof):
        yield start, end


def with_guards(pid: int, vmas: Sequence[Vma]) -> tuple[Vma, ...]:
    """The mappings with what MADV_GUARD_INSTALL guards in them. Walks all memory, 1.3 ms a GiB."""
    if not kernel.guard_category():
        return tuple(vmas)
    fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return tuple(replace(vma, guards=_guards(fd, vma)) if _may_be_guarded(vma) else vma for vma in vmas)
    finally:
        os.close(fd)


def has_guards(pid: int, smaps: Sequence[proc.SmapsEntry]) -> bool:
    """Whether a running process guards memory by MADV_GUARD_INSTALL."""
    vmas = [vma_of(entry) for entry in smaps if entry.entry.path != "[vsyscall]"]
    return any(vma.guards for vma in with_guards(pid, vmas))


def _may_be_guarded(vma: Vma) -> bool:
    return vma.kind in (VmaKind.ANON, VmaKind.FILE, VmaKind.SHARED)


def _guards(pagemap: int, vma: Vma) -> tuple[tuple[int, int], ...]:
    runs = kernel.pagemap_scan(pagemap, [(vma.start, vma.end)], required=kernel.PAGE_IS_GUARD)
    return tuple((start, end) for start, end, _ in runs)


def _without(start: int, end: int, eager: frozenset[int]) -> Iterator[Extent]:
    """One run as extents, cut at the pages that must be there before the process runs."""
    few = range(start, end, PAGE) if (end - start) // PAGE < len(eager) else sorted(eager)
    for page in (page for page in few if start <= page < end and page in eager):
        if page > start:
            yield Extent(start, (page - start) // PAGE, lazy=True)
        start = page + PAGE
    if start < end:
        yield Extent(start, (end - start) // PAGE, lazy=True)


def shared_extents(fd: int, size: int, *, lazy: bool, start: int = 0) -> tuple[Extent, ...]:
    """The allocated pages of bytes [start, start + size) of a shared memory object (swapped ones too) or a file, by
    SEEK_DATA (mm/shmem.c); their addresses count from `start`, a whole page.
    """
    found = []
    offset, last = start, start + size
    while offset < last:
        try:
            data = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError:  # ENXIO: nothing but a hole up to the end
            break
        if data >= last:
            break
        hole = min(os.lseek(fd, data, os.SEEK_HOLE), last)
        first = data // PAGE * PAGE  # a file system may have smaller blocks
        count = -(-(hole - first) // PAGE)
        found.append(Extent(first - start, count, lazy=lazy))
        offset = first + count * PAGE
    return tuple(found)


def refused_mappings(registry: Registry, pid: int, smaps: Sequence[proc.SmapsEntry]) -> None:
    """Put the mappings of a process that cannot be moved on the registry's list of obstacles, those of one kind as one:
    a tree whose memory still comes has hundreds.
    """
    places: dict[tuple[str, str], list[str]] = {}
    for entry, refused in refused_of(smaps):
        places.setdefault((refused.why, refused.remedy), []).append(place_of(entry))
    for words, (first, *more) in places.items():
        registry.refuse(pid, f"{first} and {len(more)} more" if more else first, Refused(*words))


def refused_of(smaps: Iterable[proc.SmapsEntry]) -> Iterator[tuple[proc.SmapsEntry, Refused]]:
    """The mappings that cannot be moved, and why."""
    for entry in smaps:
        try:
            refusal(entry, kind_of(entry.entry))
        except Refused as refused:
            yield entry, refused


def place_of(smaps: proc.SmapsEntry) -> str:
    """As an obstacle names it."""
    return f"mapping {smaps.entry.start:#x}-{smaps.entry.end:#x} {smaps.entry.path}".rstrip()
