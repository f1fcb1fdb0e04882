"""A pager speaks our protocol over two connections, CRIU's server its own over one: this stands in between.

Answers come in the order in which pages were asked for, so what is under way in bulk is what a fault waits for. Little
is, then: the rest waits here, and faults pass it.
"""

from __future__ import annotations

import select
import socket
import time
from collections import deque
from collections.abc import Iterator

from lazyproc.facts import dataclass, field
from lazyproc.model import PAGE
from lazyproc.pages.criu_source import CriuServer, LazyRuns, Piece
from lazyproc.pages.server import crc32c
from lazyproc.wire.criu import LACKING
from lazyproc.wire.frame import HEADER, Flag, Frame, Type

RECENT_S = 0.05  # after a fault there may soon be another one
FEW, MANY = 1, 8  # pieces under way in bulk; the pager makes them as small as the link is slow (_pace.c)
_READ = 64 << 10
_BUFFER = 4 << 20  # what the pager has not taken yet


@dataclass(slots=True)
class _Part:
    """Of the answer to one request: a run of pages, and its content once that has come."""

    piece: Piece
    flags: Flag = Flag.NONE
    data: bytearray | None = None
    there: bool = False

    def fill(self, flags: Flag, data: bytearray | None = None) -> None:
        self.flags, self.data, self.there = flags, data, True


@dataclass(slots=True)
class _Request:
    """A GET of the pager's, with what is left of it, in order."""

    frame: Frame
    left: int  # pages
    parts: deque[_Part] = field(default_factory=deque)


