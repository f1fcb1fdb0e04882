"""The pages that `criu restore --lazy-pages` leaves out, in a folder of images."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

from lazyproc.facts import replace
from lazyproc.images.files import Folder
from lazyproc.images.lazy import LazyMemory, lazy_memory
from lazyproc.model import Extent, MemoryObject, ObjectKind
from lazyproc.pages.images import ImagePages
from lazyproc.runs import Extents


class PrivatePages(ImagePages):
    """A PageSource of the private anonymous memory of every process there. Raises what ImagePages raises."""

    def __init__(self, directory: Path) -> None:
        folder = Folder(directory)
        self.images = folder.read()
        self.memory: tuple[LazyMemory, ...] = lazy_memory(self.images)
        super().__init__(folder, [object_of(each) for each in self.memory if each.ranges is not None])
        try:
            found = super().extents()
            for each in self.memory:
                each.demand_covers(Extents.of(found.get(object_of(each), ())).where(lazy=True))
        except BaseException:
            self.close()
            raise

    def extents(self) -> Mapping[MemoryObject, tuple[Extent, ...]]:
        """All lazy: what the restorer has put in place itself is found there, and what it has not is not taken for
        zeros.
        """
        return {
            obj: tuple(replace(extent, lazy=True) for extent in runs)
            for obj, runs in super().extents().items()
        }

    def identity(self) -> dict[str, list[int]]:
        """As lazyproc.migrate.identity has it, of processes that nobody here could restore."""
        return {
            str(each.vpid): [
                _sum(each.vpid, self.images.get(f"{kind}-{each.vpid}.img", b"")) for kind in ("mm", "core")
            ]
            for each in self.memory
        }


def object_of(memory: LazyMemory) -> MemoryObject:
    return MemoryObject(ObjectKind.TASK, memory.vpid)


def _sum(vpid: int, image: bytes) -> int:
    return zlib.crc32(image, vpid)
