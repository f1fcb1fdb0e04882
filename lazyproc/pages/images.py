"""Pages that lie in a folder of images, and the writing of them.

The runs that a pagemap marks PRESENT lie one after the other in pages-<pages_id>.img; what it marks PARENT
lies in the folder that the link `parent` names (CRIU 4.2: criu/pagemap.c).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self, TypeVar

from lazyproc.errors import ImageError
from lazyproc.facts import dataclass
from lazyproc.images.convert import memory_objects, pagemap_name
from lazyproc.images.draft import Draft
from lazyproc.images.files import Folder, ImageReader
from lazyproc.images.pagemap import PE_LAZY, Entry, Located, find, locate, merge, read_pagemap
from lazyproc.model import PAGE, Checkpoint, Extent, MemoryObject
from lazyproc.pages import PageSource

_PIECE = 256  # pages that are read and written at once: 1 MiB
_MAX_PARENTS = 1024

R = TypeVar("R", Entry, Located)


class Segment(NamedTuple):
    """A run of an object's pages in a file: addresses start to end lie from `offset` on in `fd`."""

    key: int
    start: int
    end: int
    fd: int
    offset: int


@dataclass(frozen=True, slots=True)
class _Object:
    """One object: the newest pagemap, where the pages lie, and the pages image of each layer."""

    entries: tuple[Entry, ...]
    located: tuple[Located, ...]
    fds: tuple[int, ...]


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
                Extent(entry.addr, entry.count, bool(entry.flags & PE_LAZY))
                for entry in held.entries
                if entry.flags & ~PE_LAZY
            )
            for obj, held in self._objects.items()
        }

    def segments(self) -> list[Segment]:
        """Every run of pages with the file it lies in, sorted by object key and address; for C code.

        The descriptors belong to this object and are open until close(). Raises ImageError for a page that is only at
        a page server.
        """
        for obj, held in self._objects.items():
            _demand_here(obj, held.entries)
        return sorted(
            Segment(obj.key, run.addr, run.end, held.fds[run.layer], run.offset)
            for obj, held in self._objects.items()
            for run in held.located
        )

    def read(self, obj: MemoryObject, addr: int, count: int) -> bytes:
        """See PageSource. Raises ImageError for a page that is only at a page server."""
        end = addr + count * PAGE
        held = self._objects.get(obj, _NOTHING)
        _demand_here(obj, _between(held.entries, addr, end))
        parts, at = [], addr
        for run in _between(held.located, addr, end):
            first, last = max(run.addr, at), min(run.end, end)
            parts.append(bytes(first - at))
            parts.append(_pread(held.fds[run.layer], last - first, run.offset + first - run.addr, obj))
            at = last
        parts.append(bytes(end - at))
        return b"".join(parts)

    def _open_object(self, obj: MemoryObject, chain: Sequence[Folder]) -> _Object:
        name = pagemap_name(obj)
        layers: list[tuple[Entry, ...]] = []
        fds: list[int] = []
        for folder in chain:
            if layers and not (folder.path / name).exists():
                break  # the object is younger than that pre-dump
            pages_id, entries = read_pagemap(ImageReader(name, folder.contents(name)))
            size = sum(entry.count for entry in entries if entry.present) * PAGE
            layers.append(entries)
            fds.append(self._open_pages(folder, f"pages-{pages_id}.img", size))
        return _Object(layers[0], locate(layers), tuple(fds))

    def _open_pages(self, folder: Folder, name: str, size: int) -> int:
        """A descriptor of the pages image, which has to be at least `size` bytes long."""
        path = folder.path / name
        if path not in self._fds:
            self._fds[path] = folder.open(name, os.O_RDONLY)
            self._stack.callback(os.close, self._fds[path])
        held = os.fstat(self._fds[path]).st_size
        if held < size:
            raise ImageError(
                f"truncated: {size} bytes expected, {held} there",
                where=str(path),
                remedy="copy the whole folder of the checkpoint",
            )
        return self._fds[path]


_NOTHING = _Object((), (), ())


def _demand_here(obj: MemoryObject, entries: Iterable[Entry]) -> None:
    for entry in entries:
        if not entry.flags & ~PE_LAZY:
            raise ImageError(
                f"the page {entry.addr:#x} is not in the images but at a page server",
                where=pagemap_name(obj),
                remedy="restore with --from HOST:PORT",
            )


def _between(runs: Sequence[R], start: int, end: int) -> Iterator[R]:
    """The sorted runs that touch the addresses from start to end."""
    for run in islice(runs, find(runs, start), None):
        if run.addr >= end:
            return
        yield run


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
        draft.write_file(f"pages-{pages_id}.img", _pieces(obj, extents, source))
        written += sum(extent.count for extent in extents)
    return written


def _pieces(obj: MemoryObject, extents: Sequence[Extent], source: PageSource) -> Iterator[bytes]:
    for extent in extents:
        for done in range(0, extent.count, _PIECE):
            count = min(_PIECE, extent.count - done)
            yield source.read(obj, extent.addr + done * PAGE, count)
