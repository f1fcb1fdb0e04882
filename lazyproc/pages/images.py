"""Pages that lie in a folder of images, and the writing of them.

The pages of object n are in pages-<n>.img, the runs that the pagemap marks PRESENT one after the other; what is
marked PARENT lies in the folder that the link `parent` names (CRIU 4.2: criu/pagemap.c).
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple, Self

from lazyproc.errors import ImageError
from lazyproc.images.convert import memory_objects, pagemap_images, pagemap_name
from lazyproc.images.files import Folder, ImageReader
from lazyproc.images.pagemap import PE_LAZY, Entry, Located, find, locate, merge, read_pagemap, to_extents
from lazyproc.model import PAGE, Checkpoint, Extent, MemoryObject
from lazyproc.pages import PageSource

_LAZY_ONLY = PE_LAZY  # flags of an entry whose pages are nowhere in the images
_PIECE = 256  # pages that are read and written at once: 1 MiB
_MAX_PARENTS = 1024


class Segment(NamedTuple):
    """A run of an object's pages in a file: addresses start to end lie from `offset` on in `fd`."""

    key: int
    start: int
    end: int
    fd: int
    offset: int


@dataclass(frozen=True, slots=True)
class _PagesFile:
    fd: int
    view: mmap.mmap | None  # None: an empty file cannot be mapped


class ImagePages:
    """The pages of `objects` in a folder of images and its parents; a PageSource and a context manager.

    Raises ImageError when a pagemap is garbled, a pages image too short, or a parent missing.
    """

    def __init__(self, folder: Folder, objects: Sequence[MemoryObject]) -> None:
        self._stack = ExitStack()
        self._files: dict[tuple[int, int], _PagesFile] = {}
        self._extents: dict[MemoryObject, tuple[Extent, ...]] = {}
        self._located: dict[MemoryObject, tuple[tuple[Located, _PagesFile], ...]] = {}
        self._entries: dict[MemoryObject, tuple[Entry, ...]] = {}
        try:
            chain = _chain(folder)
            for obj in objects:
                self._open_object(obj, chain)
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Gives back files and mappings; segments() are invalid from then on."""
        self._stack.close()

    def extents(self) -> Mapping[MemoryObject, tuple[Extent, ...]]:
        """The pages that lie here, including those in parents; those only at a page server are left out."""
        return self._extents

    def segments(self) -> list[Segment]:
        """Every run of pages with the file it lies in, sorted by object key and address; for C code.

        The descriptors belong to this object and are open until close().
        """
        runs = [
            Segment(obj.key, run.addr, run.end, file.fd, run.offset)
            for obj, located in self._located.items()
            for run, file in located
        ]
        return sorted(runs)

    def read(self, obj: MemoryObject, addr: int, count: int) -> bytes:
        """See PageSource. Raises ImageError for a page that is only at a page server."""
        end = addr + count * PAGE
        entries = self._entries.get(obj, ())
        for entry in entries[find(entries, addr) :]:
            if entry.addr >= end:
                break
            if not entry.flags & ~_LAZY_ONLY:
                raise ImageError(
                    f"the page {max(entry.addr, addr):#x} is not in the images but at a page server",
                    where=pagemap_name(obj),
                    remedy="restore with --from HOST:PORT",
                )
        parts, at = [], addr
        for run, file in self._runs(obj, addr, end):
            first, last = max(run.addr, at), min(run.end, end)
            parts.append(bytes(first - at))
            offset = run.offset + first - run.addr
            assert file.view is not None  # a run has at least one page, checked when it was opened
            parts.append(file.view[offset : offset + last - first])
            at = last
        parts.append(bytes(end - at))
        return b"".join(parts)

    def _runs(self, obj: MemoryObject, addr: int, end: int) -> Iterator[tuple[Located, _PagesFile]]:
        located = self._located.get(obj, ())
        for run, file in located[find([run for run, _ in located], addr) :]:
            if run.addr >= end:
                return
            yield run, file

    def _open_object(self, obj: MemoryObject, chain: Sequence[Folder]) -> None:
        name, layers, files = pagemap_name(obj), [], []
        for depth, folder in enumerate(chain):
            if depth and not (folder.path / name).exists():
                break  # the object is younger than that pre-dump
            pages_id, entries = read_pagemap(ImageReader(name, folder.contents(name)))
            size = sum(entry.count for entry in entries if entry.present) * PAGE
            files.append(self._open_pages(depth, folder, pages_id, size))
            layers.append(entries)
        self._entries[obj] = layers[0]
        self._located[obj] = tuple((run, files[run.layer]) for run in locate(layers))
        lazy = to_extents(entry for entry in layers[0] if entry.flags & ~_LAZY_ONLY)
        self._extents[obj] = merge(Extent(run.addr, run.count, run.lazy) for run in lazy)

    def _open_pages(self, depth: int, folder: Folder, pages_id: int, size: int) -> _PagesFile:
        """The pages image, at least `size` bytes long."""
        key = (depth, pages_id)
        if key not in self._files:
            name = f"pages-{pages_id}.img"
            fd = folder.open(name, os.O_RDONLY)
            self._stack.callback(os.close, fd)
            held = os.fstat(fd).st_size
            if held < size:
                raise ImageError(
                    f"truncated: {size} bytes expected, {held} there",
                    where=str(folder.path / name),
                    remedy="copy the whole folder of the checkpoint",
                )
            view = self._stack.enter_context(mmap.mmap(fd, held, prot=mmap.PROT_READ)) if held else None
            self._files[key] = _PagesFile(fd, view)
        return self._files[key]


def _chain(folder: Folder) -> list[Folder]:
    """The folder and its parents, newest first."""
    chain = [folder]
    while (parent := chain[-1].parent()) is not None:
        if len(chain) > _MAX_PARENTS:
            raise ImageError(
                "the links `parent` run in a circle", where=str(folder.path), remedy="mend the links"
            )
        chain.append(parent)
    return chain


# --- writing ------------------------------------------------------------------------------------------------


def write_pages(folder: Folder, checkpoint: Checkpoint, source: PageSource, *, lazy: bool = True) -> int:
    """Writes pages-*.img and the pagemaps that go with them; returns how many pages it wrote.

    With `lazy` False only the eager pages are written, and the lazy ones are said to be at a page server.
    On any error the pages images are removed again, so that no folder looks whole and is not.
    """
    written = 0
    names = [f"pages-{number}.img" for number in range(1, len(memory_objects(checkpoint)) + 1)]
    try:
        for name, obj in zip(names, memory_objects(checkpoint), strict=True):
            extents = [
                extent
                for extent in merge(checkpoint.memory.get(obj, ()))
                if not extent.in_parent and (lazy or not extent.lazy)
            ]
            written += _write_object(folder, name, obj, extents, source)
        folder.write(pagemap_images(checkpoint, lazy_elsewhere=not lazy))
    except BaseException:
        for name in names:
            folder.remove(name)
        raise
    return written


def _write_object(
    folder: Folder, name: str, obj: MemoryObject, extents: Sequence[Extent], source: PageSource
) -> int:
    fd = folder.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        with os.fdopen(fd, "wb", buffering=0) as file:
            for extent in extents:
                for done in range(0, extent.count, _PIECE):
                    count = min(_PIECE, extent.count - done)
                    data = memoryview(source.read(obj, extent.addr + done * PAGE, count))
                    while data:
                        data = data[file.write(data) :]
    except OSError as error:
        raise folder.failed(error, folder.path / name) from None
    return sum(extent.count for extent in extents)
