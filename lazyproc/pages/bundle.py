"""The pages that must be there before the first instruction, in one piece: they travel with the images."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

from lazyproc.errors import ImageError
from lazyproc.model import PAGE, Extent, MemoryObject, ObjectKind
from lazyproc.pages import PageSource

NAME = "pages-eager.img"  # among packed images; raw, in no image folder
LIMIT = 8192  # pages; what is beyond is asked for page range by page range
_COUNT = struct.Struct("<Q")
_KINDS = frozenset(ObjectKind)
_RUN = struct.Struct("<QQQ")  # MemoryObject.key, addr, pages


def pack_bundle(memory: Mapping[MemoryObject, Sequence[Extent]], source: PageSource) -> bytes:
    """The eager extents of `memory` with their pages, as many as fit: u64 count, count runs, then the pages."""
    runs: list[bytes] = []
    content: list[bytes] = []
    left = LIMIT
    for obj, extents in memory.items():
        for extent in extents:
            if not extent.lazy and extent.count <= left:
                left -= extent.count
                runs.append(_RUN.pack(obj.key, extent.addr, extent.count))
                content.append(source.read(obj, extent.addr, extent.count))
    return b"".join((_COUNT.pack(len(runs)), *runs, *content))


class BundledPages:
    """A PageSource: the bundle first, `beyond` for what is not in it. Raises ImageError for a garbled bundle."""

    def __init__(self, data: bytes, beyond: PageSource) -> None:
        self._beyond = beyond
        self._data = data
        self._offsets: dict[tuple[int, int], int] = {}  # (key, page address) -> offset
        (count,) = _COUNT.unpack_from(data) if len(data) >= _COUNT.size else (0,)
        at = _COUNT.size + count * _RUN.size
        if at > len(data):
            raise ImageError("is truncated", where=NAME, remedy="send it again")
        for index in range(count):
            key, addr, pages = _RUN.unpack_from(data, _COUNT.size + index * _RUN.size)
            if pages * PAGE > len(data) - at:
                raise ImageError("is truncated", where=NAME, remedy="send it again")
            if key & 0xFF not in _KINDS:
                raise ImageError(
                    f"has pages of {key:#x}, which is no memory object", where=NAME, remedy="send it again"
                )
            for page in range(pages):
                self._offsets[key, addr + page * PAGE] = at + page * PAGE
            at += pages * PAGE

    def extents(self) -> Mapping[MemoryObject, tuple[Extent, ...]]:
        """The bundle's own pages, one extent each."""
        found: dict[MemoryObject, tuple[Extent, ...]] = {}
        for key, addr in sorted(self._offsets):
            obj = MemoryObject(ObjectKind(key & 0xFF), key >> 8)
            found[obj] = (*found.get(obj, ()), Extent(addr, 1, lazy=False))
        return found

    def read(self, obj: MemoryObject, addr: int, count: int) -> bytes:
        """See PageSource.read."""
        offsets = [self._offsets.get((obj.key, addr + page * PAGE)) for page in range(count)]
        if None in offsets:
            return self._beyond.read(obj, addr, count)
        return b"".join(self._data[at : at + PAGE] for at in offsets if at is not None)
