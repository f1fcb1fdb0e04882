"""The native protocol without I/O: bytes in, events out. docs/protocol.md describes it for the other end.

A `Connection` is one of the three TCP streams of a session. The transport feeds it what arrives and sends
what `send` returns. Pages are never copied here: after a `Pages` event the next `pages_due` bytes of the
stream are theirs, and the transport may receive them straight into their place and say so with
`take_pages`.

Whatever the peer sends, `receive_data` returns events or raises ProtocolError, and nothing else; no length is
believed before it has been checked against its limit.
"""

from __future__ import annotations

import enum
import string
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from lazyproc.errors import ProtocolError
from lazyproc.facts import dataclass, field
from lazyproc.model import PAGE, MemoryObject, ObjectKind
from lazyproc.trace import RECORD
from lazyproc.wire import jsonobject
from lazyproc.wire.frame import EMPTY, HEADER, Flag, Frame, Type, is_range
from lazyproc.wire.jsonobject import JsonValue

VERSION = 1
REVISION = 5  # of what may be said besides: what an end of an earlier revision does not know
PACKS = 2  # from this revision on pages may be asked for compressed
FORESEES = 3  # and the tree may be described before it is frozen, and by its own format afterwards
WIPES = 4  # and what a fork wipes (MADV_WIPEONFORK) is not in MAP, but there before the tree runs
PARTS = 5  # and MAP comes in parts: one of MAP_PART entries is followed by another
MAP_PART = 1 << 16
MAP_MAX = 1 << 24  # entries of all parts
MAX_NAME = 128  # characters of a session id or token
_MAP_ENTRY = struct.Struct("<QQQ")  # object, addr, pages
_LOST = struct.Struct("<Q")


class Role(enum.StrEnum):
    """What a connection is for; its HELLO says so."""

    CONTROL = "control"
    URGENT = "urgent"
    BULK = "bulk"


class Party(enum.Enum):
    """Each end is two of these: who dialled is independent of which way the process goes."""

    DIALLER = enum.auto()
    ACCEPTOR = enum.auto()
    SOURCE = enum.auto()  # has the pages
    DESTINATION = enum.auto()


# --- events ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Get:
    """Asks for `count` pages from `addr`, which may come compressed (`packed`) from an end of revision 2."""

    object: int  # MemoryObject.key
    addr: int
    count: int
    tag: int
    packed: bool = False


@dataclass(frozen=True, slots=True)
class Pages:
    """Part of the answer to the Get with this tag; its content follows when `payload` is not 0."""

    object: int
    addr: int
    count: int
    tag: int
    flags: Flag
    crc: int  # CRC32C of the content, which the receiver of the content verifies

    @property
    def payload(self) -> int:
        """Bytes of pages that follow the header."""
        return 0 if self.flags & EMPTY else self.count * PAGE


@dataclass(frozen=True, slots=True)
class PageBytes:
    """The next bytes of the last Pages: a view into what was given to `receive_data`."""

    data: memoryview


@dataclass(frozen=True, slots=True)
class Close:
    """No more requests."""


@dataclass(frozen=True, slots=True)
class Hello:
    """The first frame of every connection. `session` and `token` are hexadecimal."""

    role: Role
    session: str
    token: str = field(repr=False)
    version: int = VERSION
    revision: int = REVISION
    resume: bool = False  # to go on with a session that has been handed over


@dataclass(frozen=True, slots=True)
class Welcome:
    """The acceptor's answer."""

    session: str
    version: int = VERSION
    revision: int = REVISION


@dataclass(frozen=True, slots=True)
class Control:
    """A step of the migration; what the fields mean is the business of lazyproc.migrate."""

    fields: Mapping[str, JsonValue] = field(default_factory=dict)


class Needs(Control):
    """Source: this is what the tree will need of you. Comes before Prepare."""


class Prepare(Control):
    """Source: may I send this tree?"""


class Prepared(Control):
    """Destination: yes, and this is what I have."""


class Obstacles(Control):
    """Destination: no, and this is what stands in the way. It is off."""


