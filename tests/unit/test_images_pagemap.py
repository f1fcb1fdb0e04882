"""Arithmetic of extents against sets of page numbers, and pagemap images."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

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
    Located,
    Pagemap,
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
from lazyproc.images.pagemap import _read_in_c as read_in_c
from lazyproc.images.pagemap import _read_messages as read_messages
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
    pagemap = read_pagemap(_image(runs, lazy_elsewhere=elsewhere))
    assert pagemap.pages_id == 3
    assert to_extents(pagemap) == runs
    offset = 0
    for entry in pagemap:
        present = bool(entry.flags & PE_PRESENT)
        assert entry.end - entry.addr <= MAX_PAGES * PAGE
        assert entry.offset == offset
        assert present == (not entry.flags & PE_PARENT and not (elsewhere and entry.flags & PE_LAZY))
        offset += present * (entry.end - entry.addr)
    assert pagemap.size == offset
    absent = [run.addr for run in runs if elsewhere and run.lazy and not run.in_parent]
    assert pagemap.elsewhere() == (absent[0] if absent else None)
    assert pagemap.is_complete == (not absent and not any(run.in_parent for run in runs))


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
        [{"vaddr": 2**64 - PAGE, "compat_nr_pages": 1}],
        [{"vaddr": 0, "compat_nr_pages": 1, "flags": 8}],
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
    pagemap = read_pagemap(ImageReader(NAME, writer.finish()[NAME]))
    assert list(pagemap.flags) == [PE_PRESENT, PE_PARENT]


# --- the two ways to read entries ---------------------------------------------------------------------------


def records(rows: Sequence[pb.pagemap_entry]) -> bytes:
    writer = ImageWriter()
    writer.create(NAME)
    head = len(writer.finish()[NAME])
    for row in rows:
        writer.add(NAME, row)
    return writer.finish()[NAME][head:]


def behind_head(data: bytes) -> ImageReader:
    writer = ImageWriter()
    writer.add(NAME, pb.pagemap_head(pages_id=1))
    reader = ImageReader(NAME, writer.finish()[NAME] + data)
    reader.message(pb.pagemap_head)
    return reader


@st.composite
def ordinary(draw: st.DrawFn) -> list[pb.pagemap_entry]:
    """Entries that are right, with any of the optional fields."""
    rows, addr = [], draw(st.sampled_from([0, 1 << 20, (1 << 47) - (1 << 30)])) * PAGE
    for _ in range(draw(st.integers(0, 6))):
        count = draw(st.integers(1, 300))
        row = pb.pagemap_entry(vaddr=addr, compat_nr_pages=draw(st.sampled_from([0, count])))
        if not row.compat_nr_pages or draw(st.booleans()):
            row.nr_pages = count
        if draw(st.booleans()):
            row.flags = draw(st.integers(0, 7))
        if draw(st.booleans()):
            row.in_parent = draw(st.booleans())
        rows.append(row)
        addr += (count + draw(st.integers(0, 2))) * PAGE
    return rows


@given(ordinary())
def test_ordinary_entries_are_read_in_c_and_as_by_protobuf(rows: list[pb.pagemap_entry]) -> None:
    data = records(rows)
    quick = read_in_c(1, memoryview(data))
    assert quick == read_messages(1, behind_head(data))
    assert quick is not None
    assert to_extents(quick) == merge(
        Extent(e.addr, (e.end - e.addr) // PAGE, bool(e.flags & PE_LAZY), bool(e.flags & PE_PARENT))
        for e in quick
    )


def agree(data: bytes) -> None:
    """What C reads, protobuf reads too, and what protobuf refuses, C does not read."""
    try:
        slow = read_messages(1, behind_head(data))
    except ImageError:
        slow = None
    quick = read_in_c(1, memoryview(data))
    assert quick is None or quick == slow


@given(
    ordinary(), st.lists(st.tuples(st.integers(0, 120), st.integers(0, 255)), max_size=3), st.integers(0, 20)
)
def test_no_garbled_entry_is_read_in_c(
    rows: list[pb.pagemap_entry], changes: list[tuple[int, int]], lost: int
) -> None:
    data = bytearray(records(rows))
    for at, byte in changes:
        if at < len(data):
            data[at] = byte
    agree(bytes(data[: len(data) - lost]))


@pytest.mark.parametrize(
    "body",
    [
        b"\x08" + b"\x80" * 9 + b"\x02\x10\x01",  # an address of 65 bits
        b"\x08" + b"\x80" * 10 + b"\x00\x10\x01",  # in eleven bytes
        b"\x08\x00\x10\x80\x80\x80\x80\x10",  # 2^32 pages in a field of 32 bits, which protobuf reads as 0
        b"\x08\x00\x10\x01\x20\x84\x80\x80\x80\x10",  # flags of 2^32 + 4, which it reads as 4
        b"\x08\x00\x10\x01\x28\x81\x80\x80\x80\x80\x80\x80\x10",  # 2^52 + 1 pages
        b"\x08\x00",
        b"\x10\x01",
        b"\x08",
        b"",
    ],
)
def test_numbers_beyond_their_limits_are_left_to_protobuf(body: bytes) -> None:
    data = len(body).to_bytes(4, "little") + body
    assert read_in_c(1, memoryview(data)) is None
    agree(data)


def test_a_parent_is_whatever_is_true() -> None:
    body = b"\x08\x00\x10\x01\x18\x80\x80\x80\x80\x10"  # in_parent is 2^32
    data = len(body).to_bytes(4, "little") + body
    quick = read_in_c(1, memoryview(data))
    assert quick == read_messages(1, behind_head(data))
    assert quick is not None
    assert list(quick.flags) == [PE_PARENT]


def test_unusual_entries_are_left_to_protobuf() -> None:
    """Fields in another order or twice are no mistake; what is unknown may say that the pages lie elsewhere."""
    one = pb.pagemap_entry(vaddr=PAGE, compat_nr_pages=1, flags=PE_PRESENT).SerializeToString()
    count, rest = one[:3], one[3:]
    assert count + rest == one
    for body in (rest + count, one + one):
        reader = behind_head(len(body).to_bytes(4, "little") + body)
        assert read_in_c(1, reader.ahead) is None
        assert list(read_messages(1, reader)) == [Entry(PAGE, 2 * PAGE, 0, PE_PRESENT)]
    body = one + b"\x78\x01"
    reader = behind_head(len(body).to_bytes(4, "little") + body)
    assert read_in_c(1, reader.ahead) is None
    with pytest.raises(ImageError, match="field 15 of pagemap_entry"):
        read_messages(1, reader)


def test_compressed_entries_in_either_layout() -> None:
    """Of 5 pages in blocks of 2: zeros, LZ4, and a single page as it is. The other entry begins with a whole page."""
    writer = ImageWriter()
    writer.add(NAME, pb.pagemap_head(pages_id=1))
    newer = pb.pagemap_entry(vaddr=0, compat_nr_pages=5, flags=PE_PRESENT)
    newer.blocks.block_sizes.extend([0, 100, PAGE])
    newer.blocks.total_payload_size, newer.blocks.pages_per_block = 100 + PAGE, 2
    writer.add(NAME, newer)
    older = pb.pagemap_entry_2895(vaddr=8 * PAGE, compat_nr_pages=2, flags=PE_PRESENT | 8)
    older.compressed_size.extend([7, 0])
    older.total_compressed_size = 7
    writer.add(NAME, older)
    pagemap = read_pagemap(ImageReader(NAME, writer.finish()[NAME]))
    assert pagemap.packed is not None
    assert [(item.offset, item.held, item.pages, list(item.sizes)) for item in pagemap.packed] == [
        (0, 5, 2, [0, 100, PAGE]),
        (2 * PAGE, 2, 1, [7, 0]),
    ]
    assert pagemap.stored_size == 2 * PAGE + 7
    assert pagemap.size == 7 * PAGE
    assert list(pagemap.flags) == [PE_PRESENT, PE_PRESENT]


@pytest.mark.parametrize(
    ("sizes", "total", "pages"),
    [
        ([1, 1], 2, 2),
        ([1, 1, 1], 4, 2),
        ([1], 1, 0),
        ([1], 1, 5000),
        ([0, 0, PAGE + 1], PAGE + 1, 2),
        ([], 5, 2),
    ],
)
def test_impossible_blocks_are_refused(sizes: list[int], total: int, pages: int) -> None:
    writer = ImageWriter()
    writer.add(NAME, pb.pagemap_head(pages_id=1))
    entry = pb.pagemap_entry(vaddr=0, compat_nr_pages=5, flags=PE_PRESENT)
    entry.blocks.block_sizes.extend(sizes)
    entry.blocks.total_payload_size, entry.blocks.pages_per_block = total, pages
    writer.add(NAME, entry)
    with pytest.raises(ImageError, match="compressed block"):
        read_pagemap(ImageReader(NAME, writer.finish()[NAME]))


# --- chains of folders --------------------------------------------------------------------------------------


def pagemap_of(flags: list[int]) -> Pagemap:
    """Page n has flags[n]; 0 means that there is no entry for it."""
    rows, offset = [], 0
    for page, flag in enumerate(flags):
        if flag:
            rows.append((page * PAGE, (page + 1) * PAGE, offset))
        offset += PAGE if flag == PE_PRESENT else 0
    addrs, ends, offsets = (array("Q", (row[index] for row in rows)) for index in range(3))
    return Pagemap(1, addrs, ends, offsets, bytes(filter(None, flags)))


@given(
    st.lists(
        st.lists(st.sampled_from([0, PE_PRESENT, PE_PARENT, PE_LAZY]), min_size=12, max_size=12),
        min_size=1,
        max_size=4,
    )
)
def test_pages_are_found_in_the_newest_layer_that_has_them(flags: list[list[int]]) -> None:
    layers = [pagemap_of(row) for row in flags]
    offsets = [{entry.addr: entry.offset for entry in layer} for layer in layers]
    expected = {}
    for page in range(12):
        layer = 0
        while layer < len(flags) and flags[layer][page] == PE_PARENT:
            layer += 1
        if layer == len(flags) or (layer and flags[layer][page] in (0, PE_LAZY)):
            with pytest.raises(ImageError, match="in no parent"):
                locate(layers)
            return
        if flags[layer][page] == PE_PRESENT:
            expected[page * PAGE] = (layer, offsets[layer][page * PAGE])
    found = {addr: (layer, offset) for addr, offset, layer in pages_of(locate(layers))}
    assert found == expected


def pages_of(located: Located) -> list[tuple[int, int, int]]:
    """Address, offset and layer of every page."""
    return [
        (addr + at, offset + at, layer)
        for addr, end, offset, layer in zip(*located, strict=True)
        for at in range(0, end - addr, PAGE)
    ]
