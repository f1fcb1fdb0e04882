"""Pages of another host, asked for one run at a time: the plain client of a page server.

The pager (lazyproc.uffd) is the fast one; this is for whoever wants pages as bytes, a checkpoint of a
remote tree for instance.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice

from lazyproc.errors import ConnectionLost, ImageError, ProtocolError
from lazyproc.model import PAGE, Extent, MemoryObject
from lazyproc.pages.channel import Channel
from lazyproc.pages.server import crc32c
from lazyproc.wire.frame import MAX_PAGES, Flag
from lazyproc.wire.native import (
    MAP_MAX,
    MAP_PART,
    PARTS,
    Close,
    Get,
    Map,
    MapEntry,
    Pages,
    memory_object,
)


class RemotePages:
    """A PageSource over an URGENT or BULK channel whose handshake is done. One thread at a time.

    `extents` comes from the MAP of the control channel, see `extents_of`. Closing the channel is the
    caller's.
    """

    def __init__(
        self, channel: Channel, extents: Mapping[MemoryObject, tuple[Extent, ...]], *, timeout: float = 30
    ) -> None:
        self._channel = channel
        self._extents = extents
        self._timeout = timeout  # seconds without a byte of an answer
        self._tag = 0

    def extents(self) -> Mapping[MemoryObject, tuple[Extent, ...]]:
        return self._extents

    def read(self, obj: MemoryObject, addr: int, count: int) -> bytes:
        """`count` pages.

        Raises ImageError for pages that the server does not have, ConnectionLost, ProtocolError.
        """
        data = bytearray(count * PAGE)
        view = memoryview(data)
        for start in range(0, count, MAX_PAGES):
            pages = min(MAX_PAGES, count - start)
            self._fetch(obj, addr + start * PAGE, view[start * PAGE : (start + pages) * PAGE])
        return bytes(data)

    def finish(self) -> None:
        """Tells the server that nothing more will be asked."""
        self._channel.send(Close())

    def _fetch(self, obj: MemoryObject, addr: int, view: memoryview) -> None:
        """One GET and its whole answer, so that the channel is in step again whatever the answer is."""
        self._tag = (self._tag + 1) % (1 << 32)
        self._channel.send(Get(obj.key, addr, len(view) // PAGE, self._tag))
        absent: list[int] = []
        done = 0
        while done < len(view):
            part = self._receive(obj, addr + done, (len(view) - done) // PAGE)
            run = view[done : done + part.count * PAGE]
            if part.flags & Flag.ABSENT:
                absent.append(part.addr)
            if part.payload:
                self._receive_content(part, run)
            done += len(run)
        if absent:
            raise ImageError(
                f"the server does not have the page at {absent[0]:#x} of {obj.kind.name.lower()} {obj.id}",
                where=self._channel.peer,
            )

    def _receive(self, obj: MemoryObject, addr: int, left: int) -> Pages:
        part = self._channel.receive(self._timeout)
        if part is None:
            raise ConnectionLost(f"no answer for {self._timeout} s", where=self._channel.peer)
        if not isinstance(part, Pages) or (part.object, part.addr, part.tag) != (obj.key, addr, self._tag):
            raise ProtocolError(f"{part} does not answer what was asked", where=self._channel.peer)
        if part.flags & Flag.UNDER_WAY:
            raise ProtocolError(f"{part} is on no other way here", where=self._channel.peer)
        if part.count > left or bool(part.flags & Flag.LAST) != (part.count == left):
            raise ProtocolError(f"{part} does not fit {left} pages", where=self._channel.peer)
        return part

    def _receive_content(self, part: Pages, run: memoryview) -> None:
        self._channel.receive_pages(run, self._timeout)
        if crc32c(run) != part.crc:
            raise ProtocolError(f"the checksum of {part} is wrong", where=self._channel.peer)


class Maps:
    """The MAP of a peer, whatever its revision, heard part by part."""

    def __init__(self, revision: int) -> None:
        self._revision = revision
        self._entries: list[MapEntry] = []

    def hear(self, event: Map) -> bool:
        """Whether that was the last part. Raises ProtocolError."""
        self._entries += event.entries
        if len(self._entries) > MAP_MAX:
            raise ProtocolError(f"MAP has more than {MAP_MAX} entries")
        return self._revision < PARTS or len(event.entries) != MAP_PART

    def extents(self) -> dict[MemoryObject, tuple[Extent, ...]]:
        """Of lazy pages."""
        return extents_of(self._entries)


def extents_of(entries: Iterable[MapEntry]) -> dict[MemoryObject, tuple[Extent, ...]]:
    """What MAP says, as extents of lazy pages."""
    result: dict[MemoryObject, list[Extent]] = {}
    for entry in entries:
        extent = Extent(entry.addr, entry.pages, lazy=True)
        result.setdefault(memory_object(entry.object), []).append(extent)
    return {obj: tuple(extents) for obj, extents in result.items()}


def maps_of(extents: Mapping[MemoryObject, Sequence[Extent]], revision: int) -> Iterator[Map]:
    """The MAP of the lazy pages among `extents`, for a peer of that revision. A large one is long under way: in parts
    the peer hears from us meanwhile.
    """
    entries = (
        MapEntry(obj.key, extent.addr, extent.count)
        for obj in extents
        for extent in extents[obj]
        if extent.lazy
    )
    size = MAP_PART if revision >= PARTS else None
    while True:
        part = Map(list(islice(entries, size)))
        yield part
        if len(part.entries) != size:
            return
