"""CRIU's page server protocol without I/O (criu/page-xfer.c of CRIU 4.2 and of 4.1).

There is no handshake and no version. A message is one header, in the machine's byte order, and after some
of them a payload that the header's command and flags announce. Two headers exist and nothing on the wire
names them: 4.2 made `nr_pages` 64 bits wide, so its header has 32 bytes and older ones 24; `detect` tells
them apart by their first message. A `Connection` knows its dialect, turns bytes into messages, and hands
pages over without copying.
"""

from __future__ import annotations

import enum
import struct
from collections import deque
from collections.abc import Mapping

from lazyproc.errors import ProtocolError
from lazyproc.facts import dataclass
from lazyproc.model import PAGE

MAX_PAGES = 1 << 20  # in one message: 4 GiB; CRIU itself sends at most one pagemap entry


class Command(enum.IntEnum):
    """The low 16 bits of a header's first word (page-xfer.c, PS_IOV_*)."""

    ADD = 1  # legacy, as ADD_F with PRESENT
    HOLE = 2  # legacy, as ADD_F with PARENT
    OPEN = 3  # legacy, without an answer
    OPEN2 = 4
    PARENT = 5
    ADD_F = 6
    GET = 7
    CLOSE = 0x1023
    FORCE_CLOSE = 0x1024


class Flag(enum.IntFlag):
    """The high 16 bits with ADD_F: the pagemap's flags (include/pagemap.h, PE_*)."""

    NONE = 0
    PARENT = 1
    LAZY = 2
    PRESENT = 4


class Dialect(enum.Enum):
    """The two headers; the value is the layout. Bytes 4 to 8 of the newer are padding and hold anything."""

    V4_2 = struct.Struct("<I4xQQQ")  # cmd, nr_pages, vaddr, dst_id
    V4_1 = struct.Struct("<IIQQ")

    @property
    def size(self) -> int:
        return self.value.size


class Role(enum.Enum):
    """CLIENT dialled: the dump that sends pages to a store, or the lazy-pages daemon that asks for them."""

    CLIENT = enum.auto()
    SERVER = enum.auto()


@dataclass(frozen=True, slots=True)
class Message:
    """A header. `dst_id` is id << 8 | kind, but with GET and its answer the bare vpid (page-xfer.c:1678)."""

    command: Command
    nr_pages: int = 0
    vaddr: int = 0
    dst_id: int = 0
    flags: Flag = Flag.NONE

    @property
    def payload(self) -> int:
        """Bytes of pages that follow."""
        present = self.command is Command.ADD or Flag.PRESENT in self.flags
        return self.nr_pages * PAGE if present else 0


# The answer to a GET of a page that is not there (include/page-xfer.h). CRIU's own server hangs up instead.
LACKING = Message(Command.ADD)
# CRIU's client says CLOSE after a restore that has failed as well, with zeros behind it, at which its servers do not
# look. Ours says this one, and only when it will never want another page.
ENOUGH = Message(Command.CLOSE, vaddr=int.from_bytes(b"lazyproc", "little"))


@dataclass(frozen=True, slots=True)
class PageBytes:
    """The next bytes of the last message: a view into what was given to `receive_data`."""

    data: memoryview


@dataclass(frozen=True, slots=True)
class HasParent:
    """The answer to OPEN2 (one byte) and PARENT (an int32): whether the server has a parent image."""

    value: bool


@dataclass(frozen=True, slots=True)
class Status:
    """The answer to CLOSE and FORCE_CLOSE, an int32; 0 is good."""

    value: int


Event = Message | PageBytes | HasParent | Status


@dataclass(frozen=True, slots=True)
class _Answer:
    """An answer that is a bare number."""

    layout: struct.Struct
    event: type[HasParent] | type[Status]

    def decode(self, data: bytes) -> HasParent | Status:
        (value,) = self.layout.unpack(data)
        if self.event is Status:
            return Status(value)
        if value not in (0, 1):
            raise ProtocolError(f"the server has {value} parent images, 0 or 1 is possible")
        return HasParent(bool(value))


