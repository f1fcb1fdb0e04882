"""The pages that `criu restore --lazy-pages` leaves out, in a folder of images; some may be at a page server only."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

from lazyproc.images.files import Folder
from lazyproc.images.lazy import LazyMemory, lazy_memory
from lazyproc.images.pagemap import merge, to_extents
from lazyproc.model import PAGE, Extent, MemoryObject, ObjectKind
from lazyproc.pages import PageSource
from lazyproc.pages.images import ImagePages


class PrivatePages(ImagePages):
    """A PageSource of the private anonymous memory of every process there. Raises what ImagePages raises."""

    def __init__(self, directory: Path) -> None:
        folder = Folder(directory)
        self.images = folder.read()
        self.memory: tuple[LazyMemory, ...] = lazy_memory(self.images)
        super().__init__(folder, [object_of(each) for each in self.memory if each.ranges is not None])
        try:
            self._pagemaps = dict(self.pagemaps())
            for each in self.memory:
                if each.ranges is not None:
                    each.demand_covers(to_extents(self._pagemaps[object_of(each)]).where(lazy=True))
        except BaseException:
            self.close()
            raise

    def extents(self) -> Mapping[MemoryObject, tuple[Extent, ...]]:
        """All lazy, wherever they are: what the restorer has put in place itself is found there, and what it has not is
        not taken for zeros.
        """
        return {
            obj: merge(Extent(entry.addr, (entry.end - entry.addr) // PAGE, lazy=True) for entry in pagemap)
            for obj, pagemap in self.pagemaps()
        }

    def lacks(self, obj: MemoryObject, addr: int) -> bool:
        """Whether the page is at a page server only."""
        pagemap = self._pagemaps.get(obj)
        return pagemap is not None and pagemap.elsewhere(addr, addr + PAGE) is not None

    def identity(self) -> dict[str, list[int]]:
        """As lazyproc.migrate.identity has it, of processes that nobody here could restore."""
        return {
            str(each.vpid): [
                zlib.crc32(self.images.get(f"{kind}-{each.vpid}.img", b""), each.vpid)
                for kind in ("mm", "core")
            ]
            for each in self.memory
        }


class WithServer:
    """A PageSource, page by page: what `here` lacks comes from `there`."""

    def __init__(self, here: PrivatePages, there: PageSource) -> None:
        self._here = here
        self._there = there

    def extents(self) -> Mapping[MemoryObject, tuple[Extent, ...]]:
        return self._here.extents()

    def read(self, obj: MemoryObject, addr: int, count: int) -> bytes:
        """See PageSource.read."""
        pages = (addr + page * PAGE for page in range(count))
        return b"".join(
            (self._there if self._here.lacks(obj, at) else self._here).read(obj, at, 1) for at in pages
        )


def object_of(memory: LazyMemory) -> MemoryObject:
    return MemoryObject(ObjectKind.TASK, memory.vpid)
