"""Where pages come from.

Every source answers the same question, `read(object, address, count)`; a dump, a page server and a pager are
written against that and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from lazyproc.model import Extent, MemoryObject


class PageSource(Protocol):
    """Pages that can be asked for again until they are acknowledged."""

    def extents(self) -> Mapping[MemoryObject, Sequence[Extent]]:
        """Which pages have content; everything else is zero."""
        ...

    def read(self, obj: MemoryObject, addr: int, count: int) -> bytes:
        """`count` pages from the page-aligned `addr`: exactly count * 4096 bytes, holes as zeros.

        Raises ImageError or ConnectionLost when the pages cannot be had; never returns fewer or other bytes.
        """
        ...
