"""One frame of the native protocol: its header, and what each type allows in it (docs/protocol.md)."""

from __future__ import annotations

import enum
import struct
from collections.abc import Mapping

from lazyproc.errors import ProtocolError
from lazyproc.facts import dataclass
from lazyproc.model import PAGE

MAX_PAGES = 1024  # in one GET or PAGES
MAX_JSON = 64 << 10  # bytes
MAX_NEEDS = 4 << 20  # bytes of NEEDS or OBSTACLES
MAX_BLOB = 64 << 20  # bytes of IMAGES, FORECAST or MAP
MAX_TRACE = 1 << 20  # bytes of TRACE
MAX_ACK = 1 << 20  # bytes of ACK

HEADER = struct.Struct("<BBHIQQII")


class Type(enum.IntEnum):
    """The first byte of a frame."""

    GET = 1
    PAGES = 2
    CLOSE = 3
    HELLO = 16
    WELCOME = 17
    PREPARE = 18
    PREPARED = 19
    IMAGES = 20
    BUILT = 21
    COMMIT = 22
    COMMITTED = 23
    RUNNING = 24
    MAP = 25
    DRAINED = 26
    RELEASED = 27
    ABORT = 28
    PING = 29
    PONG = 30
    NEEDS = 31
    OBSTACLES = 32
    ASK = 33
    HOST = 34
    TRACE = 35
    ACK = 36
    FORECAST = 37


class Flag(enum.IntFlag):
    """The flags of PAGES, and the last one of GET."""

    NONE = 0
    ZERO = 1  # no payload, the pages are all zero
    LAST = 2  # the last frame of the answer to this tag
    ABSENT = 4  # no payload, the server has no such pages
    UNDER_WAY = 8  # no payload, the pages are on their way over the other channel
    PACKED = 16  # of GET: the pages may come compressed. Whoever asks so is the pager's C core, which takes them apart


EMPTY = Flag.ZERO | Flag.ABSENT | Flag.UNDER_WAY  # one of them at most
_LIMIT: Mapping[Type, int] = {  # bytes of payload
    Type.CLOSE: 0,
    Type.PING: 0,
    Type.PONG: 0,
    Type.ASK: 0,
    Type.NEEDS: MAX_NEEDS,
    Type.OBSTACLES: MAX_NEEDS,
    Type.IMAGES: MAX_BLOB,
    Type.FORECAST: MAX_BLOB,
    Type.MAP: MAX_BLOB,
    Type.TRACE: MAX_TRACE,
    Type.ACK: MAX_ACK,
}


@dataclass(frozen=True, slots=True)
class Frame:
    """A header, field by field as it lies on the wire."""

    type: int
    flags: int = 0
    reserved: int = 0
    count: int = 0  # pages of GET and PAGES, bytes of payload of the others
    object: int = 0
    addr: int = 0
    tag: int = 0
    crc: int = 0

    @classmethod
    def unpack(cls, data: bytes | bytearray) -> Frame:
        """From 32 bytes. Raises ProtocolError if no sender may send this."""
        frame = cls(*HEADER.unpack(data))
        frame.check()
        return frame

    def pack(self) -> bytes:
        """32 bytes. Raises ProtocolError if nobody may send this."""
        self.check()
        fields = (
            self.type,
            self.flags,
            self.reserved,
            self.count,
            self.object,
            self.addr,
            self.tag,
            self.crc,
        )
        try:
            return HEADER.pack(*fields)
        except struct.error as error:
            raise ProtocolError(f"a field does not fit its frame: {error}") from None

    @property
    def length(self) -> int:
        """Bytes of payload that belong to the frame itself; pages are the transport's."""
        return self.count if self.type >= Type.HELLO else 0

    def check(self) -> None:
        """Raises ProtocolError unless every field is one that the type allows."""
        if self.type not in Type.__members__.values():
            raise ProtocolError(f"there is no frame of type {self.type}")
        kind = Type(self.type)
        if kind in (Type.GET, Type.PAGES):
            self._check_pages(kind)
            return
        if self != Frame(self.type, count=self.count):
            raise ProtocolError(f"{kind.name} has bits set that mean nothing")
        limit = _LIMIT.get(kind, MAX_JSON)
        if not 0 <= self.count <= limit:
            raise ProtocolError(f"{kind.name} of {self.count} bytes, the limit is {limit}")

    def _check_pages(self, kind: Type) -> None:
        if self.count > MAX_PAGES or not is_range(self.addr, self.count):
            raise ProtocolError(
                f"{kind.name} of {self.count} pages at {self.addr:#x} is no range that may be named"
            )
        allowed = Flag.PACKED if kind is Type.GET else EMPTY | Flag.LAST
        if self.flags & ~allowed or self.reserved or (self.flags & EMPTY).bit_count() > 1:
            raise ProtocolError(f"{kind.name} has flags {self.flags:#x}, reserved {self.reserved:#x}")
        if self.crc and (kind is Type.GET or self.flags & EMPTY):
            raise ProtocolError(f"{kind.name} without payload has a checksum")


def is_range(addr: int, count: int) -> bool:
    """Whether `count` pages from `addr` are a range of pages that 64 bits can hold."""
    return addr >= 0 and addr % PAGE == 0 and count >= 1 and addr + count * PAGE < 1 << 64