class Host(Control):
    """Destination: what this host is and can do; the answer to Ask."""


class Built(Control):
    """Destination: the tree stands, stopped."""


class Commit(Control):
    """Source: my threads are parked, you may run it."""


class Committed(Control):
    """Destination: it is mine, on disk; the source never runs again."""


class Running(Control):
    """Destination: the last thread has been let go."""


class Drained(Control):
    """Destination: every page is here."""


class Released(Control):
    """Source: the parked tree is gone."""


class Abort(Control):
    """Either: it is off; `fields["reason"]` says why."""


@dataclass(frozen=True, slots=True)
class Images:
    """Source: the images of the frozen tree, packed by lazyproc.images."""

    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Forecast:
    """Source: what is known of the tree while it still runs, packed by lazyproc.images. Comes before Prepare."""

    data: bytes = field(repr=False)


class MapEntry(NamedTuple):
    """A run of pages with content."""

    object: int  # MemoryObject.key
    addr: int
    pages: int


@dataclass(frozen=True, slots=True)
class Map:
    """Source: which lazy pages have content, or a part of that. Everything else in the lazy ranges is zero."""

    entries: Sequence[MapEntry] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Ack:
    """Destination: these lazy pages are installed here and will not be asked for again."""

    entries: Sequence[MapEntry] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Trace:
    """Destination: faults that are over, a whole number of records of lazyproc.trace; `lost` since the first."""

    records: bytes = field(repr=False)
    lost: int


@dataclass(frozen=True, slots=True)
class Ping:
    """Are you there?"""


@dataclass(frozen=True, slots=True)
class Pong:
    """I am."""


@dataclass(frozen=True, slots=True)
class Ask:
    """Source: what kind of host are you?"""


Event: TypeAlias = (
    Get
    | Pages
    | PageBytes
    | Close
    | Hello
    | Welcome
    | Control
    | Images
    | Forecast
    | Map
    | Ack
    | Trace
    | Ping
    | Pong
    | Ask
)

_CONTROL: Mapping[Type, type[Control]] = {
    Type.PREPARE: Prepare,
    Type.PREPARED: Prepared,
    Type.BUILT: Built,
    Type.COMMIT: Commit,
    Type.COMMITTED: Committed,
    Type.RUNNING: Running,
    Type.DRAINED: Drained,
    Type.RELEASED: Released,
    Type.ABORT: Abort,
    Type.NEEDS: Needs,
    Type.OBSTACLES: Obstacles,
    Type.HOST: Host,
}
_BARE: Mapping[Type, Event] = {Type.CLOSE: Close(), Type.PING: Ping(), Type.PONG: Pong(), Type.ASK: Ask()}
# The revision from which on an end knows a frame; those that are not here have always been.
_SINCE: Mapping[Type, int] = {
    **dict.fromkeys((Type.NEEDS, Type.OBSTACLES, Type.ASK, Type.HOST), 1),
    Type.FORECAST: FORESEES,
}
_TYPE_OF: Mapping[type[Event], Type] = {
    **{cls: kind for kind, cls in _CONTROL.items()},
    **{type(event): kind for kind, event in _BARE.items()},
    Get: Type.GET,
    Pages: Type.PAGES,
    Hello: Type.HELLO,
    Welcome: Type.WELCOME,
    Images: Type.IMAGES,
    Forecast: Type.FORECAST,
    Map: Type.MAP,
    Ack: Type.ACK,
    Trace: Type.TRACE,
}

# --- who may send what, when ----------------------------------------------------------------------------


class State(enum.Enum):
    OPENING = enum.auto()
    GREETED = enum.auto()  # HELLO is through
    CONTROL = enum.auto()
    PAGES = enum.auto()
    CLOSING = enum.auto()  # no more requests; answers may still be under way
    CLOSED = enum.auto()


