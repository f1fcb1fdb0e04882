"""Arithmetic of extents, and the pagemap images that hold them. Pure.

A pagemap entry is a run of pages with flags; the pages marked PRESENT lie one after the other in
pages-<pages_id>.img, in the order of the entries (CRIU 4.2: criu/pagemap.c, criu/include/pagemap.h:133).
Functions that take extents take them in any order and give them sorted by address.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence

from lazyproc.errors import ImageError
from lazyproc.facts import dataclass, replace
from lazyproc.images.files import ImageReader, ImageWriter
from lazyproc.images.pb import process_pb2 as pb
from lazyproc.model import PAGE, Extent

PE_PARENT = 1  # the content lies in the parent image
PE_LAZY = 2  # may come after the process runs
PE_PRESENT = 4  # the content lies in the pages image next to this pagemap

MAX_PAGES = 1024  # of one entry: CRIU's lazy client has a buffer for the longest one, its server 4 MiB pipes
_ADDRESS_LIMIT = 1 << 64


@dataclass(frozen=True, slots=True)
class Entry:
    """A pagemap entry; `offset` is the byte in the pages image, meaningful when PRESENT."""

    addr: int
    count: int
    flags: int
    offset: int = 0

    @property
    def end(self) -> int:
        return self.addr + self.count * PAGE

    @property
    def present(self) -> bool:
        return bool(self.flags & PE_PRESENT)


@dataclass(frozen=True, slots=True)
class Located:
    """Pages in one layer (0 the newest folder, n its nth parent), from byte `offset` of its pages image."""

    addr: int
    count: int
    layer: int
    offset: int

    @property
    def end(self) -> int:
        return self.addr + self.count * PAGE


# --- extents ------------------------------------------------------------------------------------------------


def merge(extents: Iterable[Extent]) -> tuple[Extent, ...]:
    """The same pages in as few extents as possible. Raises ImageError when two extents overlap."""
    merged: list[Extent] = []
    for extent in sorted(extents, key=lambda extent: extent.addr):
        if not extent.count:
            continue
        last = merged[-1] if merged else None
        if last is not None and extent.addr < last.end:
            raise ImageError(
                f"two extents hold the page {extent.addr:#x}",
                where="pagemap",
                remedy="take the checkpoint again",
            )
        if last is not None and extent.addr == last.end and _alike(last, extent):
            merged[-1] = replace(last, count=last.count + extent.count)
        else:
            merged.append(extent)
    return tuple(merged)


def _alike(one: Extent, other: Extent) -> bool:
    return one.lazy == other.lazy and one.in_parent == other.in_parent


def split(extents: Iterable[Extent], limit: int = MAX_PAGES) -> Iterator[Extent]:
    """The same pages in extents of at most `limit` pages, in the order given."""
    for extent in extents:
        if extent.count <= limit:
            yield extent
            continue
        for done in range(0, extent.count, limit):
            yield replace(extent, addr=extent.addr + done * PAGE, count=min(limit, extent.count - done))


def intersect(extents: Iterable[Extent], ranges: Iterable[tuple[int, int]]) -> tuple[Extent, ...]:
    """What of the extents lies in the page-aligned, disjoint ranges (start, end)."""
    ordered = sorted(ranges)
    starts = [start for start, _ in ordered]
    kept = []
    for extent in merge(extents):
        index = max(bisect_right(starts, extent.addr) - 1, 0)
        while index < len(ordered) and ordered[index][0] < extent.end:
            start, end = max(ordered[index][0], extent.addr), min(ordered[index][1], extent.end)
            if start < end:
                kept.append(replace(extent, addr=start, count=(end - start) // PAGE))
            index += 1
    return merge(kept)


def subtract(extents: Iterable[Extent], ranges: Iterable[tuple[int, int]]) -> tuple[Extent, ...]:
    """What of the extents lies outside of the page-aligned, disjoint ranges (start, end)."""
    gaps, at = [], 0
    for start, end in sorted(ranges):
        if at < start:
            gaps.append((at, start))
        at = max(at, end)
    gaps.append((at, _ADDRESS_LIMIT))
    return intersect(extents, gaps)


def pages(extents: Iterable[Extent]) -> int:
    """How many pages the extents hold."""
    return sum(extent.count for extent in extents)


# --- pagemap images -----------------------------------------------------------------------------------------


def write_pagemap(
    writer: ImageWriter, name: str, pages_id: int, extents: Iterable[Extent], *, lazy_elsewhere: bool = False
) -> None:
    """Writes the pagemap `name`. With `lazy_elsewhere` the lazy pages are marked LAZY and not PRESENT.

    Both nr_pages and, for CRIU <= 4.1.1, compat_nr_pages are written; CRIU 4.2 reads either
    (criu/pagemap.c:686).
    """
    writer.add(name, pb.pagemap_head(pages_id=pages_id))
    for extent in split(merge(extents)):
        flags = PE_LAZY if extent.lazy else 0
        if extent.in_parent:
            flags |= PE_PARENT
        elif not (lazy_elsewhere and extent.lazy):
            flags |= PE_PRESENT
        entry = pb.pagemap_entry(
            vaddr=extent.addr, compat_nr_pages=extent.count, nr_pages=extent.count, flags=flags
        )
        if extent.in_parent:
            entry.in_parent = True
        writer.add(name, entry)


def read_pagemap(reader: ImageReader) -> tuple[int, tuple[Entry, ...]]:
    """pages_id and the entries, sorted, each with its place in the pages image.

    Raises ImageError when entries overlap, are not aligned or leave the address space.
    """
    pages_id = reader.message(pb.pagemap_head).pages_id
    entries: list[Entry] = []
    offset = end = 0
    while reader.more:
        message = reader.message(pb.pagemap_entry)
        count = message.nr_pages or message.compat_nr_pages
        flags = message.flags
        if not message.HasField("flags"):  # CRIU before 2.0 had only in_parent
            flags = PE_PARENT if message.in_parent else PE_PRESENT
        entry = Entry(message.vaddr, count, flags, offset)
        if not count or entry.addr % PAGE or entry.addr < end or entry.end > _ADDRESS_LIMIT:
            raise reader.error(f"pagemap entry of {count} pages at {entry.addr:#x}")
        end = entry.end
        if entry.present:
            offset += count * PAGE
        entries.append(entry)
    return pages_id, tuple(entries)


def to_extents(entries: Iterable[Entry]) -> tuple[Extent, ...]:
    """The model's view of pagemap entries."""
    return merge(
        Extent(entry.addr, entry.count, bool(entry.flags & PE_LAZY), bool(entry.flags & PE_PARENT))
        for entry in entries
    )


