"""Listening, dialling and who is let in, over real sockets and with real users."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from lazyproc import events
from lazyproc.errors import (
    CannotListen,
    ConnectionLost,
    ImageError,
    PermissionDenied,
    ProtocolError,
    UsageError,
)
from lazyproc.hosts import Pair
from lazyproc.migrate import talk
from lazyproc.model import PAGE, Extent, MemoryObject, ObjectKind
from lazyproc.pages import door
from lazyproc.pages.address import parse_address
from lazyproc.pages.channel import STALL_S, Channel
from lazyproc.pages.dial import dial
from lazyproc.pages.door import Door, listen
from lazyproc.pages.frozen import FrozenPages, Place
from lazyproc.pages.peer import Trust, find_uid, peer_uid
from lazyproc.pages.remote import RemotePages, extents_of, maps_of
from lazyproc.pages.server import PageServer
from lazyproc.pages.session import Session
from lazyproc.wire.frame import Flag, Type
from lazyproc.wire.native import (
    REVISION,
    Connection,
    Event,
    Get,
    Hello,
    Images,
    Map,
    Pages,
    Party,
    Ping,
    Prepare,
    Prepared,
    Role,
    Welcome,
)
from tests.forked import ending
from tests.live.programs import wait_until
from tests.live.test_server import memory, stopped_child

NOBODY = 65534
TASK = MemoryObject(ObjectKind.TASK, 42)
SESSION = Session("5e", "70")
US = Trust()


# --- the two ends of a test -----------------------------------------------------------------------------


@contextmanager
def listening(address: str = "127.0.0.1:0", trust: Trust = US) -> Iterator[tuple[Door, str, list[str]]]:
    """(listener, its address, what it reported); the listener is the destination."""
    notes: list[str] = []

    def report(event: events.Event) -> None:
        assert isinstance(event, events.Note)
        notes.append(event.text)

    with listen(address, Party.DESTINATION, trust=trust, report=report) as listener:
        yield listener, f"{address.rpartition(':')[0]}:{listener.port}", notes


def accepted(listener: Door) -> Channel:
    channel = listener.accept(10)
    assert channel is not None
    return channel


@contextmanager
def channels(role: Role, trust: Trust = US) -> Iterator[tuple[Channel, Channel]]:
    """(source, destination); the source has dialled."""
    with listening(trust=trust) as (listener, address, _), ThreadPoolExecutor(1) as pool:
        dialled = pool.submit(dial, address, SESSION.hello(role), Party.SOURCE, trust=trust)
        with accepted(listener) as destination:
            assert destination.hello == SESSION.hello(role)
            destination.welcome()
            with dialled.result() as source:
                yield source, destination


@contextmanager
def child(run: Callable[[], None], uid: int) -> Iterator[Future[int]]:
    """Another process of that user; the result is its exit status, 0 when `run` returned."""
    "".encode("idna")  # what socket looks up hosts with; the other user may not be able to load it
    pid = os.fork()
    if pid == 0:
        with ending():
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            run()
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(lambda: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        try:
            yield ended
        finally:
            if not ended.done():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def hello_bytes() -> bytes:
    return Connection(Party.SOURCE, dialled=True).send(SESSION.hello(Role.CONTROL))


def bare(address: str) -> socket.socket:
    sock = socket.create_connection(parse_address(address))
    sock.settimeout(10)
    return sock


def is_hung_up(sock: socket.socket) -> bool:
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


# --- addresses ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("10.0.0.1:80", ("10.0.0.1", 80)),
        ("a.example:0", ("a.example", 0)),
        ("[::1]:65535", ("::1", 65535)),
        ("[fe80::1%eth0]:1", ("fe80::1%eth0", 1)),
    ],
)
def test_addresses(text: str, parsed: tuple[str, int]) -> None:
    assert parse_address(text) == parsed


@pytest.mark.parametrize("text", ["", "a", "a:", ":80", "a:x", "a:65536", "a:-1", "::1:80", "[::1]", "a:٣"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(UsageError, match="write"):
        parse_address(text)


@pytest.mark.parametrize("text", ["a..b:80", ".a:80", "a" * 64 + ":80", "a\udcff:80"])
def test_what_is_no_name(text: str) -> None:
    with pytest.raises(UsageError, match="check the name"):
        parse_address(text)


def test_an_address_in_use_says_what_to_do() -> None:
    with listening() as (_, address, _), pytest.raises(CannotListen, match="in use; stop who listens"):
        listen(address, Party.SOURCE, trust=US)


def test_an_address_of_somebody_else() -> None:
    with pytest.raises(CannotListen, match="does not have the address"):
        listen("192.0.2.1:0", Party.SOURCE, trust=US)


def test_nobody_listens() -> None:
    with listening() as (_, address, _):
        pass
    with pytest.raises(ConnectionLost, match="nobody listens there; start"):
        dial(address, SESSION.hello(Role.CONTROL), Party.SOURCE, trust=US)


# --- a channel ------------------------------------------------------------------------------------------


def test_events_go_both_ways() -> None:
    with channels(Role.CONTROL) as (source, destination):
        for event in (Prepare({"pid": 7, "name": "ä"}), Images(os.urandom(3 << 20))):
            with ThreadPoolExecutor(1) as pool:
                sending = pool.submit(source.send, event)
                assert destination.receive(10) == event
                sending.result()
        destination.send(Prepared({"ok": True}))
        assert source.receive(10) == Prepared({"ok": True})


def test_a_ping_is_answered_without_the_caller() -> None:
    with channels(Role.CONTROL) as (source, destination):
        source.send(Ping())
        source.send(Prepare())
        assert destination.receive(10) == Prepare()
        assert type(source.receive(10)).__name__ == "Pong"


def test_a_timeout_loses_nothing() -> None:
    ours, theirs = socket.socketpair()
    with Channel(ours, Party.DESTINATION) as channel, theirs:
        data = hello_bytes()
        assert channel.receive(0) is None
        theirs.sendall(data[:40])
        assert channel.receive(0.01) is None
        theirs.sendall(data[40:] + b"for the next reader")
        assert channel.receive(10) == SESSION.hello(Role.CONTROL)
        fd = channel.detach()
        assert os.read(fd, 100) == b"for the next reader"
        assert os.get_blocking(fd)
        os.close(fd)


def test_a_peer_that_hangs_up() -> None:
    with channels(Role.CONTROL) as (source, destination):
        source.close()
        with pytest.raises(ConnectionLost, match="hung up"):
            destination.receive(10)


def test_a_peer_that_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Is gone as soon as one that says nothing, once that is watched."""
    with channels(Role.CONTROL) as (source, _):
        monkeypatch.setattr(talk, "DEAD_S", 0.05)
        talk.Pulse(source)
        with pytest.raises(ConnectionLost, match="taken nothing"):
            source.send(Images(bytes(64 << 20)))


