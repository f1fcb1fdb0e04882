"""Which of the pages that were acknowledged may be freed, and which are gone already."""

from __future__ import annotations

from lazyproc.migrate.holding import Holding
from lazyproc.migrate.releasing import LazyPlaces, gaps
from lazyproc.model import PAGE, Extent, MemoryObject, ObjectKind
from lazyproc.pages.frozen import Place
from lazyproc.wire.native import MapEntry

TASK = MemoryObject(ObjectKind.TASK, 7)
SHARED = MemoryObject(ObjectKind.SHARED, 3)


def place(obj: MemoryObject, first: int, last: int, pid: int, at: int) -> Place:
    """In pages."""
    return Place(obj, first * PAGE, last * PAGE, pid, at * PAGE)


def test_gaps_are_what_lies_in_no_extent() -> None:
    ranges = [(0, 4 * PAGE), (8 * PAGE, 12 * PAGE)]
    assert list(gaps(ranges, ())) == ranges
    assert list(gaps(ranges, [Extent(0, 12, lazy=True)])) == []
    extents = [Extent(addr * PAGE, count, lazy=True) for addr, count in ((1, 2), (7, 2), (11, 1))]
    assert list(gaps(ranges, extents)) == [(0, PAGE), (3 * PAGE, 4 * PAGE), (9 * PAGE, 11 * PAGE)]


def test_only_lazy_memory_is_freed_and_each_byte_once() -> None:
    places = (
        place(TASK, 0, 10, 70, 0),
        place(SHARED, 0, 6, 70, 100),
        place(SHARED, 4, 8, 71, 200),
    )
    lazy = {TASK: ((2 * PAGE, 4 * PAGE), (6 * PAGE, 9 * PAGE)), SHARED: ((0, 8 * PAGE),)}
    found = LazyPlaces(Holding((), places, lazy, ()))
    entries = [MapEntry(TASK.key, 3 * PAGE, 5), MapEntry(SHARED.key, 0, 100), MapEntry(TASK.key + 256, 0, 9)]
    assert list(found.of(entries)) == [
        place(TASK, 3, 4, 70, 3),
        place(TASK, 6, 8, 70, 6),
        place(SHARED, 0, 6, 70, 100),
        place(SHARED, 6, 8, 71, 202),
    ]
