"""The native protocol: whole, a byte at a time, with anything behind, and mutated."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyproc.errors import ProtocolError
from lazyproc.model import PAGE, MemoryObject, ObjectKind
from lazyproc.wire import native
from lazyproc.wire.frame import (
    HEADER,
    MAX_ACK,
    MAX_BLOB,
    MAX_JSON,
    MAX_NEEDS,
    MAX_PAGES,
    MAX_TRACE,
    Flag,
    Frame,
    Type,
)
from lazyproc.wire.jsonobject import JsonValue
from lazyproc.wire.native import Connection, Event, Hello, PageBytes, Pages, Party, Role, State, Welcome
from tests.unit.garbage import garbage

SIDES = (Party.SOURCE, Party.DESTINATION)

# --- two ends -------------------------------------------------------------------------------------------

names = st.text("0123456789abcdef", min_size=1, max_size=native.MAX_NAME)
words = st.integers(0, 2**64 - 1)
keys = st.builds(
    lambda kind, number: number << 8 | kind, st.sampled_from(ObjectKind), st.integers(0, 2**56 - 1)
)
tags = st.integers(0, 2**32 - 1)
pages = st.integers(0, 2**52 - 1 - MAX_PAGES).map(lambda page: page * PAGE)
counts = st.integers(1, MAX_PAGES)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
fields = st.dictionaries(st.text(), json_values, max_size=5)

gets = st.builds(native.Get, words, pages, counts, tags, st.booleans())
data_pages = st.builds(
    Pages,
    words,
    pages,
    st.integers(1, 2),
    tags,
    st.sampled_from((Flag.NONE, Flag.LAST)),
    st.integers(0, 2**32 - 1),
)
empty_pages = st.builds(
    Pages,
    words,
    pages,
    counts,
    tags,
    st.sampled_from(
        [Flag(kind | last) for kind in (Flag.ZERO, Flag.ABSENT, Flag.UNDER_WAY) for last in (0, Flag.LAST)]
    ),
    st.just(0),
)
entries = st.lists(st.builds(native.MapEntry, keys, pages, counts), max_size=5)
maps = entries.map(native.Map)
acks = entries.map(native.Ack)
traces = st.builds(
    native.Trace, st.integers(0, 3).flatmap(lambda n: st.binary(min_size=72 * n, max_size=72 * n)), words
)
either = st.builds(native.Abort, fields) | st.just(native.Ping()) | st.just(native.Pong())
from_source = (
    st.builds(native.Prepare, fields)
    | st.builds(native.Needs, fields)
    | st.just(native.Ask())
    | st.builds(native.Images, st.binary(max_size=300))
    | st.builds(native.Forecast, st.binary(max_size=300))
    | st.builds(native.Commit, fields)
    | maps
    | st.builds(native.Released, fields)
    | either
)
from_destination = (
    st.builds(native.Prepared, fields)
    | st.builds(native.Obstacles, fields)
    | st.builds(native.Host, fields)
    | st.builds(native.Built, fields)
    | st.builds(native.Committed, fields)
    | st.builds(native.Running, fields)
    | traces
    | acks
    | st.builds(native.Drained, fields)
    | either
)


def greeted(role: Role, dialler: Party = Party.SOURCE) -> tuple[Connection, Connection]:
    """(source, destination), past HELLO and WELCOME."""
    source = Connection(Party.SOURCE, dialled=dialler is Party.SOURCE)
    destination = Connection(Party.DESTINATION, dialled=dialler is Party.DESTINATION)
    opener, acceptor = (source, destination) if dialler is Party.SOURCE else (destination, source)
    hello = Hello(role, "5e", "70")
    assert acceptor.receive_data(opener.send(hello)) == [hello]
    assert opener.receive_data(acceptor.send(Welcome("5e"))) == [Welcome("5e")]
    return source, destination


def joined(events: Sequence[Event]) -> list[Event | bytes]:
    """Events with adjacent PageBytes made one."""
    result: list[Event | bytes] = []
    for event in events:
        if not isinstance(event, PageBytes):
            result.append(event)
        elif result and isinstance(result[-1], bytes):
            result[-1] += bytes(event.data)
        else:
            result.append(bytes(event.data))
    return result


def payload_of(event: Event) -> bytes:
    """Some pages, if pages follow the event."""
    length = event.payload if isinstance(event, Pages) else 0
    return bytes(index % 251 for index in range(length))


def carried(sender: Connection, receivers: Sequence[Connection], events: Sequence[Event]) -> None:
    """What is sent arrives as one stream, a byte at a time, and with reads of exactly what is wanted."""
    parts = [sender.send(event) + payload_of(event) for event in events]
    data = b"".join(parts)
    expected = [part for event in events for part in (event, payload_of(event)) if part != b""]
    stream, bytewise, exact = receivers
    assert joined(stream.receive_data(data)) == expected
    assert joined([e for byte in data for e in bytewise.receive_data(bytes([byte]))]) == expected
    got: list[Event] = []
    while data:
        wanted = exact.wanted
        new = exact.receive_data(data[:wanted])
        assert len(new) <= 1
        got += new
        data = data[wanted:]
    assert joined(got) == expected


# --- what goes through ----------------------------------------------------------------------------------


@given(st.lists(from_source, max_size=4), st.lists(from_destination, max_size=4), st.sampled_from(SIDES))
def test_control(down: list[Event], up: list[Event], dialler: Party) -> None:
    ends = [greeted(Role.CONTROL, dialler) for _ in range(4)]
    carried(ends[0][0], [destination for _, destination in ends[:3]], down)
    carried(ends[3][1], [source for source, _ in ends[1:]], up)


@given(st.lists(gets, max_size=4), st.lists(data_pages | empty_pages, max_size=2), st.sampled_from(SIDES))
def test_pages(up: list[Event], down: list[Event], dialler: Party) -> None:
    ends = [greeted(Role.URGENT, dialler) for _ in range(4)]
    carried(ends[0][1], [source for source, _ in ends[:3]], [*up, native.Close()])
    carried(ends[3][0], [destination for _, destination in ends[1:]], down)


@given(names, names, st.sampled_from(Role), st.integers(1, 2**40), st.integers(0, 2**40))
def test_greeting(session: str, token: str, role: Role, version: int, revision: int) -> None:
    opener = Connection(Party.SOURCE, dialled=True)
    acceptor = Connection(Party.DESTINATION, dialled=False)
    hello = Hello(role, session, token, version, revision)
    assert acceptor.receive_data(opener.send(hello)) == [hello]
    assert acceptor.role is opener.role is role
    assert (acceptor.peer_revision, opener.peer_revision) == (revision, 0)
    assert repr(hello) == repr(Hello(role, session, "another", version, revision))
    welcome = Welcome(session, version, revision)
    assert opener.receive_data(acceptor.send(welcome)) == [welcome]
    assert opener.peer_revision == revision


def test_an_end_that_says_no_revision_is_of_the_first() -> None:
    """It is sent nothing that it does not know."""
    acceptor = Connection(Party.DESTINATION, dialled=False)
    payload = b'{"version":1,"role":"control","session":"5e","token":"70"}'
    (hello,) = acceptor.receive_data(HEADER.pack(Type.HELLO, 0, 0, len(payload), 0, 0, 0, 0) + payload)
    assert hello == Hello(Role.CONTROL, "5e", "70", revision=0)
    acceptor.send(Welcome("5e"))
    for answer in (native.Obstacles(), native.Host()):
        with pytest.raises(ProtocolError, match="older"):
            acceptor.send(answer)
    opener = Connection(Party.SOURCE, dialled=True)
    opener.send(Hello(Role.CONTROL, "5e", "70"))
    payload = b'{"version":1,"session":"5e"}'
    opener.receive_data(HEADER.pack(Type.WELCOME, 0, 0, len(payload), 0, 0, 0, 0) + payload)
    for question in (native.Needs(), native.Ask()):
        with pytest.raises(ProtocolError, match="older"):
            opener.send(question)
    opener.send(native.Prepare())


def test_the_layout_is_the_documented_one() -> None:
    _, destination = greeted(Role.BULK)
    data = destination.send(native.Get(42 << 8 | 1, 0x7F0000001000, 3, 9))
    assert data.hex() == "0100000003000000012a00000000000000100000007f00000900000000000000"
    source, _ = greeted(Role.CONTROL)
    assert source.send(native.Map([native.MapEntry(0x102, PAGE, 5)])) == HEADER.pack(
        25, 0, 0, 24, 0, 0, 0, 0
    ) + struct.pack("<QQQ", 0x102, PAGE, 5)
    assert source.send(native.Commit({"pages": 1})) == HEADER.pack(22, 0, 0, 11, 0, 0, 0, 0) + b'{"pages":1}'


def test_pages_are_not_copied_and_may_go_elsewhere() -> None:
    source, destination = greeted(Role.BULK)
    event = Pages(1, 0, 2, 1, Flag.LAST, 5)
    data = bytearray(source.send(event) + bytes(PAGE))
    got, content = destination.receive_data(data)
    assert got == event
    assert isinstance(content, PageBytes)
    data[-1] = 9
    assert content.data[-1] == 9
    assert destination.wanted == destination.pages_due == PAGE
    destination.take_pages(PAGE)
    assert destination.receive_data(source.send(event))[0] == event
    with pytest.raises(ProtocolError):
        destination.take_pages(2 * PAGE + 1)


def test_answers_still_come_after_close() -> None:
    source, destination = greeted(Role.URGENT)
    source.receive_data(destination.send(native.Close()))
    answer = Pages(1, 0, 1, 1, Flag.ZERO | Flag.LAST, 0)
    assert destination.receive_data(source.send(answer)) == [answer]
    with pytest.raises(ProtocolError, match="turn"):
        destination.send(native.Get(1, 0, 1, 1))


# --- what does not --------------------------------------------------------------------------------------


frames_of_garbage = st.builds(
    lambda kind, count, rest: HEADER.pack(kind, 0, 0, count, 0, 0, 0, 0) + rest,
    st.sampled_from(Type),
    st.integers(0, 200),
    garbage(300),
)


def receiver(role: Role | None, side: Party) -> Connection:
    if role is None:
        return Connection(side, dialled=False)
    return greeted(role)[side is Party.DESTINATION]


@given(garbage(200) | frames_of_garbage, st.none() | st.sampled_from(Role), st.sampled_from(SIDES))
def test_garbage_is_a_protocol_error_or_nothing(data: bytes, role: Role | None, side: Party) -> None:
    connection = receiver(role, side)
    try:
        connection.receive_data(data)
    except ProtocolError:
        assert connection.state is State.CLOSED
        with pytest.raises(ProtocolError):
            connection.receive_data(HEADER.pack(Type.PING, 0, 0, 0, 0, 0, 0, 0))


@given(from_source | from_destination | gets | data_pages, st.data())
def test_a_changed_byte_is_a_protocol_error_or_another_event(event: Event, data: st.DataObject) -> None:
    """And never more buffered than the limits allow."""
    for role in (Role.CONTROL, Role.URGENT):
        for sender, other in (greeted(role), greeted(role)[::-1]):
            try:
                stream = bytearray(sender.send(event))
            except ProtocolError:
                continue
            index = data.draw(st.integers(0, len(stream) - 1))
            stream[index] = data.draw(st.integers(0, 255))
            try:
                other.receive_data(stream)
            except ProtocolError:
                continue
            assert other.wanted <= max(MAX_BLOB, MAX_PAGES * PAGE)


@pytest.mark.parametrize(
    ("kind", "limit", "side"),
    [
        (Type.HELLO, MAX_JSON, Party.DESTINATION),
        (Type.PREPARE, MAX_JSON, Party.DESTINATION),
        (Type.IMAGES, MAX_BLOB, Party.DESTINATION),
        (Type.FORECAST, MAX_BLOB, Party.DESTINATION),
        (Type.MAP, MAX_BLOB, Party.DESTINATION),
        (Type.NEEDS, MAX_NEEDS, Party.DESTINATION),
        (Type.ASK, 0, Party.DESTINATION),
        (Type.TRACE, MAX_TRACE, Party.SOURCE),
        (Type.ACK, MAX_ACK, Party.SOURCE),
        (Type.PING, 0, Party.DESTINATION),
    ],
)
def test_lengths_are_refused_before_a_byte_of_payload_comes(kind: Type, limit: int, side: Party) -> None:
    connection = receiver(None if kind is Type.HELLO else Role.CONTROL, side)
    assert Frame.unpack(HEADER.pack(kind, 0, 0, limit, 0, 0, 0, 0)).length == limit
    with pytest.raises(ProtocolError, match=f"limit is {limit}"):
        connection.receive_data(HEADER.pack(kind, 0, 0, limit + 1, 0, 0, 0, 0))


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b'{"a":1,"a":2}',
        b'{"a":NaN}',
        b'{"a":1e999}',
        b'{"a":' + b"9" * 5000 + b"}",
        b"[" * 60000,
        b'{"a":' * 17 + b"1" + b"}" * 17,
        b'{"a":"\xff"}',
        b"\x80\x04K\x01.",
    ],
)
def test_what_is_not_a_plain_json_object(payload: bytes) -> None:
    connection = receiver(Role.CONTROL, Party.DESTINATION)
    with pytest.raises(ProtocolError):
        connection.receive_data(HEADER.pack(Type.PREPARE, 0, 0, len(payload), 0, 0, 0, 0) + payload)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 0},
        {"version": "1"},
        {"version": True},
        {"revision": -1},
        {"revision": "1"},
        {"revision": True},
        {"role": "root"},
        {"role": None},
        {"session": ""},
        {"session": "../../etc"},
        {"session": 7},
        {"token": "a" * 129},
        {"token": ["a"]},
        {"resume": 1},
        {"resume": "true"},
    ],
)
def test_what_is_not_a_hello(change: dict[str, object]) -> None:
    fields = {"version": 1, "role": "control", "session": "5e", "token": "70"} | change
    payload = json.dumps(fields).encode()
    with pytest.raises(ProtocolError):
        Connection(Party.SOURCE, dialled=False).receive_data(
            HEADER.pack(Type.HELLO, 0, 0, len(payload), 0, 0, 0, 0) + payload
        )


@pytest.mark.parametrize(
    "entry",
    [
        (0x103, 0, 1),
        (0x102, 1, 1),
        (0x102, 0, 0),
        (0x102, 2**64 - PAGE, 1),
        (0x102, PAGE, 2**63),
    ],
)
def test_what_is_not_a_map_entry(entry: tuple[int, int, int]) -> None:
    payload = struct.pack("<QQQ", *entry)
    connection = receiver(Role.CONTROL, Party.DESTINATION)
    with pytest.raises(ProtocolError):
        connection.receive_data(HEADER.pack(Type.MAP, 0, 0, len(payload), 0, 0, 0, 0) + payload)
    with pytest.raises(ProtocolError):
        receiver(Role.CONTROL, Party.SOURCE).send(native.Map([native.MapEntry(*entry)]))


def test_a_map_is_a_whole_number_of_entries() -> None:
    with pytest.raises(ProtocolError, match="whole number"):
        receiver(Role.CONTROL, Party.DESTINATION).receive_data(
            HEADER.pack(25, 0, 0, 25, 0, 0, 0, 0) + bytes(25)
        )


@pytest.mark.parametrize("length", [0, 7, 9, 8 + 71, 8 + 73])
def test_a_trace_is_a_number_and_whole_records(length: int) -> None:
    with pytest.raises(ProtocolError, match="whole records"):
        receiver(Role.CONTROL, Party.SOURCE).receive_data(
            HEADER.pack(Type.TRACE, 0, 0, length, 0, 0, 0, 0) + bytes(length)
        )


@pytest.mark.parametrize(
    ("length", "lost"), [(1, 0), (71, 0), (0, -1), (0, 2**64), (MAX_TRACE // 72 * 72 + 72, 0)]
)
def test_what_is_no_trace_is_not_sent(length: int, lost: int) -> None:
    with pytest.raises(ProtocolError):
        receiver(Role.CONTROL, Party.DESTINATION).send(native.Trace(bytes(length), lost))


@pytest.mark.parametrize(
    ("role", "side", "event"),
    [
        (None, Party.SOURCE, native.Ping()),
        (None, Party.SOURCE, Welcome("5e")),
        (Role.CONTROL, Party.SOURCE, native.Committed()),
        (Role.CONTROL, Party.SOURCE, native.Trace(b"", 0)),
        (Role.CONTROL, Party.DESTINATION, native.Commit()),
        (Role.CONTROL, Party.DESTINATION, native.Needs()),
        (Role.CONTROL, Party.SOURCE, native.Obstacles()),
        (Role.CONTROL, Party.DESTINATION, native.Ask()),
        (Role.CONTROL, Party.SOURCE, native.Host()),
        (Role.CONTROL, Party.DESTINATION, native.Get(1, 0, 1, 1)),
        (Role.CONTROL, Party.SOURCE, Hello(Role.CONTROL, "5e", "70")),
        (Role.URGENT, Party.SOURCE, native.Get(1, 0, 1, 1)),
        (Role.BULK, Party.DESTINATION, native.Abort()),
        (Role.BULK, Party.DESTINATION, Pages(1, 0, 1, 1, Flag.ZERO, 0)),
    ],
)
def test_nothing_is_said_out_of_turn(role: Role | None, side: Party, event: Event) -> None:
    with pytest.raises(ProtocolError, match="turn"):
        receiver(role, side).send(event)


def test_what_is_out_of_turn_is_refused_before_a_byte_of_payload_comes() -> None:
    with pytest.raises(ProtocolError, match="turn"):
        receiver(Role.CONTROL, Party.SOURCE).receive_data(HEADER.pack(Type.IMAGES, 0, 0, 100, 0, 0, 0, 0))


def test_nobody_is_let_in_after_he_was_refused() -> None:
    acceptor, opener = Connection(Party.DESTINATION, dialled=False), Connection(Party.SOURCE, dialled=True)
    acceptor.receive_data(opener.send(Hello(Role.CONTROL, "5e", "70")))
    assert opener.receive_data(acceptor.send(native.Abort({"reason": "no"})))
    for end, event in ((acceptor, Welcome("5e")), (opener, native.Prepare())):
        with pytest.raises(ProtocolError, match="turn"):
            end.send(event)


@pytest.mark.parametrize(
    "event",
    [
        native.Get(1, 0, 0, 1),
        native.Get(1, 0, MAX_PAGES + 1, 1),
        native.Get(1, 5, 1, 1),
        native.Get(1, -PAGE, 1, 1),
        native.Get(2**64, 0, 1, 1),
        native.Get(1, 0, 1, 2**32),
        PageBytes(memoryview(b"x")),
    ],
)
def test_nothing_out_of_bounds_is_sent(event: Event) -> None:
    with pytest.raises(ProtocolError):
        receiver(Role.URGENT, Party.DESTINATION).send(event)


@pytest.mark.parametrize("field", [1, 2, 4, 5, 6, 7])
def test_bits_that_mean_nothing(field: int) -> None:
    ping = [int(Type.PING), 0, 0, 0, 0, 0, 0, 0]
    ping[field] = 1
    with pytest.raises(ProtocolError, match="mean nothing"):
        receiver(Role.CONTROL, Party.SOURCE).receive_data(HEADER.pack(*ping))


@pytest.mark.parametrize(
    ("flags", "crc"),
    [(Flag.ZERO | Flag.ABSENT, 0), (Flag.ABSENT | Flag.UNDER_WAY, 0), (Flag.ZERO, 5), (Flag.PACKED, 0)],
)
def test_pages_are_of_one_kind(flags: Flag, crc: int) -> None:
    source, destination = greeted(Role.URGENT)
    with pytest.raises(ProtocolError, match="PAGES"):
        source.send(Pages(1, 0, 1, 1, flags, crc))
    with pytest.raises(ProtocolError, match="PAGES"):
        destination.receive_data(HEADER.pack(Type.PAGES, flags, 0, 1, 1, 0, 1, crc))


def test_fields_that_the_other_end_would_refuse_are_not_sent() -> None:
    deep: JsonValue = 1
    for _ in range(17):
        deep = [deep]
    for value in (deep, float("nan"), "x" * MAX_JSON):
        with pytest.raises(ProtocolError):
            receiver(Role.CONTROL, Party.SOURCE).send(native.Prepare({"a": value}))


def test_the_number_of_an_object() -> None:
    assert native.memory_object(42 << 8 | 1) == MemoryObject(ObjectKind.TASK, 42)
    for key in (0, 42 << 8, 2**64 + 1, -1):
        with pytest.raises(ProtocolError):
            native.memory_object(key)
