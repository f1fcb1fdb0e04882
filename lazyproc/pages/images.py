"""Pages that lie in a folder of images, and the writing of them.

The runs that a pagemap marks PRESENT lie one after the other in pages-<pages_id>.img; what it marks PARENT
lies in the folder that the link `parent` names (CRIU 4.2: criu/pagemap.c).
"""

from __future__ import annotations

import os
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Self

from lazyproc.errors import ImageError
from lazyproc.facts import dataclass
from lazyproc.images.convert import memory_objects, pagemap_name
from lazyproc.images.draft import Draft
from lazyproc.images.files import Folder, ImageReader
from lazyproc.images.pagemap import PE_LAZY, Located, Pagemap, locate, merge, read_pagemap
from lazyproc.model import PAGE, Checkpoint, Extent, MemoryObject
from lazyproc.pages import PageSource
from lazyproc.runs import Segments, interleaved

_PIECE = 256  # pages that are read and written at once: 1 MiB
_MAX_PARENTS = 1024
_ZEROS = bytes(PAGE)


@dataclass(frozen=True, slots=True)
class _Object:
    """One object: the newest pagemap, where the pages lie, and the pages image of each layer."""

    pagemap: Pagemap
    located: Located
    fds: tuple[int, ...]

    def rows(self, key: int) -> array[int]:
        """As Segments has them."""
        addrs, ends, offsets, layers = self.located
        one_folder = len(self.fds) == 1  # as without a pre-dump
        fds = array("Q", self.fds) * len(addrs) if one_folder else array("Q", [self.fds[n] for n in layers])
        return interleaved(array("Q", [key]) * len(addrs), addrs, ends, fds, offsets)