_EITHER = frozenset({Type.ABORT, Type.PING, Type.PONG})
_MAY_SEND: Mapping[tuple[State, Party], frozenset[Type]] = {
    (State.OPENING, Party.DIALLER): frozenset({Type.HELLO}),
    (State.GREETED, Party.ACCEPTOR): frozenset({Type.WELCOME, Type.ABORT}),
    (State.CONTROL, Party.SOURCE): _EITHER
    | {Type.ASK, Type.NEEDS, Type.FORECAST, Type.PREPARE, Type.IMAGES, Type.COMMIT, Type.MAP, Type.RELEASED},
    (State.CONTROL, Party.DESTINATION): _EITHER
    | {Type.HOST, Type.PREPARED, Type.OBSTACLES, Type.BUILT, Type.COMMITTED, Type.RUNNING, Type.TRACE}
    | {Type.ACK, Type.DRAINED},
    (State.PAGES, Party.DESTINATION): frozenset({Type.GET, Type.CLOSE}),
    (State.PAGES, Party.SOURCE): frozenset({Type.PAGES}),
    (State.CLOSING, Party.SOURCE): frozenset({Type.PAGES}),
}
_NEXT: Mapping[tuple[State, Type], State] = {
    (State.OPENING, Type.HELLO): State.GREETED,
    (State.GREETED, Type.ABORT): State.CLOSED,
    (State.PAGES, Type.CLOSE): State.CLOSING,
}
_SERVES: Mapping[Role, State] = {
    Role.CONTROL: State.CONTROL,
    Role.URGENT: State.PAGES,
    Role.BULK: State.PAGES,
}


class Connection:
    """One end of one stream. `side` is SOURCE or DESTINATION; `dialled` says which end opened the stream.

    `role` is None until HELLO has passed in either direction.
    """

    def __init__(self, side: Party, *, dialled: bool) -> None:
        other = Party.DESTINATION if side is Party.SOURCE else Party.SOURCE
        opener, answerer = Party.DIALLER, Party.ACCEPTOR
        self._us = (side, opener if dialled else answerer)
        self._them = (other, answerer if dialled else opener)
        self._parts: list[bytes] = []  # of what is under way, `_have` bytes
        self._have = 0
        self._frame: Frame | None = None  # a checked header whose payload is not whole yet
        self.state = State.OPENING
        self.role: Role | None = None
        self.peer_revision = 0  # until its greeting has come
        self.pages_due = 0  # bytes of pages at the front of the incoming stream

    @property
    def wanted(self) -> int:
        """Bytes that complete what is under way. Who never reads more leaves the rest to another reader."""
        if self.pages_due:
            return self.pages_due
        whole = HEADER.size if self._frame is None else self._frame.length
        return whole - self._have

    @property
    def between(self) -> bool:
        """Whether nothing is under way."""
        return self._frame is None and not self._have and not self.pages_due

    def send(self, event: Event) -> bytes:
        """The bytes of `event`; the content of a Pages is sent behind them by the caller.

        Raises ProtocolError if this end may not say that now, or if it is out of bounds.
        """
        return b"".join(self.parts(event))

    def parts(self, event: Event) -> tuple[bytes, bytes]:
        """The same, header and payload: that of images is large, and not copied."""
        kind = _TYPE_OF.get(type(event))
        if kind is None:
            raise ProtocolError(f"{type(event).__name__} is not something to send")
        if _SINCE.get(kind, 0) > self.peer_revision:
            raise ProtocolError(f"the other end is older and does not know {kind.name}")
        payload = _to_payload(event)
        header = _to_frame(kind, event, len(payload)).pack()
        self._pass(event, kind, self._us)
        return header, payload

    def receive_data(self, data: bytes | bytearray | memoryview) -> list[Event]:
        """Every event that `data` completes, in order. After a ProtocolError nothing more is in turn."""
        events: list[Event] = []
        view = memoryview(data)
        try:
            while view:
                part, view = view[: self.wanted], view[self.wanted :]
                events += self._take(part)
        except ProtocolError:
            self.state = State.CLOSED
            raise
        return events

    def take_pages(self, count: int) -> None:
        """Says that the transport has put `count` bytes of pages where they belong."""
        if not 0 <= count <= self.pages_due:
            raise ProtocolError(f"{count} bytes of pages taken, {self.pages_due} were due")
        self.pages_due -= count

    def _take(self, part: memoryview) -> list[Event]:
        """`part` is at most what was wanted."""
        if self.pages_due:
            self.pages_due -= len(part)
            return [PageBytes(part)]
        self._parts.append(_owned(part))
        self._have += len(part)
        if self.wanted:
            return []
        data = b"".join(self._parts)  # of one part that is the part itself
        self._parts, self._have = [], 0
        frame = self._frame
        if frame is None:
            frame = Frame.unpack(data)
            self._check_turn(Type(frame.type), self._them)
            if frame.length:
                self._frame = frame
                return []
            data = b""
        self._frame = None
        return [self._finish(frame, data)]

    def _finish(self, frame: Frame, payload: bytes) -> Event:
        event = _to_event(frame, payload)
        if isinstance(event, Hello | Welcome):
            self.peer_revision = event.revision
        self._pass(event, Type(frame.type), self._them)
        if isinstance(event, Pages):
            self.pages_due = event.payload
        return event

    def _check_turn(self, kind: Type, parties: tuple[Party, Party]) -> None:
        if not any(kind in _MAY_SEND.get((self.state, party), ()) for party in parties):
            who = "/".join(party.name.lower() for party in parties)
            raise ProtocolError(f"{kind.name} from the {who} is out of turn ({self.state.name.lower()})")

    def _pass(self, event: Event, kind: Type, parties: tuple[Party, Party]) -> None:
        """The event goes through the connection, in whichever direction."""
        self._check_turn(kind, parties)
        if isinstance(event, Hello):
            self.role = event.role
        if isinstance(event, Welcome):
            assert self.role is not None, "WELCOME is in turn only after HELLO"
            self.state = _SERVES[self.role]
        else:
            self.state = _NEXT.get((self.state, kind), self.state)


