"""QEMU's migration stream as a post-copy source speaks it, sans-IO: bytes out, and the return path's bytes in.

Formats: migration/savevm.c (sections, commands), migration/ram.c (pages), migration/migration.c (return path) of QEMU
7.2; all numbers are big endian.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator, Sequence

from lazyproc.errors import ProtocolError
from lazyproc.facts import dataclass
from lazyproc.model import PAGE
from lazyproc.qemu.ram import Block

HEADER = struct.pack(">II", 0x5145564D, 3)  # QEMU_VM_FILE_MAGIC, QEMU_VM_FILE_VERSION
EOF, SECTION_START, SECTION_PART, SECTION_END, CONFIGURATION, COMMAND, FOOTER = 0, 1, 2, 3, 7, 8, 0x7E
RAM_ID, RAM_VERSION = 2, 4  # any number that no device of the stream has; RAM's own version
ZERO, MEM_SIZE, PAGE_FLAG, EOS, CONTINUE = 0x02, 0x04, 0x08, 0x10, 0x20  # RAM_SAVE_FLAG_*
END_OF_RAM = struct.pack(">Q", EOS)
_NAME_MAX = 255
_RETURN = struct.Struct(">HH")
_MESSAGE_MAX = 1 << 27


class Command(enum.IntEnum):
    """MIG_CMD_*"""

    OPEN_RETURN_PATH = 1
    PING = 2
    ADVISE = 3
    LISTEN = 4
    RUN = 5
    DISCARD = 6
    PACKAGED = 7
    RESUME = 9
    RECEIVED = 10  # RECV_BITMAP


class Answer(enum.IntEnum):
    """MIG_RP_MSG_*"""

    SHUT = 1
    PONG = 2
    PAGES_OF = 3  # REQ_PAGES_ID
    PAGES = 4
    RECEIVED = 5  # RECV_BITMAP
    RESUMED = 6  # RESUME_ACK


def configuration(machine: str) -> bytes:
    name = machine.encode()
    return bytes([CONFIGURATION]) + struct.pack(">I", len(name)) + name


def command(number: Command, payload: bytes = b"") -> bytes:
    return struct.pack(">BHH", COMMAND, number, len(payload)) + payload


def packaged(content: bytes) -> bytes:
    """Bytes that the destination reads whole before it does what they say."""
    return command(Command.PACKAGED, struct.pack(">I", len(content))) + content


def _name(block: Block) -> bytes:
    name = block.name.encode()
    if len(name) > _NAME_MAX:
        raise ProtocolError(f"the name of RAM block {block.name!r} is too long")
    return bytes([len(name)]) + name


def _section(kind: int, content: bytes) -> bytes:
    return struct.pack(">BI", kind, RAM_ID) + content + struct.pack(">BI", FOOTER, RAM_ID)


def ram_begins(blocks: Sequence[Block]) -> bytes:
    """The list of blocks (ram_save_setup)."""
    total = sum(block.used for block in blocks)
    rows = b"".join(_name(block) + struct.pack(">Q", block.used) for block in blocks)
    start = struct.pack(">B3sII", 3, b"ram", 0, RAM_VERSION)
    return _section(SECTION_START, start + struct.pack(">Q", total | MEM_SIZE) + rows + END_OF_RAM)


def part(records: bytes) -> bytes:
    """Pages, as `pages` gives them."""
    return _section(SECTION_PART, records + END_OF_RAM)


def pages(block: Block, addr: int, data: bytes) -> Iterator[bytes]:
    """Whole pages of a block from `addr` on; those of zeros are short."""
    flags, name = 0, _name(block)
    for at in range(0, len(data), PAGE):
        page = data[at : at + PAGE]
        if page == _ZEROS:
            yield struct.pack(">Q", addr + at | flags | ZERO) + name + b"\0"
        else:
            yield struct.pack(">Q", addr + at | flags | PAGE_FLAG) + name + page
        flags, name = CONTINUE, b""


_ZEROS = bytes(PAGE)


def ends() -> bytes:
    """After the last page."""
    return _section(SECTION_END, END_OF_RAM) + bytes([EOF])


def begins(machine: str, blocks: Sequence[Block]) -> bytes:
    """Up to where the guest's state follows: its RAM will come by post-copy, all of it is missing. Answered with Pong.

    Without a RAM_DISCARD before LISTEN, QEMU 7.2 takes later pages for those of pre-copy and hangs.
    """
    advise = struct.pack(">QQ", PAGE, PAGE)  # page sizes of the host, all in one, and of the guest
    discards = (
        command(Command.DISCARD, b"\0" + _name(block) + b"\0" + struct.pack(">QQ", 0, block.used))
        for block in blocks
    )
    return b"".join(
        (
            HEADER,
            configuration(machine),
            command(Command.OPEN_RETURN_PATH),
            command(Command.ADVISE, advise),
            ram_begins(blocks),
            *discards,
            command(Command.PING, bytes(4)),
        )
    )


def runs(devices: bytes) -> bytes:
    """The state of the guest's devices, as devices.saved has it: with this the guest runs there. Answered with Pong
    when it is loaded: until then QEMU may wait for a page, and must not have been sent the end.
    """
    inner = devices_of(devices)
    return packaged(command(Command.LISTEN) + inner + command(Command.PING, bytes(4)) + command(Command.RUN))


def devices_of(stream: bytes) -> bytes:
    """The sections between the machine's name and the end. Raises ProtocolError."""
    at = len(HEADER)
    if not stream.startswith(HEADER) or stream[at : at + 1] != bytes([CONFIGURATION]):
        raise ProtocolError("is no state of devices")
    (length,) = struct.unpack_from(">I", stream, at + 1)
    inner = stream[at + 5 + length :]
    if not inner.endswith(bytes([EOF])):
        raise ProtocolError("the state of the devices has no end")
    return inner[:-1]


