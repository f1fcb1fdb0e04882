"""CRIU's lazy-pages daemon asks, and is answered: `criu lazy-pages --page-server` (criu/page-xfer.c of CRIU 4.2).

CRIU's own server ends the session for a page that it lacks, and for a daemon that goes the source; here neither is so.
"""

from __future__ import annotations

import socket
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from lazyproc.errors import ConnectionLost, ProtocolError
from lazyproc.model import PAGE, Extent, MemoryObject, ObjectKind
from lazyproc.pages import PageSource
from lazyproc.wire.criu import LACKING, Command, Connection, Flag, Message, Role, Status

MAX_PAGES = 1024  # in an answer: CRIU's client has a buffer for its longest pagemap entry
_READ = 16 << 10  # bytes of requests

Delivered = Callable[[int, int, int], object]  # vpid, address, pages


class Shelf:
    """The pages of `source` that may be asked for, by the vpid of the process they belong to."""

    def __init__(self, source: PageSource, extents: Mapping[MemoryObject, Iterable[Extent]]) -> None:
        self._source = source
        self._runs = {obj.id: _Runs(found) for obj, found in extents.items() if obj.kind is ObjectKind.TASK}

    def read(self, vpid: int, addr: int, count: int) -> bytes:
        """As many of `count` pages from `addr` as lie there in one run, MAX_PAGES at most; b"" when the first does not.

        Raises ImageError, NoSuchProcess.
        """
        there = self._runs[vpid].reach(addr) if vpid in self._runs else 0
        count = min(count, there, MAX_PAGES)
        return self._source.read(MemoryObject(ObjectKind.TASK, vpid), addr, count) if count else b""

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        """(vpid, start, end) of every run."""
        for vpid, runs in self._runs.items():
            for start, end in zip(runs.starts, runs.ends, strict=True):
                yield vpid, start, end


class _Runs:
    """Runs of pages, whatever kind of extent they lie in."""

    def __init__(self, extents: Iterable[Extent]) -> None:
        self.starts: list[int] = []
        self.ends: list[int] = []
        for extent in sorted(extents, key=lambda extent: extent.addr):
            if self.ends and self.ends[-1] == extent.addr:
                self.ends[-1] = extent.end
            else:
                self.starts.append(extent.addr)
                self.ends.append(extent.end)

    def reach(self, addr: int) -> int:
        """Pages from `addr` to the end of the run it lies in; 0 when it lies in none."""
        index = bisect_right(self.starts, addr) - 1
        return max(0, self.ends[index] - addr) // PAGE if index >= 0 else 0


class Given:
    """Which pages of a shelf were given, once or more often."""

    def __init__(self, shelf: Shelf) -> None:
        self._runs = [((vpid, start), bytearray((end - start) // PAGE)) for vpid, start, end in sorted(shelf)]
        self._starts = [start for start, _ in self._runs]
        self.missing = sum(len(pages) for _, pages in self._runs)

    def add(self, vpid: int, addr: int, count: int) -> None:
        """`count` pages within one run."""
        (_, start), pages = self._runs[bisect_right(self._starts, (vpid, addr)) - 1]
        first = (addr - start) // PAGE
        self.missing -= pages.count(0, first, first + count)
        pages[first : first + count] = b"\1" * count


def answer(sock: socket.socket, where: str, shelf: Shelf, delivered: Delivered) -> Message | None:
    """Answer a client's GETs until its connection ends; its CLOSE, if it has said so and read all of the answers (who
    closes with something unread resets the connection).

    `sock` is a blocking stream, and stays the caller's. `delivered` is told of pages before they are sent. Raises
    ConnectionLost, ProtocolError, and what Shelf.read raises.
    """
    connection = Connection(Role.SERVER)
    closed: Message | None = None
    with _blamed(where):
        while data := sock.recv(_READ):
            for event in connection.receive_data(data):
                match event:
                    case Message(Command.GET):
                        _give(sock, connection, event, shelf, delivered)
                    case Message(Command.CLOSE | Command.FORCE_CLOSE):
                        sock.sendall(connection.send(Status(0)))
                        closed = event
                    case Message(command):
                        raise ProtocolError(
                            f"{command.name}: pages are given here, and none are taken",
                            where=where,
                            remedy="what `criu dump --page-server` sends is stored by lazyproc serve --receive",
                        )
    return closed


def _give(
    sock: socket.socket, connection: Connection, get: Message, shelf: Shelf, delivered: Delivered
) -> None:
    pages = shelf.read(get.dst_id, get.vaddr, get.nr_pages)
    if not pages:
        sock.sendall(connection.send(LACKING))
        return
    count = len(pages) // PAGE
    delivered(get.dst_id, get.vaddr, count)
    header = connection.send(Message(Command.ADD_F, count, get.vaddr, get.dst_id, Flag.PRESENT))
    # In TLS each message begins a record: CRIU waits for the socket, and does not see what GnuTLS has read ahead.
    sock.sendall(header, socket.MSG_MORE) if type(sock) is socket.socket else sock.sendall(header)
    sock.sendall(pages)


@contextmanager
def _blamed(where: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConnectionLost(f"the connection broke ({error.strerror})", where=where) from None
    except ProtocolError as error:
        raise ProtocolError(error.what, where=where, remedy=error.remedy or "is it CRIU?") from None