def test_connections_notice_a_vanished_peer() -> None:
    with channels(Role.CONTROL) as (source, destination):
        for channel in (source, destination):
            option = channel.socket.getsockopt
            assert option(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert option(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert option(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == STALL_S * 1000


# --- greetings ------------------------------------------------------------------------------------------


def test_a_session_knows_its_own() -> None:
    session = Session.new()
    assert session.owns(session.hello(Role.BULK))
    assert not session.owns(Session(session.id, "70").hello(Role.BULK))
    assert not session.owns(Session("5e", session.token).hello(Role.BULK))
    assert session.token not in repr(session) + repr(session.hello(Role.BULK))


def test_a_refusal_reaches_the_dialler() -> None:
    with listening() as (listener, address, _), ThreadPoolExecutor(1) as pool:
        dialled = pool.submit(dial, address, SESSION.hello(Role.BULK), Party.SOURCE, trust=US)
        accepted(listener).refuse("there is no such session here")
        with pytest.raises(ProtocolError, match="no such session here"):
            dialled.result()


def test_another_version_is_told_which_one_is_spoken() -> None:
    with listening() as (listener, address, notes), ThreadPoolExecutor(1) as pool:
        hello = Hello(Role.CONTROL, "5e", "70", version=2)
        dialled = pool.submit(dial, address, hello, Party.SOURCE, trust=US)
        assert listener.accept(0.3) is None
        with pytest.raises(ProtocolError, match="version 1 of the protocol is spoken here, not 2"):
            dialled.result()
        assert len(notes) == 1


def test_a_listener_that_says_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ConnectionLost, match="no answer"):
            dial(address, SESSION.hello(Role.CONTROL), Party.SOURCE, trust=US, timeout=0.1)


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\nHost: here\r\nAccept: */*\r\n\r\n", bytes(100)])
def test_garbage_ends_its_connection_and_nothing_else(garbage: bytes) -> None:
    with listening() as (listener, address, notes), bare(address) as stranger:
        stranger.sendall(garbage)
        assert listener.accept(0.1) is None
        assert is_hung_up(stranger)
        assert len(notes) == 1
        with bare(address) as peer:
            peer.sendall(hello_bytes())
            accepted(listener).close()


def test_slow_strangers_delay_nobody_and_are_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    with listening() as (listener, address, _):
        strangers = [bare(address) for _ in range(10)]
        for stranger in strangers[5:]:
            stranger.sendall(hello_bytes()[:-1])
        assert listener.accept(0.05) is None
        with bare(address) as peer:
            peer.sendall(hello_bytes())
            accepted(listener).close()
        strangers[9].sendall(hello_bytes()[-1:])
        accepted(listener).close()
        monkeypatch.setattr(door, "HANDSHAKE_S", 0.05)
        with bare(address) as late:
            assert listener.accept(0.3) is None
            assert is_hung_up(late)
        for stranger in strangers:
            stranger.close()


def test_the_oldest_of_too_many_strangers_has_to_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "MAX_STRANGERS", 3)
    with listening() as (listener, address, _):
        strangers = [bare(address) for _ in range(5)]
        assert listener.accept(0.05) is None
        assert is_hung_up(strangers[0])
        assert is_hung_up(strangers[1])
        strangers[2].sendall(hello_bytes())
        accepted(listener).close()
        for stranger in strangers:
            stranger.close()


# --- who is let in --------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["127.0.0.1:0", "[::1]:0", "[::]:0"])
def test_another_user_gets_nothing(address: str) -> None:
    with listening(address) as (listener, where, notes):

        def knock() -> None:
            with bare(where.replace("[::]", "127.0.0.1")) as sock:
                sock.sendall(hello_bytes())
                assert is_hung_up(sock)

        with child(knock, NOBODY) as ended:
            while not notes:
                assert listener.accept(0.05) is None
            assert ended.result(10) == 0
        assert f"the peer is uid {NOBODY}" in notes[0]
        assert f"--allow-uid {NOBODY}" in notes[0]


@pytest.mark.parametrize(
    ("address", "trust"),
    [
        ("127.0.0.1:0", Trust(uids=frozenset({NOBODY}))),
        ("[::]:0", Trust(uids=frozenset({NOBODY}))),
        ("127.0.0.1:0", Trust(insecure=True)),
    ],
)
def test_another_user_who_was_named(address: str, trust: Trust) -> None:
    with listening(address, trust) as (listener, where, _):

        def knock() -> None:
            with bare(where.replace("[::]", "127.0.0.1")) as sock:
                sock.sendall(hello_bytes())
                assert sock.recv(32)[0] == Type.WELCOME

        with child(knock, NOBODY) as ended:
            with accepted(listener) as channel:
                channel.welcome()
            assert ended.result(10) == 0


def test_who_closes_at_once_is_not_taken_for_root() -> None:
    """The kernel shows uid 0 for what is left of a closed socket."""
    with listening() as (listener, where, notes):
        door = f"0100007F:{listener.port:04X}"

        def knock() -> None:
            with bare(where) as sock:
                sock.sendall(hello_bytes())

        def remnant() -> bool:
            rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
            return any(row[2] == door and row[7] == row[9] == "0" for row in rows)

        with child(knock, NOBODY) as ended:
            assert ended.result(10) == 0
        wait_until(remnant, "the stranger's socket belongs to nobody")
        assert listener.accept(0.1) is None
        assert "can be identified" in notes[0]


def test_a_listener_of_another_user_is_not_talked_to() -> None:
    with socket.create_server(("127.0.0.1", 0)) as reserved, socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        port = reserved.getsockname()[1]
    gate, opened = os.pipe()

    def pretend() -> None:
        with socket.create_server(("127.0.0.1", port)) as listener:
            os.write(opened, b"1")
            with listener.accept()[0] as peer:
                peer.recv(1000)
                acceptor = Connection(Party.DESTINATION, dialled=False)
                acceptor.receive_data(hello_bytes())
                peer.sendall(acceptor.send(Welcome("5e")))
                assert is_hung_up(peer)

    with child(pretend, NOBODY) as ended:
        assert os.read(gate, 1) == b"1"
        with pytest.raises(PermissionDenied, match=f"uid {NOBODY}"):
            dial(f"127.0.0.1:{port}", SESSION.hello(Role.CONTROL), Party.SOURCE, trust=US)
        assert ended.result(10) == 0
    os.close(gate)
    os.close(opened)


def test_a_peer_on_a_unix_socket() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert peer_uid(ours) == os.geteuid()


def test_a_table_of_connections() -> None:
    head = "  sl  local_address rem_address   st tx_queue rx_queue tr ...   uid  timeout inode"
    row = "   0: 0100007F:1F90 0100007F:D431 {} 0:0 00:00000000 00000000 {} 0 {} 1 0 20 4 30"

    def uid(state: str, owner: int, inode: int) -> int | None:
        table = "\n".join((head, row.format(state, owner, inode)))
        return find_uid(table.splitlines(), "0100007F:1F90", "0100007F:D431")

    assert uid("01", 1000, 5) == 1000
    assert uid("01", 0, 0) is None
    assert uid("06", 0, 0) is None
    assert find_uid([head], "0100007F:1F90", "0100007F:D431") is None


_SCRIPT = """
from lazyproc.errors import *
from lazyproc.pages.channel import *
from lazyproc.pages.dial import *
from lazyproc.pages.door import *
from lazyproc.pages.peer import *
from lazyproc.pages.session import *
from lazyproc.wire.native import *
trust = Trust({trust})
address = "{address}:7777"
"""
_WAIT = """
def report(note):
    print(note.text, flush=True)
with listen(address, Party.DESTINATION, trust=trust, report=report) as listener:
    print("ready", flush=True)
    channel = listener.accept()
    channel.welcome()
    print(channel.receive(10))
"""
_CALL = """
try:
    channel = dial(address, Session.new().hello(Role.CONTROL), Party.SOURCE, trust=trust, timeout=5)
    channel.send(Prepare({"a": 1}))
except LazyprocError as error:
    print(type(error).__name__)
"""


@pytest.mark.parametrize(
    ("listener", "caller", "heard", "answer"),
    [
        ("", "insecure=True", "--insecure", "ConnectionLost"),
        ("insecure=True", "", "hung up", "PermissionDenied"),
        ("insecure=True", "insecure=True", "Prepare(fields={'a': 1})", ""),
    ],
)
def test_another_host_needs_insecure_by_name(
    pair: Pair, listener: str, caller: str, heard: str, answer: str
) -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(door.__file__).parents[2])}

    def argv(trust: str, script: str) -> list[str]:
        return [sys.executable, "-c", _SCRIPT.format(trust=trust, address=pair.destination.address) + script]

    with pair.destination.popen(
        argv(listener, _WAIT), env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as waiting:
        assert waiting.stdout is not None
        assert waiting.stdout.readline() == "ready\n"
        called = pair.source.run(argv(caller, _CALL), env=env, check=True, capture_output=True, text=True)
        assert called.stdout.strip() == answer
        while heard not in (line := waiting.stdout.readline()):
            assert line, "the listener has ended without a word"
        waiting.kill()


# --- pages over it --------------------------------------------------------------------------------------


def test_pages_of_a_stopped_process_over_a_dialled_channel() -> None:
    area = memory(2500)
    extents = {TASK: (Extent(area.addr, 2400, lazy=True), Extent(area.addr + 2400 * PAGE, 100, lazy=True))}
    place = Place(TASK, area.addr, area.addr + 2500 * PAGE, 0, area.addr)
    with (
        stopped_child() as pid,
        FrozenPages([place._replace(pid=pid)], extents) as frozen,
        PageServer(frozen.segments()) as server,
        channels(Role.BULK) as (source, destination),
    ):
        server.serve(source.detach(), "bulk")
        (event,) = maps_of(frozen.extents(), REVISION)
        assert isinstance(event, Map)
        pages = RemotePages(destination, extents_of(event.entries))
        assert pages.extents() == extents
        assert pages.read(TASK, area.addr, 2500) == area.expected(area.addr, 2500)
        with pytest.raises(ImageError, match=f"{area.addr + 2500 * PAGE:#x}"):
            pages.read(TASK, area.addr + 2499 * PAGE, 2)
        pages._tag = 2**32 - 1  # so many requests have been made, and their numbers begin anew
        assert pages.read(TASK, area.addr, 1) == area.expected(area.addr, 1)
        pages.finish()
        with pytest.raises(ConnectionLost):
            destination.receive(10)
        assert server.ended("bulk") == "the client closed it"


@pytest.mark.parametrize(
    ("answer", "content", "error"),
    [
        (Pages(TASK.key, 0, 1, 1, Flag.LAST, 5), bytes(PAGE), ProtocolError),  # checksum
        (Pages(TASK.key, 0, 2, 1, Flag.NONE, 5), b"", ProtocolError),  # LAST is missing
        (Pages(TASK.key, 0, 1, 1, Flag.ZERO | Flag.LAST, 0), b"", ProtocolError),  # LAST is too early
        (Pages(TASK.key, 0, 3, 1, Flag.ZERO | Flag.LAST, 0), b"", ProtocolError),  # more than asked
        (Pages(TASK.key, PAGE, 1, 1, Flag.ZERO, 0), b"", ProtocolError),
        (Pages(TASK.key + 256, 0, 1, 1, Flag.ZERO, 0), b"", ProtocolError),
        (Pages(TASK.key, 0, 1, 2, Flag.ZERO, 0), b"", ProtocolError),
        (Pages(TASK.key, 0, 2, 1, Flag.LAST, 5), b"half", ConnectionLost),
        (None, b"", ConnectionLost),
    ],
)
def test_a_server_that_answers_wrongly(answer: Event | None, content: bytes, error: type[Exception]) -> None:
    with channels(Role.URGENT) as (source, destination):

        def serve() -> None:
            assert source.receive(10) == Get(TASK.key, 0, 2, 1)
            if answer is not None:
                source.send(answer)
            source.socket.sendall(content)
            source.close()

        server = threading.Thread(target=serve)
        server.start()
        with pytest.raises(error):
            RemotePages(destination, {}).read(TASK, 0, 2)
        server.join()


def test_a_server_that_says_nothing() -> None:
    with channels(Role.URGENT) as (_, destination), pytest.raises(ConnectionLost, match="no answer"):
        RemotePages(destination, {}, timeout=0.05).read(TASK, 0, 1)
