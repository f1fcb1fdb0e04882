"""CRIU's page servers as the source of lazy pages: `criu dump --lazy-pages` and `criu page-server --lazy-pages`.

One connection, whose answers come in the order of the requests. Its server ends with it: a FIN lets `criu dump` end
the process whose pages are not all here, a RST lets that process run on, a page that the server lacks does so too
(criu/page-xfer.c of CRIU 4.2, page_server_serve). So nothing is asked for that the pagemap does not call lazy, and
whatever ends before every page is here, our own death too, ends with a RST.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import NamedTuple

from lazyproc.errors import ConnectionLost, ImageError, PermissionDenied, ProtocolError
from lazyproc.images.pagemap import PE_LAZY, PE_PARENT, Entry
from lazyproc.model import PAGE, Extent, MemoryObject, ObjectKind
from lazyproc.pages.address import parse_address
from lazyproc.pages.channel import STALL_S, tune
from lazyproc.pages.dial import connect
from lazyproc.pages.images import ImagePages
from lazyproc.pages.peer import Trust
from lazyproc.runs import Segment
from lazyproc.wire.criu import ENOUGH, LACKING, Command, Connection, Dialect, Event, Message, Role, Status

MAX_PAGES = 64  # in a request
ACCEPT_S, LOOK_S = 2.0, 0.02
GOODBYE_S = 1.0
_RESET, _IN_ORDER = struct.pack("ii", 1, 0), struct.pack("ii", 0, 0)  # struct linger (socket(7)): RST, or FIN


class CriuServer:
    """A connection that stands. It ends in order with `finish` alone; otherwise the source runs on as before."""

    def __init__(self, sock: socket.socket, where: str, dialect: Dialect) -> None:
        self.sock = sock
        self.where = where
        self._connection = Connection(Role.CLIENT, dialect)

    @classmethod
    def dial(cls, address: str, dialect: Dialect, trust: Trust) -> CriuServer:
        """Raises UsageError for the address and the files of `trust`, ConnectionLost, PermissionDenied."""
        return cls(connected(address, trust), address, dialect)

    def reset(self) -> None:
        """The source runs on."""
        self.sock.close()

    def fileno(self) -> int:
        return self.sock.fileno()

    @property
    def has_read_ahead(self) -> bool:
        """Whether something has come of which the kernel does not know any more (TLS)."""
        pending = getattr(self.sock, "pending", None)
        return pending is not None and pending() > 0

    def ask(self, vpid: int, addr: int, count: int) -> None:
        """Raises ConnectionLost."""
        self._send(Message(Command.GET, count, addr, vpid))

    def receive(self) -> Message:
        """The header of the next answer; its pages are `take`n next. Raises ConnectionLost, ProtocolError."""
        event = self._receive()
        if not isinstance(event, Message):
            raise ProtocolError(f"{event} answers no GET", where=self.where)
        return event

    def take(self, view: memoryview) -> None:
        """The next bytes of pages. Raises ConnectionLost."""
        while view:
            count = self._recv_into(view)
            self._connection.take_pages(count)
            view = view[count:]

    def read(self, vpid: int, addr: int, count: int) -> bytes:
        """Pages that the pagemap calls lazy. Raises ImageError, ConnectionLost, ProtocolError."""
        data = bytearray(count * PAGE)
        view = memoryview(data)
        while view:
            self.ask(vpid, addr, min(MAX_PAGES, len(view) // PAGE))
            answer = self.receive()
            if answer == LACKING:
                raise ImageError("the page server lacks it", where=f"page {addr:#x} of pid {vpid}")
            self.take(view[: answer.payload])
            view, addr = view[answer.payload :], addr + answer.payload
        return bytes(data)

    def expect_nothing(self) -> None:
        """What has come though nothing was asked for can only be the end. Raises ConnectionLost, ProtocolError."""
        self._recv_into(memoryview(bytearray(1)))
        raise ProtocolError("answers what nobody has asked", where=self.where)

    def finish(self) -> None:
        """Every page is here: the server is told, and ends its source. Raises ConnectionLost, ProtocolError."""
        self._send(ENOUGH)
        bin_ = bytearray(MAX_PAGES * PAGE)
        while isinstance(event := self._receive(), Message):  # of what was asked for over again
            left = event.payload
            while left:
                self.take(memoryview(bin_)[: min(left, len(bin_))])
                left -= min(left, len(bin_))
        if event != Status(0):
            raise ProtocolError(f"the end is answered with {event}", where=self.where)
        end_in_order(self.sock)

    def let_go(self) -> None:
        """Another process of ours has it."""
        os.close(self.sock.detach())

    def _send(self, message: Message) -> None:
        try:
            self.sock.sendall(self._connection.send(message))
        except OSError as error:
            raise self._lost(error) from None

    def _receive(self) -> Event:
        buffer = memoryview(bytearray(Dialect.V4_2.size))
        while True:
            count = self._recv_into(buffer[: self._connection.wanted])
            for event in self._connection.receive_data(buffer[:count]):
                return event

    def _recv_into(self, view: memoryview) -> int:
        try:
            count = self.sock.recv_into(view)
        except OSError as error:
            raise self._lost(error) from None
        if not count:
            raise ConnectionLost("CRIU's page server has hung up", where=self.where)
        return count

    def _lost(self, error: OSError) -> ConnectionLost:
        return ConnectionLost(f"the connection broke ({error.strerror or error})", where=self.where)


def connected(address: str, trust: Trust) -> socket.socket:
    """To a page server; it ends with RST but by `end_in_order`. Raises what CriuServer.dial raises."""
    sock = connect(address, STALL_S)
    _ends_with(sock, _RESET)
    try:
        if trust.tls is not None:
            from lazyproc.pages.tls import handshaken

            sock = handshaken(sock, trust.tls, parse_address(address)[0], address)
        else:
            _demand_trusted(sock, trust)
        tune(sock)
        sock.settimeout(None)
    except BaseException:
        sock.close()
        raise
    return sock


def end_in_order(sock: socket.socket) -> None:
    """With FIN, and in TLS with the alert before it (close_notify): all has been said."""
    if (unwrap := getattr(sock, "unwrap", None)) is not None:
        sock.settimeout(GOODBYE_S)
        with suppress(OSError):  # the other end need not answer it
            unwrap()
    _ends_with(sock, _IN_ORDER)
    sock.close()


def _demand_trusted(sock: socket.socket, trust: Trust) -> None:
    """Until the other end has accepted the kernel cannot name its owner."""
    until = time.monotonic() + ACCEPT_S
    while True:
        try:
            trust.check(sock)
            return
        except PermissionDenied:
            if time.monotonic() >= until:
                raise
        time.sleep(LOOK_S)


def _ends_with(sock: socket.socket, how: bytes) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, how)


# --- what may be asked for --------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """A run of pages in one pagemap entry, or between two."""

    addr: int
    pages: int
    lazy: bool


class LazyRuns:
    """The pages of every process that the images call lazy, entry by entry."""

    def __init__(self, images: ImagePages) -> None:
        self._runs: dict[int, tuple[list[int], list[int]]] = {}
        for obj, pagemap in images.pagemaps():
            if obj.kind is ObjectKind.TASK:
                entries = [entry for entry in pagemap if is_lazy(entry)]
                self._runs[obj.id] = [each.addr for each in entries], [each.end for each in entries]

    def extents(self) -> dict[MemoryObject, tuple[Extent, ...]]:
        return {
            MemoryObject(ObjectKind.TASK, vpid): tuple(
                Extent(start, (end - start) // PAGE, lazy=True) for start, end in zip(*runs, strict=True)
            )
            for vpid, runs in self._runs.items()
        }

    def beside(self, images: ImagePages) -> Iterator[Segment]:
        """What lies in the images, and is not asked for."""
        for segment in images.segments_here():
            starts, ends = self._runs.get(segment.key >> 8, ([], []))
            index = bisect_right(ends, segment.start)
            asked = segment.key & 0xFF == ObjectKind.TASK and index < len(starts)
            if not (asked and starts[index] <= segment.start):
                yield segment

    def pieces(self, vpid: int, addr: int, count: int) -> Iterator[Piece]:
        """All of the range, in pieces that one request may have."""
        starts, ends = self._runs.get(vpid, ([], []))
        end = addr + count * PAGE
        index = bisect_right(ends, addr)
        while addr < end:
            start, last = (starts[index], ends[index]) if index < len(starts) else (end, end)
            lazy = start <= addr
            until = min(end, last if lazy else start, addr + MAX_PAGES * PAGE)
            yield Piece(addr, (until - addr) // PAGE, lazy)
            addr = until
            index += addr == last


def is_lazy(entry: Entry) -> bool:
    """Whether CRIU's lazy-pages daemon would ask a page server for it."""
    return bool(entry.flags & PE_LAZY) and not entry.flags & PE_PARENT


class ServedPages:
    """A PageSource: lazy pages of processes from the server, everything else from the images beside."""

    def __init__(self, images: ImagePages, lazy: LazyRuns, server: CriuServer) -> None:
        self._images = images
        self._lazy = lazy
        self._server = server

    def extents(self) -> Mapping[MemoryObject, tuple[Extent, ...]]:
        return self._images.extents()

    def read(self, obj: MemoryObject, addr: int, count: int) -> bytes:
        """See PageSource.read."""
        if obj.kind is not ObjectKind.TASK:
            return self._images.read(obj, addr, count)
        return b"".join(
            self._server.read(obj.id, piece.addr, piece.pages)
            if piece.lazy
            else self._images.read(obj, piece.addr, piece.pages)
            for piece in self._lazy.pieces(obj.id, addr, count)
        )