class ImagePages:
    """The pages of `objects` in a folder of images and its parents; a PageSource and a context manager.

    Raises ImageError when a pagemap is garbled, a pages image too short, or a parent missing.
    """

    def __init__(self, folder: Folder, objects: Sequence[MemoryObject]) -> None:
        self._stack = ExitStack()
        self._fds: dict[Path, int] = {}
        self._objects: dict[MemoryObject, _Object] = {}
        try:
            chain = _chain(folder)
            for obj in objects:
                self._objects[obj] = self._open_object(obj, chain)
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
        return {
            obj: merge(
                Extent(entry.addr, (entry.end - entry.addr) // PAGE, bool(entry.flags & PE_LAZY))
                for entry in held.pagemap
                if entry.flags & ~PE_LAZY
            )
            for obj, held in self._objects.items()
        }

    def segments(self) -> Segments:
        """Every run of pages with the file it lies in, sorted by object key and address; for C code.

        The descriptors belong to this object and are open until close(). Raises ImageError for a page that is only at
        a page server.
        """
        for obj, held in self._objects.items():
            _demand_here(obj, held.pagemap.elsewhere())
        return self.segments_here()

    def segments_here(self) -> Segments:
        """The same, without what is only at a page server."""
        rows = array("Q")
        for obj, held in sorted(self._objects.items(), key=lambda item: item[0].key):
            rows += held.rows(obj.key)
        return Segments(rows)

    def pagemaps(self) -> Iterator[tuple[MemoryObject, Pagemap]]:
        """The newest of every object."""
        for obj, held in self._objects.items():
            yield obj, held.pagemap

    def read(self, obj: MemoryObject, addr: int, count: int) -> bytes:
        """See PageSource. Raises ImageError for a page that is only at a page server."""
        if obj not in self._objects:
            return bytes(count * PAGE)
        end = addr + count * PAGE
        held = self._objects[obj]
        _demand_here(obj, held.pagemap.elsewhere(addr, end))
        addrs, ends, offsets, layers = held.located
        parts, at = [], addr
        for index in range(bisect_right(ends, addr), bisect_left(addrs, end)):
            first, last = max(addrs[index], at), min(ends[index], end)
            parts.append(bytes(first - at))
            parts.append(
                _pread(held.fds[layers[index]], last - first, offsets[index] + first - addrs[index], obj)
            )
            at = last
        parts.append(bytes(end - at))
        return b"".join(parts)

    def _open_object(self, obj: MemoryObject, chain: Sequence[Folder]) -> _Object:
        name = pagemap_name(obj)
        layers: list[Pagemap] = []
        fds: list[int] = []
        for folder in chain:
            if layers and not os.path.lexists(folder.path / name):
                break  # the object is younger than that pre-dump
            layers.append(read_pagemap(ImageReader(name, folder.contents(name))))
            fds.append(self._open_pages(folder, layers[-1]))
        return _Object(layers[0], locate(layers), tuple(fds))

    def _open_pages(self, folder: Folder, pagemap: Pagemap) -> int:
        """A descriptor of the pages image, which has to be long enough; of its pages in the plain, if compressed."""
        name = f"pages-{pagemap.pages_id}.img"
        path = folder.path / name
        if path in self._fds:
            return self._fds[path]
        fd = self._fds[path] = folder.open(name, os.O_RDONLY)
        self._stack.callback(os.close, fd)
        held = os.fstat(fd).st_size
        if held < pagemap.stored_size:
            raise ImageError(
                f"truncated: {pagemap.stored_size} bytes expected, {held} there",
                where=str(path),
                remedy="copy the whole folder of the checkpoint",
            )
        if pagemap.packed is not None:
            from lazyproc.pages.unpack import unpacked  # ctypes, tempfile: few images are compressed

            fd = self._fds[path] = unpacked(folder, name, fd, pagemap.packed)
            self._stack.callback(os.close, fd)
        return fd


def _demand_here(obj: MemoryObject, elsewhere: int | None) -> None:
    if elsewhere is not None:
        raise ImageError(
            f"the page {elsewhere:#x} is not in the images but at a page server",
            where=pagemap_name(obj),
            remedy="restore with --from HOST:PORT",
        )


def _pread(fd: int, length: int, offset: int, obj: MemoryObject) -> bytes:
    # pread and not a mapping: a file that is cut short meanwhile is an error here and would be a SIGBUS there.
    data = os.pread(fd, length, offset)
    if len(data) != length:
        raise ImageError("the pages image was cut short", where=pagemap_name(obj), remedy="copy it again")
    return data


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


# --- writing ----------------------------------------------------------------------------------------------


def write_pages(draft: Draft, checkpoint: Checkpoint, source: PageSource, *, lazy: bool = True) -> int:
    """Writes pages-*.img; returns how many pages it wrote. The pagemaps are images like others: see to_images.

    With `lazy` False only the eager pages are written; the pagemaps must then say that the lazy ones are elsewhere.
    """
    written = 0
    for pages_id, obj in enumerate(memory_objects(checkpoint), start=1):
        extents = [
            extent
            for extent in merge(checkpoint.memory.get(obj, ()))
            if not extent.in_parent and (lazy or not extent.lazy)
        ]
        pieces = (data for _, data in _pieces(obj, extents, source))
        draft.write_file(f"pages-{pages_id}.img", pieces)
        written += sum(extent.count for extent in extents)
    return written


def write_content(
    draft: Draft,
    objects: Iterable[MemoryObject],
    memory: Mapping[MemoryObject, Sequence[Extent]],
    source: PageSource,
) -> dict[MemoryObject, tuple[Extent, ...]]:
    """Writes pages-*.img of these objects, in their order, without pages of zeros; which pages it wrote."""
    found: dict[MemoryObject, tuple[Extent, ...]] = {}
    for pages_id, obj in enumerate(objects, start=1):
        kept: list[Extent] = []
        draft.write_file(f"pages-{pages_id}.img", _content(obj, memory.get(obj, ()), source, kept))
        found[obj] = tuple(merge(kept))
    return found


def _content(
    obj: MemoryObject, extents: Sequence[Extent], source: PageSource, kept: list[Extent]
) -> Iterator[bytes]:
    """The pages that are not zeros; which, is `kept`."""
    for addr, data in _pieces(obj, extents, source):
        at = 0
        pages = (data[place : place + PAGE] == _ZEROS for place in range(0, len(data), PAGE))
        for zeros, run in groupby(pages):
            start, at = at, at + PAGE * len(list(run))
            if not zeros:
                kept.append(Extent(addr + start, (at - start) // PAGE, lazy=True))
                yield data[start:at]


def _pieces(obj: MemoryObject, extents: Sequence[Extent], source: PageSource) -> Iterator[tuple[int, bytes]]:
    """Each with its address."""
    for extent in extents:
        for done in range(0, extent.count, _PIECE):
            count = min(_PIECE, extent.count - done)
            addr = extent.addr + done * PAGE
            yield addr, source.read(obj, addr, count)