_ANSWER: Mapping[Command, _Answer] = {
    Command.OPEN2: _Answer(struct.Struct("<B"), HasParent),
    Command.PARENT: _Answer(struct.Struct("<i"), HasParent),
    Command.CLOSE: _Answer(struct.Struct("<i"), Status),
    Command.FORCE_CLOSE: _Answer(struct.Struct("<i"), Status),
}
_WITH_PAGES = frozenset({Command.ADD, Command.HOLE, Command.ADD_F, Command.GET})
_LAST = frozenset({Command.CLOSE, Command.FORCE_CLOSE})


def encode(message: Message, dialect: Dialect) -> bytes:
    """Raises ProtocolError when the dialect has no room for it."""
    _check(message)
    word = message.flags << 16 | message.command
    try:
        return dialect.value.pack(word, message.nr_pages, message.vaddr, message.dst_id)
    except struct.error as error:
        raise ProtocolError(f"{message.command.name} does not fit its header: {error}") from None


def decode(header: bytes, dialect: Dialect) -> Message:
    """From `dialect.size` bytes. Raises ProtocolError."""
    word, nr_pages, vaddr, dst_id = dialect.value.unpack(header)
    try:
        command = Command(word & 0xFFFF)
    except ValueError:
        raise ProtocolError(f"CRIU's page server protocol has no command {word & 0xFFFF:#x}") from None
    if word >> 16 & ~(Flag.PARENT | Flag.LAZY | Flag.PRESENT):
        raise ProtocolError(f"{command.name} has the unknown flags {word >> 16:#x}")
    message = Message(command, nr_pages, vaddr, dst_id, Flag(word >> 16))
    _check(message)
    return message


def _check(message: Message) -> None:
    name = message.command.name
    if message.flags and message.command is not Command.ADD_F:
        raise ProtocolError(f"{name} has flags, only ADD_F may")
    if message.command not in _WITH_PAGES or message == LACKING:
        return
    in_range = message.vaddr % PAGE == 0 and message.vaddr + message.nr_pages * PAGE < 1 << 64
    if not 1 <= message.nr_pages <= MAX_PAGES or not in_range:
        raise ProtocolError(f"{name} of {message.nr_pages} pages at {message.vaddr:#x} is no range of pages")


def detect(start: bytes | bytearray | memoryview) -> Dialect | None:
    """Which header a client uses, told by its first message; None until there are 24 bytes of it.

    Bytes 8 to 16 are a number of pages in the newer header and an address in the older one, and no sensible
    value is both. OPEN2 and PARENT carry neither: there bytes 16 to 24 are the object's number in the older
    header and the address, 0, in the newer one. A first CLOSE looks the same in both, but for ENOUGH, and is served
    the same way: one answer, then the end. What is no message at all is left for `decode` to refuse.
    """
    if len(start) < Dialect.V4_1.size:
        return None
    word, _, at_8, at_16 = Dialect.V4_1.value.unpack(start[: Dialect.V4_1.size])
    if word & 0xFFFF in _WITH_PAGES:
        return Dialect.V4_2 if at_8 % PAGE else Dialect.V4_1
    if word & 0xFFFF in _LAST:
        return Dialect.V4_2 if at_16 == ENOUGH.vaddr else Dialect.V4_1
    return Dialect.V4_1 if at_16 else Dialect.V4_2


