"""Which pages of a guest the other end has, and which go next: what its guest waits for, then what it is likely to wait
for, then all others. Sans-IO.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence

from lazyproc.errors import ProtocolError
from lazyproc.model import PAGE, Extent, MemoryObject
from lazyproc.pages import PageSource
from lazyproc.qemu.ram import Block
from lazyproc.qemu.stream import Received, Wanted, pages

_EMPTY, _CONTENT, _SENT = 0, 1, 2  # of a page: not sent, without and with content; sent
URGENT, BULK = 8, 16  # pages in one part, at most
NEAR = 16  # pages that lie side by side, of which a system that comes to life often waits for more than one
ALIVE = 512  # pages that a guest has waited for: from here on clones are no longer alike


class PagesLeft:
    """`total` are the pages with content, `urgent` and `bulk` of them went, `zero` were asked for and have none."""

    def __init__(
        self, blocks: Sequence[Block], extents: Mapping[MemoryObject, Sequence[Extent]], source: PageSource
    ) -> None:
        self._source = source
        self._blocks = {block.name: block for block in blocks}
        self._pages = {block.name: bytearray(block.used // PAGE) for block in blocks}
        for block in blocks:
            states = self._pages[block.name]
            for extent in extents.get(block.object, ()):
                first, count = extent.addr // PAGE, extent.count
                states[first : first + count] = bytes([_CONTENT]) * count
        self._wanted: deque[tuple[str, int]] = deque()
        self._likely: list[tuple[str, int, int]] = []  # block, first page, how many
        self._waits = 0
        self._alike: Sequence[PagesLeft] = ()
        self._last = ""
        self._bulk = self._all()
        self.urgent = self.bulk = self.zero = 0
        self.total = sum(extent.count for runs in extents.values() for extent in runs)

    def alike(self, others: Sequence[PagesLeft]) -> None:
        """These are of the same guest: what it waits for there, it will wait for here, until it has come to life. What
        lies around that is then not worth the time of the processors that all share.
        """
        self._alike = [each for each in others if each is not self]

    def want(self, event: Wanted) -> None:
        """A guest waits for it. What was sent is on its way. Raises ProtocolError for what is in no block."""
        self._last = event.block or self._last
        states = self._pages.get(self._last)
        first, count = event.addr // PAGE, -(-event.length // PAGE)
        if states is None or event.addr % PAGE or first + count > len(states):
            raise ProtocolError(
                f"the destination asks for {event.length} bytes at {event.addr:#x} of {event.block!r}"
            )
        self._wanted.extend((self._last, number) for number in range(first, first + count))
        self._waits += 1
        if not self._alike:
            self._likely.append((self._last, first // NEAR * NEAR, NEAR))
        elif self._waits <= ALIVE:
            for each in self._alike:
                each._likely.append((self._last, first, count))

    @property
    def waited_for(self) -> bool:
        """Whether `next_urgent` or `next_likely` may have something."""
        return bool(self._wanted or self._likely)

    def received(self, event: Received) -> None:
        """These it has, of all that was sent before the connection was lost. Raises ProtocolError."""
        states = self._pages.get(event.block)
        if states is None or len(event.bits) * 8 < len(states):
            raise ProtocolError(f"the destination has {len(event.bits)} bytes of bits for {event.block!r}")
        for number in range(len(states)):
            if event.bits[number >> 3] >> (number & 7) & 1:
                states[number] = _SENT

    def next_urgent(self) -> bytes:
        """Records of what is waited for; b"" when nothing is. Raises what the source does."""
        records: list[bytes] = []
        while self._wanted and len(records) < URGENT:
            name, number = self._wanted.popleft()
            state = self._pages[name][number]
            if state != _SENT:
                self.urgent += state == _CONTENT
                self.zero += state == _EMPTY
                records += self._taken(name, number, 1)
        return b"".join(records)

    def next_likely(self) -> bytes:
        """Those around a page that was waited for, or that another has waited for, the latest first; b"" when there are
        none.
        """
        while self._likely:
            name, first, most = self._likely.pop()
            runs = list(_runs(self._pages[name], first, first + most, most))
            self.bulk += sum(count for _, count in runs)
            if runs:
                return b"".join(record for at, count in runs for record in self._taken(name, at, count))
        return b""

    def next_bulk(self) -> bytes:
        """Those that nobody waits for; b"" when all have gone. Pages without content do not go: they are zeros there
        too.
        """
        for name, number, count in self._bulk:
            self.bulk += count
            return b"".join(self._taken(name, number, count))
        return b""

    def _all(self) -> Iterator[tuple[str, int, int]]:
        for name, states in self._pages.items():
            for first, count in _runs(states, 0, len(states), BULK):
                yield name, first, count

    def _taken(self, name: str, number: int, count: int) -> Iterator[bytes]:
        block, addr = self._blocks[name], number * PAGE
        content = self._pages[name][number] == _CONTENT
        data = self._source.read(block.object, addr, count) if content else bytes(PAGE)
        self._pages[name][number : number + count] = bytes([_SENT]) * count
        return pages(block, addr, data)


def _runs(states: bytearray, at: int, end: int, most: int) -> Iterator[tuple[int, int]]:
    """Runs of pages with content that have not gone when they are reached: first page and count, at most `most`."""
    while (first := states.find(_CONTENT, at, end)) >= 0:
        at = first
        while at < min(end, len(states), first + most) and states[at] == _CONTENT:
            at += 1
        yield first, at - first
