"""Runs of pages by the thousand, in columns: no object each, and C takes the columns as they are. Pure."""

from __future__ import annotations

import re
import struct
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple, Self, overload

from lazyproc.model import PAGE, Extent

IN_PARENT, LAZY = 1, 2  # bits of a kind
_EAGER_RUN, _LAZY_RUN = re.compile(rb"[\x00\x01]+"), re.compile(rb"[\x02\x03]+")
_WITHOUT_PARENT = bytes(kind & ~IN_PARENT for kind in range(256))
_AS_EAGER = bytes(kind & ~LAZY for kind in range(256))


class Extents(Sequence[Extent]):
    """Extents, sorted by address and without overlaps; an Extent is made when one is asked for.

    Equal to any sequence of the same extents. `addrs` and `counts` (pages) are u64, `kinds` bytes of IN_PARENT | LAZY.
    """

    __slots__ = ("addrs", "counts", "kinds")

    def __init__(self, addrs: array[int], counts: array[int], kinds: bytes) -> None:
        self.addrs = addrs
        self.counts = counts
        self.kinds = kinds

    @classmethod
    def of(cls, extents: Iterable[Extent]) -> Extents:
        """The same extents in columns; nothing is copied when they are that already."""
        if isinstance(extents, Extents):
            return extents
        rows = list(extents)
        return cls(
            array("Q", (row.addr for row in rows)),
            array("Q", (row.count for row in rows)),
            bytes(LAZY * row.lazy | IN_PARENT * row.in_parent for row in rows),
        )

    @classmethod
    def joined(cls, parts: Iterable[Extents]) -> Self:
        """The extents of all parts, one part after the other."""
        addrs, counts, kinds = array("Q"), array("Q"), bytearray()
        for part in parts:
            addrs += part.addrs
            counts += part.counts
            kinds += part.kinds
        return cls(addrs, counts, bytes(kinds))

    def __len__(self) -> int:
        return len(self.kinds)

    @overload
    def __getitem__(self, index: int) -> Extent: ...
    @overload
    def __getitem__(self, index: slice) -> Extents: ...
    def __getitem__(self, index: int | slice) -> Extent | Extents:
        if isinstance(index, slice):
            return Extents(self.addrs[index], self.counts[index], self.kinds[index])
        return _extent(self.addrs[index], self.counts[index], self.kinds[index])

    def __iter__(self) -> Iterator[Extent]:
        return map(_extent, self.addrs, self.counts, self.kinds)

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, Sequence) else NotImplemented

    def __repr__(self) -> str:
        return f"Extents({list(self)!r})"

    def where(self, *, lazy: bool) -> Extents:
        """Those that are lazy, or those that are not. Neighbours are mostly alike, so whole runs are copied."""
        runs = (_LAZY_RUN if lazy else _EAGER_RUN).finditer(self.kinds)
        return Extents.joined(self[run.start() : run.end()] for run in runs)

    def as_eager(self) -> Extents:
        """The same pages, all to be there before the process runs."""
        return Extents(self.addrs, self.counts, self.kinds.translate(_AS_EAGER))

    def without_parent(self) -> Extents:
        """The same pages, all in this folder."""
        return Extents(self.addrs, self.counts, self.kinds.translate(_WITHOUT_PARENT))

    def within(self, start: int, end: int) -> Extents:
        """What of them lies from the page `start` up to `end`."""
        first, last = bisect_left(self.addrs, start), bisect_left(self.addrs, end)
        if first and self.addrs[first - 1] + self.counts[first - 1] * PAGE > start:
            first -= 1
        part = self[first:last] if start < end else self[:0]
        if part and part.addrs[0] < start:
            part.counts[0] -= (start - part.addrs[0]) // PAGE
            part.addrs[0] = start
        if part and (beyond := part.addrs[-1] + part.counts[-1] * PAGE - end) > 0:
            part.counts[-1] -= beyond // PAGE
        return part


def _extent(addr: int, count: int, kind: int) -> Extent:
    return Extent(addr, count, bool(kind & LAZY), bool(kind & IN_PARENT))


class Segment(NamedTuple):
    """A run of an object's pages in a file: addresses start to end lie from `offset` on in `fd`. In bytes."""

    key: int  # MemoryObject.key
    start: int
    end: int
    fd: int
    offset: int


class Segments:
    """Segments sorted by object and address. `rows` has five u64 for each, as `struct pager_segment`."""

    __slots__ = ("rows",)

    def __init__(self, rows: array[int]) -> None:
        self.rows = rows

    @classmethod
    def of(cls, segments: Iterable[Segment]) -> Segments:
        """The same segments in columns, sorted; nothing is copied when they are that already."""
        if isinstance(segments, Segments):
            return segments
        return cls(array("Q", chain.from_iterable(sorted(segments))))

    def __len__(self) -> int:
        return len(self.rows) // len(Segment._fields)

    def __iter__(self) -> Iterator[Segment]:
        return map(Segment._make, struct.iter_unpack("=5Q", self.rows))


def interleaved(*columns: array[int]) -> array[int]:
    """Rows out of columns of the same length."""
    rows = array("Q", [0]) * (len(columns) * len(columns[0]))
    for index, column in enumerate(columns):
        rows[index :: len(columns)] = column
    return rows