def asks_received(block: Block) -> bytes:
    """Which pages of a block have come? (after a loss of the connection)"""
    return command(Command.RECEIVED, _name(block))


def resumes() -> bytes:
    return command(Command.RESUME)


@dataclass(frozen=True, slots=True)
class Wanted:
    """A guest waits for these bytes of the block; "" the same as before."""

    block: str
    addr: int
    length: int


@dataclass(frozen=True, slots=True)
class Received:
    """Bit n of `bits`, the lowest of a byte first, says that page n of the block has come."""

    block: str
    bits: bytes


@dataclass(frozen=True, slots=True)
class Shut:
    """The destination has ended; `error` is 0 when it has all."""

    error: int


@dataclass(frozen=True, slots=True)
class Resumed:
    """It goes on."""


@dataclass(frozen=True, slots=True)
class Pong:
    """It has understood what `begins` says."""


Event = Wanted | Received | Shut | Resumed | Pong


class ReturnPath:
    """What the destination says. `feed` gives the events that are whole."""

    def __init__(self) -> None:
        self._data = b""

    def feed(self, data: bytes) -> Iterator[Event]:
        """Raises ProtocolError for what no QEMU says."""
        self._data += data
        while len(self._data) >= _RETURN.size:
            kind, length = _RETURN.unpack_from(self._data)
            size = _RETURN.size + length
            if kind == Answer.RECEIVED:
                found = self._received(length)
                if found is None:
                    return
                event, size = found
            elif len(self._data) < size:
                return
            else:
                event = _event(kind, self._data[_RETURN.size : size])
            self._data = self._data[size:]
            yield event

    def _received(self, length: int) -> tuple[Event, int] | None:
        """After the name comes the bitmap, which the length does not count (ramblock_recv_bitmap_send)."""
        at = _RETURN.size + length
        if len(self._data) < at + 8:
            return None
        (size,) = struct.unpack_from(">Q", self._data, at)
        if size > _MESSAGE_MAX:
            raise ProtocolError(f"the destination has a bitmap of {size} bytes")
        end = at + 8 + size + 8  # and a mark at the end
        if len(self._data) < end:
            return None
        name = self._data[_RETURN.size + 1 : at].decode(errors="replace")
        return Received(name, self._data[at + 8 : at + 8 + size]), end


def _event(kind: int, payload: bytes) -> Event:
    try:
        if kind == Answer.PONG:
            return Pong()
        if kind == Answer.SHUT:
            return Shut(*struct.unpack(">I", payload))
        if kind == Answer.RESUMED:
            struct.unpack(">I", payload)
            return Resumed()
        if kind in (Answer.PAGES, Answer.PAGES_OF):
            addr, length = struct.unpack_from(">QI", payload)
            name = payload[13 : 13 + payload[12]].decode() if kind == Answer.PAGES_OF else ""
            return Wanted(name, addr, length)
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise ProtocolError(f"the destination's message {kind} is garbled ({error})") from error
    raise ProtocolError(f"the destination sends message {kind}, which no QEMU does")