class _Channel:
    """One connection of the pager's, whose requests are answered in order."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.open = True
        self._buffer = bytearray()
        self._requests: deque[_Request] = deque()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)

    def fileno(self) -> int:
        return self.sock.fileno()

    def requests(self) -> Iterator[_Request]:
        """Those that have just come."""
        try:
            data = self.sock.recv(_READ)
        except ConnectionError:
            data = b""
        self.open = bool(data)
        self._buffer += data
        while len(self._buffer) >= HEADER.size:
            frame = Frame.unpack(self._buffer[: HEADER.size])
            del self._buffer[: HEADER.size]
            request = _Request(frame, frame.count)
            self._requests.append(request)
            yield request

    def answer(self) -> None:
        """As much as is there, up to the first part that is not."""
        while self._requests and (parts := self._requests[0].parts) and parts[0].there:
            request, part = self._requests[0], parts.popleft()
            request.left -= part.piece.pages
            self._send(request, part)
            if not request.left:
                self._requests.popleft()

    def _send(self, request: _Request, part: _Part) -> None:
        flags = part.flags | (Flag.NONE if request.left else Flag.LAST)
        crc = crc32c(part.data) if part.data else 0
        of, piece = request.frame, part.piece
        header = Frame(Type.PAGES, flags, 0, piece.pages, of.object, piece.addr, of.tag, crc).pack()
        try:
            self.sock.sendall(header, socket.MSG_MORE)
            if part.data:
                self.sock.sendall(part.data)
        except ConnectionError:  # the pager has gone; whether it has all is not our business
            self.open = False


class Translator:
    """`run` ends when the pager hangs up. For whoever has something else to do there is `step`."""

    def __init__(self, server: CriuServer, lazy: LazyRuns) -> None:
        self._server = server
        self._lazy = lazy
        self._asked: deque[tuple[_Channel, _Request, _Part]] = deque()
        self._backlog: deque[tuple[_Request, _Part]] = deque()
        self._bulk_under_way = 0  # pieces
        self._fault_at = 0.0
        self._urgent: _Channel | None = None
        self._bulk: _Channel | None = None

    def connect(self, urgent: socket.socket, bulk: socket.socket) -> None:
        """To a pager; what was under way for one before it is thrown away when it comes."""
        self._urgent, self._bulk = _Channel(urgent), _Channel(bulk)
        self._backlog.clear()
        self._bulk_under_way = sum(channel is self._bulk for channel, _, _ in self._asked)

    @property
    def connected(self) -> bool:
        return self._urgent is not None

    def disconnect(self) -> None:
        """The pager has gone, or is to know that no page will come."""
        for channel in (self._urgent, self._bulk):
            if channel is not None:
                channel.sock.close()
        self._urgent = self._bulk = None
        self._backlog.clear()

    def step(self, others: list[int], timeout: float | None = None) -> list[int]:
        """Wait for something to do, and do it; which of `others` are readable. Raises ConnectionLost, ProtocolError."""
        ready = self._wait(others, timeout)
        if self._urgent is not None and self._urgent.fileno() in ready:
            self._take_urgent(self._urgent)
        if self._bulk is not None and self._bulk.fileno() in ready:
            self._take_bulk(self._bulk)
        if self._server.fileno() in ready:
            self._take_answer()
        self._ask_in_bulk()
        if not all(channel is None or channel.open for channel in (self._urgent, self._bulk)):
            self.disconnect()
        return [fd for fd in others if fd in ready]

    def _wait(self, others: list[int], timeout: float | None) -> set[int]:
        poll = select.poll()
        for fd in (*others, self._server.fileno()):
            poll.register(fd, select.POLLIN)
        for channel in (self._urgent, self._bulk):
            if channel is not None:
                poll.register(channel, select.POLLIN)
        ahead = self._server.has_read_ahead
        limit = 0 if ahead else timeout
        ready = {fd for fd, _ in poll.poll(None if limit is None else limit * 1000)}
        return ready | {self._server.fileno()} if ahead else ready

    # --- requests ---

    def _take_urgent(self, channel: _Channel) -> None:
        for request in channel.requests():
            self._fault_at = time.monotonic()
            for part in self._parts(request):
                self._ask(channel, request, part)
        channel.answer()

    def _take_bulk(self, channel: _Channel) -> None:
        for request in channel.requests():
            self._backlog.extend((request, part) for part in self._parts(request))
        channel.answer()

    def _parts(self, request: _Request) -> list[_Part]:
        """What the pagemap does not call lazy is zero, and CRIU's server would end for it."""
        of = request.frame
        request.parts.extend(
            _Part(piece, Flag.NONE if piece.lazy else Flag.ZERO, there=not piece.lazy)
            for piece in self._lazy.pieces(of.object >> 8, of.addr, of.count)
        )
        return [part for part in request.parts if not part.there]

    def _ask_in_bulk(self) -> None:
        most = FEW if time.monotonic() < self._fault_at + RECENT_S else MANY
        while self._bulk is not None and self._backlog and self._bulk_under_way < most:
            self._bulk_under_way += 1
            self._ask(self._bulk, *self._backlog.popleft())

    def _ask(self, channel: _Channel, request: _Request, part: _Part) -> None:
        self._asked.append((channel, request, part))
        self._server.ask(request.frame.object >> 8, part.piece.addr, part.piece.pages)

    # --- answers ---

    def _take_answer(self) -> None:
        if not self._asked:
            self._server.expect_nothing()
            return
        message = self._server.receive()
        channel, request, part = self._asked.popleft()
        if message == LACKING:
            part.fill(Flag.ABSENT)
        else:
            data = bytearray(message.payload)
            self._server.take(memoryview(data))
            if message.nr_pages < part.piece.pages:
                self._ask_for_the_rest(channel, request, part, message.nr_pages)
            part.fill(Flag.NONE, data)
        if channel is self._bulk:
            self._bulk_under_way -= 1
        if channel in (self._urgent, self._bulk):
            channel.answer()

    def _ask_for_the_rest(self, channel: _Channel, request: _Request, part: _Part, given: int) -> None:
        """The server gives no more than lies in one of its pipes."""
        addr, count, lazy = part.piece
        part.piece = Piece(addr, given, lazy)
        rest = _Part(Piece(addr + given * PAGE, count - given, lazy))
        request.parts.insert(request.parts.index(part) + 1, rest)
        if channel is self._bulk:
            self._bulk_under_way += 1
        self._ask(channel, request, rest)

    def finish(self) -> None:
        """Every page is here, and the source may end. Raises ConnectionLost, ProtocolError."""
        self.disconnect()
        self._server.finish()
