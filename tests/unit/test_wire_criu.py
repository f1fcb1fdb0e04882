"""CRIU's page server protocol, both headers, both ends."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyproc.errors import ProtocolError
from lazyproc.model import PAGE
from lazyproc.wire.criu import (
    Command,
    Connection,
    Dialect,
    Event,
    Flag,
    HasParent,
    Message,
    PageBytes,
    Role,
    Status,
    decode,
    detect,
    encode,
)
from tests.unit.garbage import garbage

dialects = st.sampled_from(Dialect)
addresses = st.integers(1, 2**47 // PAGE).map(lambda page: page * PAGE)
counts = st.integers(1, 1024)
ids = st.integers(1, 2**32)
steps = st.sampled_from((1, 7, 24, 4096, 9000))  # bytes that arrive at a time
gets = st.builds(Message, st.just(Command.GET), counts, addresses, ids)
opens = st.builds(Message, st.sampled_from((Command.OPEN2, Command.PARENT, Command.OPEN)), dst_id=ids)
adds = st.builds(
    Message,
    st.just(Command.ADD_F),
    st.integers(1, 3),
    addresses,
    ids,
    st.sampled_from((Flag.PRESENT, Flag.PRESENT | Flag.LAZY, Flag.LAZY, Flag.PARENT)),
)
legacy = st.builds(Message, st.sampled_from((Command.ADD, Command.HOLE)), st.integers(1, 3), addresses, ids)
closes = st.builds(Message, st.sampled_from((Command.CLOSE, Command.FORCE_CLOSE)))
messages_of_garbage = st.builds(
    lambda command, rest: int(command).to_bytes(2, "little") + rest, st.sampled_from(Command), garbage(100)
)


def received(connection: Connection, data: bytes, step: int) -> list[Event | bytes]:
    """Fed in pieces; the content of one message in one piece."""
    result: list[Event | bytes] = []
    for at in range(0, len(data), step):
        for event in connection.receive_data(data[at : at + step]):
            if not isinstance(event, PageBytes):
                result.append(event)
            elif isinstance(result[-1], bytes):
                result[-1] += bytes(event.data)
            else:
                result.append(bytes(event.data))
    return result


@given(dialects, gets | opens | adds | legacy | closes)
def test_a_header_comes_back(dialect: Dialect, message: Message) -> None:
    header = encode(message, dialect)
    assert len(header) == dialect.size
    assert decode(header, dialect) == message


def test_the_layouts_are_those_of_criu() -> None:
    message = Message(Command.ADD_F, 3, 0x7F0000001000, 42, Flag.PRESENT)
    old, new = (encode(message, dialect).hex() for dialect in (Dialect.V4_1, Dialect.V4_2))
    assert old == "060004000300000000100000007f00002a00000000000000"
    assert new == "0600040000000000030000000000000000100000007f00002a00000000000000"
    padded = bytearray.fromhex(new)
    padded[4:8] = b"\xaa" * 4
    assert decode(bytes(padded), Dialect.V4_2) == message


@given(dialects, gets | opens | adds | legacy, st.binary(min_size=4, max_size=4))
def test_the_first_message_tells_the_dialect(dialect: Dialect, first: Message, padding: bytes) -> None:
    data = bytearray(encode(first, dialect))
    if dialect is Dialect.V4_2:
        data[4:8] = padding
    assert all(detect(data[:length]) is None for length in range(24))
    assert detect(data[:24]) is dialect
    server = Connection(Role.SERVER)
    assert received(server, bytes(data), 1)[0] == first
    assert server.dialect is dialect


@given(dialects, st.lists(opens | adds | legacy, min_size=1, max_size=5), steps)
def test_a_dump_that_sends_its_pages(dialect: Dialect, messages: list[Message], step: int) -> None:
    client, server = Connection(Role.CLIENT, dialect), Connection(Role.SERVER)
    expected: list[Event | bytes] = []
    data = b""
    for message in [*messages, Message(Command.CLOSE)]:
        content = b"\x05" * message.payload
        data += client.send(message) + content
        expected += [message, content] if content else [message]
    assert received(server, data, step) == expected
    answers: list[HasParent | Status] = [
        HasParent(True) for message in messages if message.command in (Command.OPEN2, Command.PARENT)
    ]
    answers.append(Status(-5))
    assert received(client, b"".join(server.send(answer) for answer in answers), step) == answers


@given(dialects, st.lists(gets, min_size=1, max_size=5), steps, st.data())
def test_a_daemon_that_asks_for_pages(
    dialect: Dialect, messages: list[Message], step: int, data: st.DataObject
) -> None:
    client, server = Connection(Role.CLIENT, dialect), Connection(Role.SERVER)
    requests = b"".join(client.send(message) for message in [*messages, Message(Command.CLOSE)])
    assert received(server, requests, step) == [*messages, Message(Command.CLOSE)]
    answers = b""
    expected: list[Event | bytes] = []
    for get in messages:
        count = data.draw(st.integers(1, min(3, get.nr_pages)))
        answer = Message(Command.ADD_F, count, get.vaddr, get.dst_id, Flag.PRESENT)
        content = b"\x07" * answer.payload
        answers += server.send(answer) + content
        expected += [answer, content]
    answers += server.send(Status(0))
    assert received(client, answers, step) == [*expected, Status(0)]


@given(garbage(100) | messages_of_garbage, st.sampled_from(Role), dialects, st.booleans())
def test_garbage_is_a_protocol_error_or_nothing(
    data: bytes, role: Role, dialect: Dialect, asked: bool
) -> None:
    connection = Connection(role, dialect if role is Role.CLIENT else None)
    if role is Role.CLIENT and asked:
        connection.send(Message(Command.GET, 1, PAGE, 1))
    with suppress(ProtocolError):
        connection.receive_data(data)


@given(dialects, gets | opens | adds, st.data())
def test_a_changed_byte_is_a_protocol_error_or_another_event(
    dialect: Dialect, message: Message, data: st.DataObject
) -> None:
    header = bytearray(encode(message, dialect))
    header[data.draw(st.integers(0, len(header) - 1))] = data.draw(st.integers(0, 255))
    with suppress(ProtocolError):
        Connection(Role.SERVER).receive_data(header)


@pytest.mark.parametrize(
    ("request_", "answer"),
    [
        (Message(Command.GET, 2, PAGE, 7), Message(Command.ADD_F, 3, PAGE, 7, Flag.PRESENT)),
        (Message(Command.GET, 2, PAGE, 7), Message(Command.ADD_F, 2, 2 * PAGE, 7, Flag.PRESENT)),
        (Message(Command.GET, 2, PAGE, 7), Message(Command.ADD_F, 2, PAGE, 8, Flag.PRESENT)),
        (Message(Command.GET, 2, PAGE, 7), Message(Command.ADD_F, 2, PAGE, 7, Flag.LAZY)),
        (Message(Command.OPEN2, dst_id=7), Message(Command.ADD_F, 2, PAGE, 7, Flag.PRESENT)),
        (Message(Command.OPEN2, dst_id=7), Status(0)),
        (Message(Command.GET, 2, PAGE, 7), Status(0)),
        (Message(Command.OPEN, dst_id=7), HasParent(False)),
    ],
)
def test_an_answer_to_something_else(request_: Message, answer: Message | HasParent | Status) -> None:
    server = Connection(Role.SERVER)
    server.receive_data(encode(request_, Dialect.V4_2))
    with pytest.raises(ProtocolError):
        server.send(answer)
    if isinstance(answer, Message) and request_.command is Command.GET:
        client = Connection(Role.CLIENT, Dialect.V4_2)
        client.send(request_)
        with pytest.raises(ProtocolError):
            client.receive_data(encode(answer, Dialect.V4_2))


@pytest.mark.parametrize(
    "messages",
    [
        [Message(Command.CLOSE), Message(Command.GET, 1, PAGE, 1)],
        [Message(Command.GET, 0, PAGE, 1)],
        [Message(Command.GET, 1, PAGE + 1, 1)],
        [Message(Command.GET, 1, 2**64 - PAGE, 1)],
        [Message(Command.GET, 2**21, PAGE, 1)],
        [Message(Command.GET, 1, PAGE, 1, Flag.PRESENT)],
        [Message(Command.GET, 1, PAGE, 2**64)],
    ],
)
def test_what_a_client_may_not_say(messages: Sequence[Message]) -> None:
    client = Connection(Role.CLIENT, Dialect.V4_2)
    for message in messages[:-1]:
        client.send(message)
    with pytest.raises(ProtocolError):
        client.send(messages[-1])


def test_a_client_has_to_choose_its_dialect() -> None:
    with pytest.raises(ProtocolError, match="dialect"):
        Connection(Role.CLIENT)


def test_a_parent_flag_is_0_or_1() -> None:
    client = Connection(Role.CLIENT, Dialect.V4_2)
    client.send(Message(Command.OPEN2, dst_id=7))
    with pytest.raises(ProtocolError):
        client.receive_data(b"\x02")