def find(entries: Sequence[Entry] | Sequence[Located], addr: int) -> int:
    """The index of the first entry that ends behind `addr`; len(entries) when there is none."""
    index = bisect_right(entries, addr, key=lambda entry: entry.addr)
    return index - 1 if index and entries[index - 1].end > addr else index


def locate(layers: Sequence[Sequence[Entry]]) -> tuple[Located, ...]:
    """Where each page's content lies, in a chain of folders with the newest first.

    Entries that are only LAZY lie in none of them and are left out. Raises ImageError when a page is said to
    be in the parent and no layer has it.
    """
    found: list[Located] = []

    def walk(layer: int, start: int, end: int) -> None:
        entries = layers[layer] if layer < len(layers) else ()
        index = find(entries, start)
        while index < len(entries) and entries[index].addr < end:
            entry = entries[index]
            first, last = max(entry.addr, start), min(entry.end, end)
            if first > start and layer:
                break
            if entry.flags & PE_PARENT:
                walk(layer + 1, first, last)
            elif entry.present:
                found.append(Located(first, (last - first) // PAGE, layer, entry.offset + first - entry.addr))
            start = last
            index += 1
        if layer and start < end:
            raise ImageError(
                f"the page {start:#x} is in no parent",
                where="pagemap",
                remedy="restore the `parent` folders as well",
            )

    walk(0, 0, _ADDRESS_LIMIT)
    return tuple(found)
