"""A chain of folders as pre-dumps leave it, made of whole dumps: without soft-dirty bits CRIU makes none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lazyproc.images.files import Folder, ImageReader, ImageWriter
from lazyproc.images.pagemap import PE_PARENT, PE_PRESENT, Pagemap, read_pagemap
from lazyproc.images.pb import process_pb2 as pb
from lazyproc.model import PAGE


def chain(newer: Path, older: Path) -> int:
    """Makes `older` the parent of `newer`, which from then on has only the pages that differ; how many lie in the
    parent. Both are whole, so make the newest link first.
    """
    (newer / "parent").symlink_to(f"../{older.name}")
    return sum(_thin(newer, older, name) for name in _pagemaps(newer) if (older / name).exists())


def dedup(newer: Path, older: Path) -> int:
    """As `criu dedup`: what `newer` has itself becomes a hole in `older` (here: garbage). How many pages that are."""
    spoilt = 0
    for name in _pagemaps(newer):
        if (older / name).exists():
            _, pages = _read(newer, name)
            before, offsets = _read(older, name)
            with open(older / f"pages-{before.pages_id}.img", "r+b") as file:
                for addr in pages.keys() & offsets.keys():
                    file.seek(offsets[addr])
                    file.write(b"\xee" * PAGE)
                    spoilt += 1
    return spoilt


def _pagemaps(folder: Path) -> list[str]:
    return [name for name in Folder(folder).read() if name.startswith("pagemap-")]


def _read(folder: Path, name: str) -> tuple[Pagemap, dict[int, int]]:
    """A pagemap, and where each of its present pages lies in the pages image."""
    pagemap = read_pagemap(ImageReader(name, (folder / name).read_bytes()))
    offsets = {
        addr: entry.offset + addr - entry.addr
        for entry in pagemap
        if entry.flags & PE_PRESENT
        for addr in range(entry.addr, entry.end, PAGE)
    }
    return pagemap, offsets


def _thin(newer: Path, older: Path, name: str) -> int:
    pagemap, _ = _read(newer, name)
    old, old_offsets = _read(older, name)
    content = (newer / f"pages-{pagemap.pages_id}.img").read_bytes()
    before = (older / f"pages-{old.pages_id}.img").read_bytes()
    writer, kept, same = ImageWriter(), bytearray(), 0
    writer.add(name, pb.pagemap_head(pages_id=pagemap.pages_id))
    for addr, flags, offset in _single_pages(pagemap):
        page = content[offset : offset + PAGE]
        there = old_offsets.get(addr)
        if there is not None and before[there : there + PAGE] == page:
            flags, same = PE_PARENT, same + 1  # CRIU marks no such page as lazy (criu/page-xfer.c)
        else:
            kept += page
        writer.add(name, pb.pagemap_entry(vaddr=addr, compat_nr_pages=1, nr_pages=1, flags=flags))
    (newer / name).write_bytes(writer.finish()[name])
    (newer / f"pages-{pagemap.pages_id}.img").write_bytes(kept)
    return same


def _single_pages(pagemap: Pagemap) -> Iterator[tuple[int, int, int]]:
    for entry in pagemap:
        assert entry.flags & PE_PRESENT
        for addr in range(entry.addr, entry.end, PAGE):
            yield addr, entry.flags, entry.offset + addr - entry.addr
