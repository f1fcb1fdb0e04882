"""Extents and segments in columns against the same in a list."""

from __future__ import annotations

from array import array
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from lazyproc.images.pagemap import intersect
from lazyproc.model import PAGE, Extent
from lazyproc.runs import Extents, Segment, Segments, interleaved
from lazyproc.uffd._pager import ffi
from tests.unit.model_strategies import extents


@given(extents())
def test_columns_are_a_sequence_of_the_same_extents(runs: tuple[Extent, ...]) -> None:
    columns = Extents.of(runs)
    assert Extents.of(columns) is columns
    assert len(columns) == len(runs)
    assert tuple(columns) == runs
    assert columns == runs
    assert runs == columns
    assert columns != (*runs, Extent(0, 1, False))
    assert [columns[index] for index in range(-len(runs), len(runs))] == [*runs, *runs]
    assert columns[1:3] == runs[1:3]
    assert Extents.joined([columns[:2], columns[2:]]) == runs


@given(extents())
def test_extents_are_chosen_by_whether_they_are_lazy(runs: tuple[Extent, ...]) -> None:
    columns = Extents.of(runs)
    assert columns.where(lazy=True) == [run for run in runs if run.lazy]
    assert columns.where(lazy=False) == [run for run in runs if not run.lazy]
    assert columns.as_eager() == [replace(run, lazy=False) for run in runs]


@given(extents(), st.integers(0, 200), st.integers(0, 200))
def test_what_lies_within_a_range_is_cut_at_its_ends(runs: tuple[Extent, ...], start: int, end: int) -> None:
    columns = Extents.of(runs)
    ranges = [(start * PAGE, end * PAGE)] if start < end else []
    # Neighbours stay apart that intersect() would join: there are none in what it is given.
    assert columns.within(start * PAGE, end * PAGE) == intersect(runs, ranges)
    assert columns == runs, "the original is as it was"


def test_segments_are_sorted_rows_of_what_the_pager_takes() -> None:
    late, early = Segment(7, PAGE, 2 * PAGE, 5, 0), Segment(7, 0, PAGE, 5, PAGE)
    segments = Segments.of([late, early])
    assert Segments.of(segments) is segments
    assert list(segments) == [early, late]
    assert len(segments) == 2
    rows = ffi.from_buffer("struct pager_segment[]", segments.rows)
    assert [(row.object, row.start, row.end, row.fd, row.offset) for row in rows] == [early, late]


def test_columns_become_rows() -> None:
    columns = (array("Q", [1, 2]), array("Q", [3, 4]), array("Q", [5, 6]))
    assert interleaved(*columns).tolist() == [1, 3, 5, 2, 4, 6]
