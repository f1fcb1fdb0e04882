"""Policies bring over everything, each page once, in the order they promise."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyproc.cli.options import POLICIES as POLICY_NAMES
from lazyproc.model import PAGE, Extent, MemoryObject, ObjectKind
from lazyproc.uffd.pager import bucket_floor, percentile
from lazyproc.uffd.policy import (
    BLOCK,
    POLICIES,
    Chunk,
    Extents,
    Page,
    blocks,
    recorded,
    sequential,
    smallest_first,
)


@st.composite
def maps(draw: st.DrawFn) -> Extents:
    """Sorted runs that do not overlap, of up to four objects."""
    made: dict[MemoryObject, list[Extent]] = {}
    for number in range(draw(st.integers(0, 4))):
        addr, runs = 0, []
        for gap, count in draw(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), max_size=6)):
            runs.append(Extent(addr + gap * PAGE, count, lazy=True))
            addr = runs[-1].end
        made[MemoryObject(draw(st.sampled_from(ObjectKind)), number)] = runs
    return made


def pages(chunks: Iterable[Chunk]) -> list[Page]:
    return [Page(chunk.obj, chunk.addr + index * PAGE) for chunk in chunks for index in range(chunk.pages)]


def pages_of_map(extents: Extents) -> list[Page]:
    return [
        Page(obj, e.addr + index * PAGE)
        for obj, runs in extents.items()
        for e in runs
        for index in range(e.count)
    ]


@given(maps())
@pytest.mark.parametrize("name", POLICIES)
def test_each_page_once(name: str, extents: Extents) -> None:
    assert sorted(pages(POLICIES[name].order(extents))) == sorted(pages_of_map(extents))


@pytest.mark.parametrize("name", POLICIES)
def test_the_command_line_names_each(name: str) -> None:
    assert name in POLICY_NAMES.replace(" or ", ", ").split(", ")


@given(maps())
def test_sequential_keeps_the_order(extents: Extents) -> None:
    assert pages(sequential(extents)) == pages_of_map(extents)


@given(maps())
def test_smallest_first(extents: Extents) -> None:
    counts = [chunk.pages for chunk in smallest_first(extents)]
    assert counts == sorted(counts)


@given(maps(), st.lists(st.tuples(st.sampled_from(ObjectKind), st.integers(0, 3), st.integers(0, 60))))
def test_recorded_pages_come_first_and_each_page_once(
    extents: Extents, faults: list[tuple[ObjectKind, int, int]]
) -> None:
    wanted = [Page(MemoryObject(kind, number), page * PAGE) for kind, number, page in faults]
    order = pages(recorded(wanted).order(extents))
    known = set(pages_of_map(extents))
    first = [page for page in dict.fromkeys(wanted) if page in known]
    assert order[: len(first)] == sorted(first, key=lambda page: (page.obj.key, page.addr))
    assert order[len(first) :] == [page for page in pages_of_map(extents) if page not in first]


def test_blocks_keep_their_order_and_join_neighbours() -> None:
    obj, count = MemoryObject(ObjectKind.TASK, 1), 2 * BLOCK + 10
    numbers = [index * 7 % count for index in range(count)]
    chunks = list(blocks([Page(obj, number * PAGE) for number in numbers]))
    order = [page.addr // PAGE for page in pages(chunks)]
    for at in range(0, count, BLOCK):
        assert order[at : at + BLOCK] == sorted(numbers[at : at + BLOCK])
    assert list(blocks([Page(obj, number * PAGE) for number in (5, 3, 4)])) == [Chunk(obj, 3 * PAGE, 3)]


@given(st.integers(0, 2**62))
def test_buckets_are_within_a_sixteenth(nanoseconds: int) -> None:
    index = next(i for i in range(1024) if bucket_floor(i + 1) > nanoseconds)
    assert bucket_floor(index) <= nanoseconds
    assert bucket_floor(index + 1) - bucket_floor(index) <= max(1, nanoseconds / 16)


@given(st.lists(st.integers(0, 200), min_size=1, max_size=50), st.sampled_from([0.5, 0.9, 0.99]))
def test_percentiles_lie_in_the_right_bucket(indices: list[int], fraction: float) -> None:
    buckets = [0] * 1024
    for index in indices:
        buckets[index] += 1
    exact = next(i for i in sorted(indices) if sum(1 for j in indices if j <= i) >= fraction * len(indices))
    assert bucket_floor(exact) <= percentile(buckets, fraction) <= bucket_floor(exact + 1)


def test_no_faults_have_no_percentile() -> None:
    assert percentile([0] * 1024, 0.99) == 0.0