def _owned(part: memoryview) -> bytes:
    """Without a copy when it is all of an object that nobody can change: images come as a megabyte in one piece."""
    whole = part.obj
    return whole if isinstance(whole, bytes) and len(whole) == len(part) else bytes(part)


# --- events <-> frames ----------------------------------------------------------------------------------


def _to_frame(kind: Type, event: Event, length: int) -> Frame:
    match event:
        case Get(obj, addr, count, tag, packed):
            return Frame(kind, Flag.PACKED if packed else 0, 0, count, obj, addr, tag)
        case Pages(obj, addr, count, tag, flags, crc):
            return Frame(kind, flags, 0, count, obj, addr, tag, crc)
    return Frame(kind, count=length)


def _to_payload(event: Event) -> bytes:
    match event:
        case Hello(role, session, token, version, revision, resume):
            _check_names(session, token)
            greeting: dict[str, JsonValue] = {"version": version, "revision": revision, "role": role.value}
            going_on: dict[str, JsonValue] = {"resume": True} if resume else {}
            return jsonobject.encode({**greeting, "session": session, "token": token, **going_on})
        case Welcome(session, version, revision):
            _check_names(session)
            return jsonobject.encode({"version": version, "revision": revision, "session": session})
        case Control(fields):
            return jsonobject.encode(fields)
        case Images(data) | Forecast(data):
            return data
        case Map(entries) | Ack(entries):
            return b"".join(_pack_entry(entry) for entry in entries)
        case Trace(records, lost):
            return _pack_trace(records, lost)
    return b""


def _to_event(frame: Frame, payload: bytes) -> Event:
    kind = Type(frame.type)
    if kind is Type.GET:
        return Get(frame.object, frame.addr, frame.count, frame.tag, bool(frame.flags & Flag.PACKED))
    if kind is Type.PAGES:
        return Pages(frame.object, frame.addr, frame.count, frame.tag, Flag(frame.flags), frame.crc)
    if kind in _CONTROL:
        return _CONTROL[kind](jsonobject.decode(payload))
    if kind in _PARSERS:
        return _PARSERS[kind](payload)
    return _BARE[kind]