class Connection:
    """One end of one stream. A server may leave the dialect to be found out; a client has to choose it.

    Requests are answered in order. `send` and `receive_data` raise ProtocolError for an answer that nobody
    waits for or that does not fit the request, and `receive_data` raises nothing else.
    """

    def __init__(self, role: Role, dialect: Dialect | None = None) -> None:
        if dialect is None and role is Role.CLIENT:
            raise ProtocolError("the client speaks first, so it has to choose the dialect")
        self._role = role
        self._buffer = bytearray()
        self._unanswered: deque[Message] = deque()
        self._closed = False  # CLOSE is through
        self.dialect = dialect
        self.pages_due = 0  # bytes of pages at the front of the incoming stream

    @property
    def wanted(self) -> int:
        """Bytes that complete what is under way; who never reads more leaves the rest to another reader."""
        if self.pages_due:
            return self.pages_due
        answer = self._short_answer
        whole = answer.layout.size if answer else (self.dialect or Dialect.V4_1).size
        return whole - len(self._buffer)

    def send(self, event: Message | HasParent | Status) -> bytes:
        """The bytes of `event`; its pages are sent behind them by the caller."""
        if isinstance(event, Message):
            if self.dialect is None:
                raise ProtocolError("the client has not spoken yet, its dialect is unknown")
            data = encode(event, self.dialect)
            self._pass(event, from_client=self._role is Role.CLIENT)
            return data
        answer = _ANSWER.get(self._unanswered[0].command) if self._unanswered else None
        if self._role is Role.CLIENT or answer is None or type(event) is not answer.event:
            raise ProtocolError(f"nobody waits for {type(event).__name__}")
        self._unanswered.popleft()
        return answer.layout.pack(event.value)

    def receive_data(self, data: bytes | bytearray | memoryview) -> list[Event]:
        """Every event that `data` completes, in order."""
        events: list[Event] = []
        view = memoryview(data)
        while view:
            part, view = view[: self.wanted], view[self.wanted :]
            events += self._take(part)
        return events

    def take_pages(self, count: int) -> None:
        """Says that the transport has put `count` bytes of pages where they belong."""
        if not 0 <= count <= self.pages_due:
            raise ProtocolError(f"{count} bytes of pages taken, {self.pages_due} were due")
        self.pages_due -= count

    @property
    def _short_answer(self) -> _Answer | None:
        """What the client receives next, unless that is a header."""
        if self._role is Role.SERVER or not self._unanswered:
            return None
        return _ANSWER.get(self._unanswered[0].command)

    def _take(self, part: memoryview) -> list[Event]:
        """`part` is at most what was wanted."""
        if self.pages_due:
            self.pages_due -= len(part)
            return [PageBytes(part)]
        self._buffer += part
        self.dialect = self.dialect or detect(self._buffer)
        if self.wanted or self.dialect is None:
            return []
        data = bytes(self._buffer)
        self._buffer.clear()
        answer = self._short_answer
        if answer:
            self._unanswered.popleft()
            return [answer.decode(data)]
        message = decode(data, self.dialect)
        self._pass(message, from_client=self._role is Role.SERVER)
        self.pages_due = message.payload
        return [message]

    def _pass(self, message: Message, *, from_client: bool) -> None:
        """The message goes through the connection, in whichever direction."""
        if not from_client:
            self._check_pages(message)
            self._unanswered.popleft()
            return
        if message == LACKING:
            raise ProtocolError("ADD of no pages is an answer, and nobody has asked")
        if self._closed:
            raise ProtocolError(f"{message.command.name} after CLOSE")
        self._closed = message.command in _LAST
        if message.command is Command.GET or message.command in _ANSWER:
            self._unanswered.append(message)

    def _check_pages(self, message: Message) -> None:
        """A server may send fewer pages than were asked for, from the same address, or say that it has none."""
        get = self._unanswered[0] if self._unanswered else None
        answers = message.payload or message == LACKING
        if get is None or get.command is not Command.GET or not answers:
            raise ProtocolError(f"nobody waits for {message.command.name} of {message.nr_pages} pages")
        if message == LACKING:
            return
        same = (message.vaddr, message.dst_id) == (get.vaddr, get.dst_id)
        if not same or message.nr_pages > get.nr_pages:
            raise ProtocolError(
                f"GET of {get.nr_pages} pages at {get.vaddr:#x} of {get.dst_id} answered with"
                f" {message.nr_pages} at {message.vaddr:#x} of {message.dst_id}"
            )
