"""Arithmetic of extents against sets of page numbers, and pagemap images."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyproc.errors import ImageError
from lazyproc.images.files import ImageReader, ImageWriter
from lazyproc.images.pagemap import (
    MAX_PAGES,
    PE_LAZY,
    PE_PARENT,
    PE_PRESENT,
    Entry,
    find,
    intersect,
    locate,
    merge,
    pages,
    read_pagemap,
    split,
    subtract,
    to_extents,
    write_pagemap,
)
from lazyproc.images.pb import process_pb2 as pb
from lazyproc.model import PAGE, Extent
from tests.unit.model_strategies import extents

NAME = "pagemap-7.img"
ranges = st.lists(st.integers(0, 200), unique=True, max_size=8).map(
    lambda cuts: [
        (start * PAGE, end * PAGE) for start, end in zip(sorted(cuts)[::2], sorted(cuts)[1::2], strict=False)
    ]
)


def numbers(runs: tuple[Extent, ...]) -> dict[int, tuple[bool, bool]]:
    """The page numbers of extents, with the flags of each."""
    return {
        extent.addr // PAGE + index: (extent.lazy, extent.in_parent)
        for extent in runs
        for index in range(extent.count)
    }


@given(extents(), st.randoms(), st.integers(1, 9))
def test_splitting_and_merging_keep_every_page(runs: tuple[Extent, ...], random: object, limit: int) -> None:
    parts = list(split(runs, limit))
    random.shuffle(parts)  # type: ignore[attr-defined]
    assert all(part.count <= limit for part in parts)
    assert merge(parts) == runs
    assert pages(parts) == len(numbers(runs))


@given(extents(), ranges)
def test_intersection_and_difference_are_those_of_sets(
    runs: tuple[Extent, ...], within: list[tuple[int, int]]
) -> None:
    inside = {page for start, end in within for page in range(start // PAGE, end // PAGE)}
    every = numbers(runs)
    assert numbers(intersect(runs, within)) == {
        page: flags for page, flags in every.items() if page in inside
    }
    assert numbers(subtract(runs, within)) == {
        page: flags for page, flags in every.items() if page not in inside
    }


def test_overlapping_extents_are_refused() -> None:
    with pytest.raises(ImageError, match="0x1000"):
        merge([Extent(0, 2, True), Extent(PAGE, 1, True)])


def _image(runs: tuple[Extent, ...], *, lazy_elsewhere: bool = False) -> ImageReader:
    writer = ImageWriter()
    write_pagemap(writer, NAME, 3, runs, lazy_elsewhere=lazy_elsewhere)
    return ImageReader(NAME, writer.finish()[NAME])


@given(extents(limit=3000), st.booleans())
def test_a_pagemap_comes_back_in_entries_of_at_most_1024_pages(
    runs: tuple[Extent, ...], elsewhere: bool
) -> None:
    pages_id, entries = read_pagemap(_image(runs, lazy_elsewhere=elsewhere))
    assert pages_id == 3
    assert to_extents(entries) == runs
    assert all(entry.count <= MAX_PAGES for entry in entries)
    offset = 0
    for entry in entries:
        if entry.present:
            assert entry.offset == offset
            offset += entry.count * PAGE
        assert entry.present == (not entry.flags & PE_PARENT and not (elsewhere and entry.flags & PE_LAZY))


def test_both_page_counts_are_written() -> None:
    reader = _image((Extent(PAGE, 5, True),))
    reader.message(pb.pagemap_head)
    entry = reader.message(pb.pagemap_entry)
    assert (entry.compat_nr_pages, entry.nr_pages, entry.flags) == (5, 5, PE_LAZY | PE_PRESENT)


@pytest.mark.parametrize(
    "entries",
    [
        [{"vaddr": 1, "compat_nr_pages": 1}],
        [{"vaddr": 0, "compat_nr_pages": 0}],
        [{"vaddr": PAGE, "compat_nr_pages": 1}, {"vaddr": 0, "compat_nr_pages": 1}],
        [{"vaddr": 0, "compat_nr_pages": 2}, {"vaddr": PAGE, "compat_nr_pages": 1}],
        [{"vaddr": 2**64 - PAGE, "compat_nr_pages": 2}],
        [{"vaddr": 0, "compat_nr_pages": 0, "nr_pages": 2**60}],
    ],
)
def test_impossible_pagemaps_are_refused(entries: list[dict[str, int]]) -> None:
    writer = ImageWriter()
    writer.add(NAME, pb.pagemap_head(pages_id=1))
    for entry in entries:
        writer.add(NAME, pb.pagemap_entry(**entry))  # type: ignore[arg-type]
    with pytest.raises(ImageError, match="pagemap entry"):
        read_pagemap(ImageReader(NAME, writer.finish()[NAME]))


def test_old_images_without_flags_are_read() -> None:
    writer = ImageWriter()
    writer.add(NAME, pb.pagemap_head(pages_id=1))
    writer.add(NAME, pb.pagemap_entry(vaddr=0, compat_nr_pages=1))
    writer.add(NAME, pb.pagemap_entry(vaddr=PAGE, compat_nr_pages=2, in_parent=True))
    _, entries = read_pagemap(ImageReader(NAME, writer.finish()[NAME]))
    assert [entry.flags for entry in entries] == [PE_PRESENT, PE_PARENT]


@given(extents(), st.integers(0, 300))
def test_find_gives_the_first_entry_that_ends_behind_an_address(runs: tuple[Extent, ...], page: int) -> None:
    entries = [Entry(run.addr, run.count, PE_PRESENT) for run in runs]
    index = find(entries, page * PAGE)
    assert all(entry.end <= page * PAGE for entry in entries[:index])
    assert index == len(entries) or entries[index].end > page * PAGE


@given(
    st.lists(
        st.lists(st.sampled_from([0, PE_PRESENT, PE_PARENT]), min_size=12, max_size=12),
        min_size=1,
        max_size=4,
    )
)
def test_pages_are_found_in_the_newest_layer_that_has_them(flags: list[list[int]]) -> None:
    layers, offsets = [], []
    for row in flags:
        entries, offset = [], 0
        for page, flag in enumerate(row):
            if flag:
                entries.append(Entry(page * PAGE, 1, flag, offset))
            offset += PAGE if flag == PE_PRESENT else 0
        layers.append(entries)
        offsets.append({entry.addr: entry.offset for entry in entries})
    expected = {}
    for page in range(12):
        layer = 0
        while layer < len(flags) and flags[layer][page] == PE_PARENT:
            layer += 1
        if layer == len(flags) or (layer and not flags[layer][page]):
            with pytest.raises(ImageError, match="in no parent"):
                locate(layers)
            return
        if flags[layer][page]:
            expected[page * PAGE] = (layer, offsets[layer][page * PAGE])
    found = {
        run.addr + index * PAGE: (run.layer, run.offset + index * PAGE)
        for run in locate(layers)
        for index in range(run.count)
    }
    assert found == expected