def _to_hello(payload: bytes) -> Hello:
    fields = jsonobject.decode(payload)
    try:
        role = Role(str(fields.get("role")))
    except ValueError:
        raise ProtocolError(f"HELLO names the unknown role {fields.get('role')!r:.40}") from None
    resume = fields.get("resume", False)
    if not isinstance(resume, bool):
        raise ProtocolError("HELLO's resume is neither true nor false")
    names = _name(fields, "session"), _name(fields, "token")
    return Hello(role, *names, _version(fields), _revision(fields), resume)


def _to_welcome(payload: bytes) -> Welcome:
    fields = jsonobject.decode(payload)
    return Welcome(_name(fields, "session"), _version(fields), _revision(fields))


def _version(fields: Mapping[str, JsonValue]) -> int:
    """Unknown keys beside it pass, so that a newer peer can still be told which version is spoken here."""
    version = fields.get("version")
    if type(version) is not int or version < 1:
        raise ProtocolError(f"the greeting's version is {version!r:.40}, not a number from 1")
    return version


def _revision(fields: Mapping[str, JsonValue]) -> int:
    """0 for the first ends, which did not say it."""
    revision = fields.get("revision", 0)
    if type(revision) is not int or revision < 0:
        raise ProtocolError(f"the greeting's revision is {revision!r:.40}, not a number from 0")
    return revision


def _name(fields: Mapping[str, JsonValue], key: str) -> str:
    value = fields.get(key)
    if not isinstance(value, str):
        raise ProtocolError(f"the greeting has no {key}")
    _check_names(value)
    return value


def _check_names(*names: str) -> None:
    for name in names:
        if not 1 <= len(name) <= MAX_NAME or set(name) - set(string.hexdigits):
            raise ProtocolError(f"a session or token is 1 to {MAX_NAME} hexadecimal digits")


def _to_map(payload: bytes) -> Map:
    return Map(_to_entries(payload))


def _to_ack(payload: bytes) -> Ack:
    return Ack(_to_entries(payload))


def _to_entries(payload: bytes) -> list[MapEntry]:
    if len(payload) % _MAP_ENTRY.size:
        raise ProtocolError(f"{len(payload)} bytes are not a whole number of entries")
    entries = [MapEntry._make(entry) for entry in _MAP_ENTRY.iter_unpack(payload)]
    for entry in entries:
        _check_entry(entry)
    return entries


def _to_trace(payload: bytes) -> Trace:
    records = payload[_LOST.size :]
    if len(payload) < _LOST.size or len(records) % RECORD.size:
        raise ProtocolError(f"TRACE of {len(payload)} bytes is not a number and whole records")
    return Trace(records, _LOST.unpack_from(payload)[0])


def _pack_trace(records: bytes, lost: int) -> bytes:
    if not 0 <= lost < 1 << 64 or len(records) % RECORD.size:
        raise ProtocolError(
            f"TRACE of {len(records)} bytes and {lost} lost is not a number and whole records"
        )
    return _LOST.pack(lost) + records


def _pack_entry(entry: MapEntry) -> bytes:
    _check_entry(entry)
    return _MAP_ENTRY.pack(*entry)


def _check_entry(entry: MapEntry) -> None:
    memory_object(entry.object)
    if not is_range(entry.addr, entry.pages):
        raise ProtocolError(f"an entry of {entry.pages} pages at {entry.addr:#x} is no range of pages")


def memory_object(key: int) -> MemoryObject:
    """The object that a number on the wire names. Raises ProtocolError if it names none."""
    if 0 <= key < 1 << 64 and key & 0xFF in _KINDS:
        return MemoryObject(ObjectKind(key & 0xFF), key >> 8)
    raise ProtocolError(f"{key:#x} is not the number of a memory object")


_KINDS = frozenset(ObjectKind)
_PARSERS: Mapping[Type, Callable[[bytes], Event]] = {
    Type.HELLO: _to_hello,
    Type.WELCOME: _to_welcome,
    Type.IMAGES: Images,
    Type.FORECAST: Forecast,
    Type.MAP: _to_map,
    Type.TRACE: _to_trace,
    Type.ACK: _to_ack,
}
