"""Arithmetic of extents, and the pagemap images that hold them. Pure.

A pagemap entry is a run of pages with flags; the pages marked PRESENT lie one after the other in
pages-<pages_id>.img, in the order of the entries (CRIU 4.2: criu/pagemap.c, criu/include/pagemap.h:133). A large
process has a million entries: they are columns here, filled by _pagemap.c.
Functions that take extents take them in any order and give them sorted by address.
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from lazyproc.errors import ImageError
from lazyproc.facts import dataclass, replace
from lazyproc.images._pagemap import ffi, lib
from lazyproc.images.files import ImageReader, ImageWriter, unknown_field
from lazyproc.images.packed import PE_PAYLOAD_ALIGNED, Packed, layout_of, pack
from lazyproc.images.pb import process_pb2 as pb
from lazyproc.model import PAGE, Extent
from lazyproc.runs import Extents

# Bits of an entry's flags; the first two are the kinds of lazyproc.runs.
PE_PARENT = 1  # the content lies in the parent image
PE_LAZY = 2  # may come after the process runs
PE_PRESENT = 4  # the content lies in the pages image next to this pagemap

MAX_PAGES = 1024  # of one entry: CRIU's lazy client has a buffer for the longest one, its server 4 MiB pipes
_ALL_FLAGS = PE_PARENT | PE_LAZY | PE_PRESENT
_NOT_HERE = re.compile(rb"[\x00\x02]")  # flags without PARENT and PRESENT
_ADDRESS_LIMIT = 1 << 64
_SHORTEST_RECORD = 8  # bytes: a size and two fields


class Entry(NamedTuple):
    """A pagemap entry; `offset` is the byte in the pages image, meaningful when PRESENT."""

    addr: int
    end: int
    offset: int
    flags: int


@dataclass(frozen=True, slots=True)
class Pagemap:
    """The entries of a pagemap image in columns, sorted by address: see Entry."""

    pages_id: int
    addrs: array[int]
    ends: array[int]
    offsets: array[int]
    flags: bytes
    packed: tuple[Packed, ...] | None = None  # where the present entries lie while they are compressed

    def __iter__(self) -> Iterator[Entry]:
        return self.between(0, _ADDRESS_LIMIT)

    def between(self, start: int, end: int) -> Iterator[Entry]:
        """The entries that touch the addresses from `start` up to `end`."""
        touched = slice(bisect_right(self.ends, start), bisect_left(self.addrs, end))
        return map(Entry, self.addrs[touched], self.ends[touched], self.offsets[touched], self.flags[touched])

    @property
    def size(self) -> int:
        """Bytes that the pages image must have, when it is not compressed."""
        last = len(self.flags) - 1
        if last < 0:
            return 0
        return self.offsets[last] + bool(self.flags[last] & PE_PRESENT) * (self.ends[last] - self.addrs[last])

    @property
    def stored_size(self) -> int:
        """Bytes that the pages image must have."""
        return self.size if self.packed is None else max((item.end for item in self.packed), default=0)

    @property
    def is_complete(self) -> bool:
        """Whether every page lies in the pages image, none in a parent or at a page server."""
        return self.flags.count(PE_PRESENT) + self.flags.count(PE_PRESENT | PE_LAZY) == len(self.flags)

    def elsewhere(self, start: int = 0, end: int = _ADDRESS_LIMIT) -> int | None:
        """The first entry from `start` up to `end` whose pages are in no image but at a page server: its address."""
        first, last = bisect_right(self.ends, start), bisect_left(self.addrs, end)
        found = _NOT_HERE.search(self.flags, first, last)
        return self.addrs[found.start()] if found else None


class Located(NamedTuple):
    """Runs of pages in columns: where they lie in which layer (0 the newest folder, n its nth parent)."""

    addrs: array[int]
    ends: array[int]
    offsets: array[int]  # in the layer's pages image
    layers: array[int]


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


def read_pagemap(reader: ImageReader) -> Pagemap:
    """The entries, each with its place in the pages image.

    Raises ImageError when entries overlap, are not aligned, leave the address space or have unknown flags.
    """
    pages_id = reader.message(pb.pagemap_head).pages_id
    return _read_in_c(pages_id, reader.ahead) or _read_messages(pages_id, reader)


def _read_in_c(pages_id: int, records: memoryview) -> Pagemap | None:
    """None for what is wrong, or written in an unusual way: protobuf knows which of the two."""
    room = len(records) // _SHORTEST_RECORD
    columns = [ffi.new("uint64_t[]", room) for _ in range(3)]
    flags = ffi.new("uint8_t[]", room)
    count = lib.lp_pagemap_read(ffi.from_buffer(records), len(records), *columns, flags)
    if count < 0:
        return None
    addrs, ends, offsets = (_taken(column, count) for column in columns)
    return Pagemap(pages_id, addrs, ends, offsets, bytes(ffi.buffer(flags, count)))


def _taken(column: Any, count: int) -> array[int]:
    taken = array("Q")
    taken.frombytes(ffi.buffer(column, count * taken.itemsize))
    return taken


def _read_messages(pages_id: int, reader: ImageReader) -> Pagemap:
    rows: list[Entry] = []
    packed: list[Packed] = []
    offset = end = stored = 0
    while reader.more:
        message = _message(reader)
        addr, count, flags = message.vaddr, message.nr_pages or message.compat_nr_pages, message.flags
        if not message.HasField("flags"):  # CRIU before 2.0 had only in_parent
            flags = PE_PARENT if message.in_parent else PE_PRESENT
        if not count or addr % PAGE or addr < end or addr + count * PAGE >= _ADDRESS_LIMIT:
            raise reader.error(f"pagemap entry of {count} pages at {addr:#x}")
        if flags & ~PE_PAYLOAD_ALIGNED > _ALL_FLAGS:
            raise reader.error(f"pagemap entry with the unknown flags {flags:#x}")
        end = addr + count * PAGE
        rows.append(Entry(addr, end, offset, flags & _ALL_FLAGS))
        layout = layout_of(message)
        if flags & PE_PRESENT:
            offset += count * PAGE
            aligned = bool(flags & PE_PAYLOAD_ALIGNED)
            packed.append(pack(layout, count, stored, aligned=aligned, reader=reader))
            stored = packed[-1].end
        elif layout.sizes or flags & PE_PAYLOAD_ALIGNED:
            raise reader.error("a pagemap entry says where its pages lie, and has none")
    addrs, ends, offsets = (array("Q", (row[index] for row in rows)) for index in range(3))
    as_they_are = stored == offset and all(item.sizes == (item.held * PAGE,) for item in packed)
    return Pagemap(
        pages_id,
        addrs,
        ends,
        offsets,
        bytes(row.flags for row in rows),
        None if as_they_are else tuple(packed),
    )


def _message(reader: ImageReader) -> pb.pagemap_entry | pb.pagemap_entry_2895:
    """The next entry. In the older layout of compressed pages fields 6 to 8 are none that the newer one has."""
    data = reader.record()
    message = reader.parsed(pb.pagemap_entry, data)
    if not unknown_field(message, data):
        return message
    older = reader.parsed(pb.pagemap_entry_2895, data)
    reader.demand_known(older, data)
    return older


def to_extents(pagemap: Pagemap) -> Extents:
    """The model's view of a pagemap: what CRIU's limits cut is whole again."""
    count = len(pagemap.flags)
    addrs, counts, kinds = (ffi.new(kind, count) for kind in ("uint64_t[]", "uint64_t[]", "uint8_t[]"))
    columns = (ffi.from_buffer("uint64_t[]", column) for column in (pagemap.addrs, pagemap.ends))
    merged = lib.lp_pagemap_merge(*columns, pagemap.flags, count, addrs, counts, kinds)
    return Extents(_taken(addrs, merged), _taken(counts, merged), bytes(ffi.buffer(kinds, merged)))


def locate(layers: Sequence[Pagemap]) -> Located:
    """Where each page's content lies, in a chain of folders with the newest first.

    Entries of the newest that are only LAZY lie in none of them and are left out. Raises ImageError when a page is said
    to be in the parent and no layer has it.
    """
    newest = layers[0]
    if newest.is_complete:  # as without a pre-dump
        return Located(newest.addrs, newest.ends, newest.offsets, array("Q", [0]) * len(newest.flags))
    found = Located(array("Q"), array("Q"), array("Q"), array("Q"))

    def walk(layer: int, start: int, end: int) -> None:
        entries = layers[layer].between(start, end) if layer < len(layers) else ()
        for entry in entries:
            first, last = max(entry.addr, start), min(entry.end, end)
            if layer and (first > start or not entry.flags & (PE_PARENT | PE_PRESENT)):
                break
            if entry.flags & PE_PARENT:
                walk(layer + 1, first, last)
            elif entry.flags & PE_PRESENT:
                row = (first, last, entry.offset + first - entry.addr, layer)
                for column, value in zip(found, row, strict=True):
                    column.append(value)
            start = last
        if layer and start < end:
            raise ImageError(
                f"the page {start:#x} is in no parent",
                where="pagemap",
                remedy="restore the `parent` folders as well",
            )

    walk(0, 0, _ADDRESS_LIMIT)
    return found
