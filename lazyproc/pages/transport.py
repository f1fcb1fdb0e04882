"""The sockets of lazyproc's own traffic: listen, dial, and a channel that speaks lazyproc.wire.native.

A stranger gets nothing: who he is, is asked before a byte of his is read; the HELLO has a deadline; all
strangers wait side by side in one selector, so a slow one delays nobody.
"""

from __future__ import annotations

import errno
import os
import select
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import ParamSpec, Self, TypeAlias, TypeVar

from lazyproc import events
from lazyproc.errors import (
    CannotListen,
    ConnectionLost,
    LazyprocError,
    PermissionDenied,
    ProtocolError,
    UsageError,
)
from lazyproc.facts import dataclass, field
from lazyproc.pages.peer import Trust, peer_name
from lazyproc.pages.tls import HANDSHAKE_RECORD, OPTIONS, Greeting, Plain, Tls, accepting, secured
from lazyproc.wire.frame import Type
from lazyproc.wire.native import VERSION, Abort, Connection, Event, Hello, Party, Ping, Pong, Role, Welcome

SCHEME = "ssh://"
HANDSHAKE_S = 5.0  # a stranger's time to say HELLO
MAX_STRANGERS = 64  # at once; the oldest has to go
# CRIU's daemon connects before the tree that it restores has touched a page, and is silent until then.
SILENCE_S = 600.0
STALL_S = 30  # a peer that takes or acknowledges nothing for so long is gone
_READ = 4 << 20  # bytes in one recv(2)
_STRANGERS_READ = 256 << 10
_P = ParamSpec("_P")
_T = TypeVar("_T")


# --- sessions -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Session:
    """What ties three connections, and reconnects, to one migration. The token is the secret of its ends."""

    id: str
    token: str = field(repr=False)

    @classmethod
    def new(cls) -> Session:
        return cls(os.urandom(8).hex(), os.urandom(16).hex())  # `secrets` imports OpenSSL

    def hello(self, role: Role, *, resume: bool = False) -> Hello:
        return Hello(role, self.id, self.token, resume=resume)

    def owns(self, hello: Hello) -> bool:
        """Whether a HELLO belongs to this session; takes the same time whatever is wrong with the token."""
        from hmac import compare_digest  # it imports OpenSSL

        same = compare_digest(hello.token.encode(), self.token.encode())
        return same and hello.session == self.id


# --- a connection ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Behind:
    """The connection that a relay or ssh has, of which the channel's own socket knows nothing."""

    peer: str
    rtt_us: float | None  # None: to be measured by the first answer

    @classmethod
    def look(cls, sock: socket.socket) -> Behind:
        return cls(peer_name(sock), _rtt_us(sock))


class Channel:
    """One connection. `send` may be called from several threads, `receive` from one at a time.

    It never reads further than the frame it is about, so that after `detach` the descriptor can be given to a
    thread in C. Every wait has a limit; ConnectionLost says that the peer is gone.
    """

    def __init__(
        self, sock: socket.socket, side: Party, *, dialled: str | None = None, behind: Behind | None = None
    ) -> None:
        """`dialled`: the address, if this end did; the kernel does not know the name of a peer that has reset."""
        self.peer = dialled or (behind.peer if behind else peer_name(sock))
        self.hello: Hello | None = None  # once it has passed
        self.heard = time.monotonic()  # when the peer last said anything
        self.began = self.heard  # when what `receive` gave last began to come
        self.patience: float = STALL_S  # seconds in which the peer must have taken something
        self._sock = sock
        self.behind = behind
        self._connection = Connection(side, dialled=dialled is not None)
        self._sending = threading.Lock()
        sock.setblocking(True)
        if sock.family != socket.AF_UNIX:
            tune(sock)

    @classmethod
    def adopted(cls, sock: socket.socket, side: Party, hello: Hello, *, welcomed: bool) -> Channel:
        """A connection whose HELLO another process has read, and answered if it is `welcomed`."""
        channel = cls(sock, side)
        other = Party.DESTINATION if side is Party.SOURCE else Party.SOURCE
        channel._connection.receive_data(Connection(other, dialled=True).send(hello))
        channel.hello = hello
        if welcomed:
            channel._connection.send(Welcome(hello.session))
        return channel

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, event: Event) -> None:
        """Raises ProtocolError if this end may not say that now, ConnectionLost."""
        with self._sending:
            header, payload = self._connection.parts(event)
            self._send_all(header, socket.MSG_MORE if payload else 0)
            self._send_all(payload, 0)
        if isinstance(event, Hello):
            self.hello = event

    def _send_all(self, part: bytes, flags: int) -> None:
        data = memoryview(part)
        while data:
            if not self._wait(select.POLLOUT, self.patience):
                raise ConnectionLost(f"the peer has taken nothing for {self.patience:.0f} s", where=self.peer)
            data = data[self._attempt(self._sock.send, data, socket.MSG_DONTWAIT | flags) or 0 :]

    def receive(self, timeout: float | None = None) -> Event | None:
        """The next event, or None when it is not whole after `timeout` seconds: then call again.

        A PING is answered here and not seen by the caller. Raises ConnectionLost, ProtocolError.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while self._wait(select.POLLIN, _left(deadline)):
            event = self._receive_some()
            if isinstance(event, Ping):
                self.send(Pong())
            elif event is not None:
                return event
        return None

    def receive_pages(self, view: memoryview, timeout: float) -> None:
        """Fills `view` with content of the last PAGES.

        Raises ConnectionLost, also after `timeout` seconds without a byte.
        """
        while view:
            if not self._wait(select.POLLIN, timeout):
                raise ConnectionLost(f"the peer has sent nothing for {timeout} s", where=self.peer)
            count = self._attempt(self._sock.recv_into, view, 0, socket.MSG_DONTWAIT)
            if count == 0:
                raise ConnectionLost("the peer has hung up within a page", where=self.peer)
            self._connection.take_pages(count or 0)
            view = view[count or 0 :]

    def is_foreign(self) -> bool:
        """Whether the first byte that has come, which stays where it is, is not ours."""
        if not self._connection.between:
            return False
        first = self._attempt(self._sock.recv, 1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        return first is not None and first != b"" and first[0] != Type.HELLO

    def welcome(self) -> None:
        """Answers the HELLO: the connection now serves what it was opened for."""
        assert self.hello is not None, "the HELLO has come"
        self.send(Welcome(self.hello.session))

    def refuse(self, reason: str, *, again: bool = False) -> None:
        """Says why, to a peer who may know, and hangs up; who may not is just closed. `again`: later it may be yes."""
        self.send(Abort({"reason": reason, **({"again": True} if again else {})}))
        self.close()

    def check_version(self) -> None:
        """Of the HELLO that has come. Raises ProtocolError after telling the peer."""
        if self.hello is not None and self.hello.version != VERSION:
            reason = f"version {VERSION} of the protocol is spoken here, not {self.hello.version}"
            self.refuse(reason)
            raise ProtocolError(reason, where=self.peer)

    @property
    def peer_revision(self) -> int:
        """Of the protocol, from the peer's greeting."""
        return self._connection.peer_revision

    @property
    def rtt_us(self) -> float:
        """The round trip time as TCP has measured it; behind a relay, when the connection was opened; through ssh that
        of the first answer.
        """
        return self.behind.rtt_us or 0.0 if self.behind else _rtt_us(self._sock)

    @property
    def socket(self) -> socket.socket:
        """For options and for asking who the peer is; its bytes belong to the channel."""
        return self._sock

    def detach(self) -> int:
        """The blocking descriptor, which is the caller's from now on."""
        return self._sock.detach()

    def close(self) -> None:
        self._sock.close()

    def _receive_some(self) -> Event | None:
        """What one recv(2) completes; never more than one event, since never more than one frame is read."""
        between = self._connection.between
        data = self._attempt(self._sock.recv, min(self._connection.wanted, _READ), socket.MSG_DONTWAIT)
        if data is None:
            return None
        if not data:
            raise ConnectionLost(
                "the peer has hung up",
                where=self.peer,
                remedy="see there what it said, and whether it still runs",
            )
        self.heard = time.monotonic()
        if between:
            self.began = self.heard
        try:
            event = next(iter(self._connection.receive_data(data)), None)
        except ProtocolError as error:
            tls = data[0] == HANDSHAKE_RECORD
            remedy = error.remedy or ("it speaks TLS" if tls else "is it lazyproc, and of the same version?")
            raise ProtocolError(error.what, where=self.peer, remedy=remedy) from None
        if isinstance(event, Hello):
            self.hello = event
        return event

    def _attempt(self, call: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T | None:
        """None when it would have to wait after all."""
        try:
            return call(*args, **kwargs)
        except BlockingIOError:
            return None
        except OSError as error:
            raise ConnectionLost(f"the connection broke ({error.strerror})", where=self.peer) from None

    def _wait(self, what: int, timeout: float | None) -> bool:
        poll = select.poll()
        poll.register(self._sock, what)
        return bool(poll.poll(None if timeout is None else max(0, timeout) * 1000))


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else deadline - time.monotonic()


def _rtt_us(sock: socket.socket) -> float:
    """The kernel's smoothed round trip time, tcpi_rtt of struct tcp_info (tcp(7))."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    return float(struct.unpack_from("<I", info, 68)[0])


def tune(sock: socket.socket) -> None:
    """Requests are small and urgent; a peer that vanished must be noticed, by what it never acknowledged."""
    tcp = socket.IPPROTO_TCP
    for level, name, value in (
        (tcp, socket.TCP_NODELAY, 1),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (tcp, socket.TCP_KEEPIDLE, 5),
        (tcp, socket.TCP_KEEPINTVL, 5),
        (tcp, socket.TCP_USER_TIMEOUT, STALL_S * 1000),  # counts for the keep-alive probes too
    ):
        sock.setsockopt(level, name, value)


class Declined(ProtocolError):
    """The HELLO was understood, and answered with no."""


# --- who dials ------------------------------------------------------------------------------------------


def dial(address: str, hello: Hello, side: Party, *, trust: Trust, timeout: float = 10) -> Channel:
    """A channel to whoever listens at HOST:PORT or ssh://HOST/PORT, greeted and welcomed.

    With TLS the peer proves who he is before anything is said. Without, he is checked once he has answered: until he
    has accepted, the kernel cannot name his socket's owner. Raises UsageError for the address or the files of `trust`,
    ConnectionLost, PermissionDenied for an untrusted peer, ProtocolError.
    """
    channel = _dialled(address, side, trust, timeout)
    asked = time.monotonic()
    try:
        channel.send(hello)
        _check_answer(channel.receive(timeout), hello, address)
        if channel.behind is None:
            trust.check(channel.socket)
        elif channel.behind.rtt_us is None:
            channel.behind = Behind(address, (time.monotonic() - asked) * 1e6)
    except LazyprocError:
        channel.close()
        raise
    return channel


def _dialled(address: str, side: Party, trust: Trust, timeout: float) -> Channel:
    """A connection over which nothing has been said. Whoever is behind a relay or ssh has proved who he is."""
    if address.startswith(SCHEME):
        from lazyproc.pages.ssh import connected

        return Channel(connected(address), side, dialled=address, behind=Behind(address, None))
    sock = connect(address, timeout)
    if trust.tls is None:
        return Channel(sock, side, dialled=address)
    return _behind_tls(sock, address, side, trust.tls)


def _behind_tls(sock: socket.socket, address: str, side: Party, tls: Tls) -> Channel:
    from lazyproc.pages.relay import relayed  # it imports ssl

    tune(sock)
    far = secured(sock, tls, parse_address(address)[0], address)
    behind = Behind.look(far)
    return Channel(relayed(far), side, dialled=address, behind=behind)


def _check_answer(answer: Event | None, hello: Hello, address: str) -> None:
    if answer is None:
        raise ConnectionLost("connected, but there is no answer", where=address, remedy="is it lazyproc?")
    if isinstance(answer, Abort):
        refusal = f"refused: {answer.fields.get('reason')!s:.200}"
        if answer.fields.get("again") is True:
            raise ConnectionLost(refusal, where=address)
        raise Declined(refusal, where=address)
    if not isinstance(answer, Welcome) or (answer.session, answer.version) != (hello.session, VERSION):
        raise ProtocolError(f"{answer} is no answer to {hello}", where=address)


class Unreachable(ConnectionLost):
    """There was no connection in the first place."""


def connect(
    address: str, timeout: float, otherwise: str = "start lazyproc receive or serve there first"
) -> socket.socket:
    """A TCP connection to HOST:PORT. `otherwise`: what to do when nobody listens. Raises UsageError for the address,
    Unreachable.
    """
    try:
        return socket.create_connection(parse_address(address), timeout)
    except socket.gaierror as error:
        what, remedy = f"the name is not known ({error.strerror})", "check the name, or give an address"
    except ConnectionRefusedError:
        what, remedy = "nobody listens there", otherwise
    except OSError as error:
        what, remedy = f"cannot be reached ({error.strerror or error})", "check the network and firewalls"
    raise Unreachable(what, where=address, remedy=remedy)


# --- who listens ----------------------------------------------------------------------------------------


def listen(
    address: str,
    side: Party,
    *,
    trust: Trust,
    report: events.Listener = events.ignore,
    criu: Caller | None = None,
) -> Door:
    """A Door at HOST:PORT; port 0 takes a free one. `criu` gets each connection that does not begin as ours do,
    before a byte of it is read. Raises UsageError for the address or the files of `trust`, CannotListen.
    """
    host, port = parse_address(address)
    if trust.tls:
        accepting(trust.tls)  # what is wrong with the files is said now and not to the first who comes
    try:
        family, kind, protocol, _, name = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
    except OSError as error:
        raise CannotListen(f"no such address on this host ({error.strerror})", where=address) from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(name)
        sock.listen()
    except OSError as error:
        sock.close()
        what, remedy = _BIND.get(error.errno or 0, (str(error.strerror), ""))
        raise CannotListen(what, where=address, remedy=remedy) from None
    return Door(sock, side, trust, report, criu)


def inherited(address: str, side: Party, *, trust: Trust) -> Door | None:
    """The Door that a process which had our descriptor table was opening, or had open, at that address when it was
    killed.
    """
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            sock = socket.socket(fileno=int(name))
            inet = sock.family in (socket.AF_INET, socket.AF_INET6)
            if inet and not _connected(sock) and _name_of(sock) == address:
                sock.listen()
                return Door(sock, side, trust)
            sock.detach()
    return None


def _connected(sock: socket.socket) -> bool:
    try:
        return bool(sock.getpeername())
    except OSError:
        return False


def _name_of(sock: socket.socket) -> str:
    """HOST:PORT of the end that is here."""
    host, port = sock.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


_BIND = {
    errno.EADDRINUSE: ("the address is in use", "stop who listens there (ss -ltnp), or take another port"),
    errno.EADDRNOTAVAIL: ("this host does not have the address", "take one that `ip address` shows"),
    errno.EACCES: ("ports below 1024 need CAP_NET_BIND_SERVICE", "take another port"),
}


# A client of CRIU's, let in, of whom no byte has been read: its blocking socket and its name.
Caller: TypeAlias = Callable[[socket.socket, str], object]


class Door:
    """Lets peers in: checks who they are, waits for their HELLO, and hands them out. A context manager.

    `fileno` becomes readable when `accept` has something to do. Refusals go to `report` as a Note and change
    nothing else. One thread at a time.
    """

    def __init__(
        self,
        sock: socket.socket,
        side: Party,
        trust: Trust,
        report: events.Listener = events.ignore,
        criu: Caller | None = None,
    ) -> None:
        self._sock = sock
        self._criu = criu
        self._side = side
        self._trust = trust
        self._report = report
        # Until when they have to prove who they are, and then to say HELLO; in the order in which they came.
        self._strangers: dict[Channel | Greeting, float] = {}
        self._selector = selectors.EpollSelector()
        self._selector.register(sock, selectors.EVENT_READ)
        sock.setblocking(False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def port(self) -> int:
        return int(self._sock.getsockname()[1])

    @property
    def address(self) -> str:
        """Where it listens, for `listen` to do so again."""
        return _name_of(self._sock)

    def fileno(self) -> int:
        return self._selector.fileno()

    def close(self) -> None:
        for channel in list(self._strangers):
            self._forget(channel).close()
        self._selector.close()
        self._sock.close()

    def accept(self, timeout: float | None = None) -> Channel | None:
        """A channel whose `hello` has come and waits for `welcome` or `refuse`; None after `timeout` s."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            for key, _ in self._selector.select(self._patience(deadline)):
                if key.fileobj is self._sock:
                    self._let_in()
                elif isinstance(key.fileobj, Greeting):
                    self._greet(key.fileobj)
                elif isinstance(key.fileobj, Channel) and self._greeted(key.fileobj):
                    self._forget(key.fileobj)
                    return key.fileobj
            self._send_away()
            if deadline is not None and time.monotonic() >= deadline:
                return None

    def _patience(self, deadline: float | None) -> float | None:
        """Seconds until something has to be done that nobody wakes us for."""
        limits = [*self._strangers.values()] + ([] if deadline is None else [deadline])
        return max(0.0, min(limits) - time.monotonic()) if limits else None

    def _let_in(self) -> None:
        try:
            sock, _ = self._sock.accept()
        except OSError:  # it has gone again, or no descriptor is free: not at once again
            time.sleep(0.01)
            return
        try:
            if self._trust.tls is None:
                self._trust.check(sock)
                self._await(Channel(sock, self._side))
            else:
                sock.setblocking(False)
                tune(sock)
                criu = self._criu is not None
                self._await(Greeting(sock, self._trust.tls, peer_name(sock), criu=criu))
        except (PermissionDenied, UsageError, OSError) as error:
            sock.close()
            self._report(events.Note(f"refused a connection: {error}"))

    def _await(self, stranger: Channel | Greeting) -> None:
        known = isinstance(stranger, Channel) and self._criu is not None
        self._strangers[stranger] = time.monotonic() + (SILENCE_S if known else HANDSHAKE_S)
        self._selector.register(stranger, selectors.EVENT_READ)
        if len(self._strangers) > MAX_STRANGERS:
            self._forget(next(iter(self._strangers))).close()

    def _greet(self, greeting: Greeting) -> None:
        """A step of a stranger's handshake; once it is over he is behind a relay, and has to say HELLO."""
        if greeting not in self._strangers:
            return
        try:
            far = greeting.step()
            if far is None:
                wanted = selectors.EVENT_WRITE if greeting.wants_write else selectors.EVENT_READ
                self._selector.modify(greeting, wanted)
                return
            self._forget(greeting)
            behind = Behind.look(far)
            if self._criu is not None and not greeting.is_ours:
                far.setblocking(True)
                self._criu(far, behind.peer)
                return
            from lazyproc.pages.relay import relayed

            self._await(Channel(relayed(far), self._side, behind=behind))
        except (LazyprocError, OSError) as error:
            self._report(events.Note(f"refused a connection: {error}"))
            if greeting in self._strangers:
                self._forget(greeting)
            if isinstance(error, Plain):
                self._tell_plain(greeting)
            greeting.close()

    def _tell_plain(self, greeting: Greeting) -> None:
        """To whoever came without TLS, in the words that he understands; a TLS alert would say as much."""
        with suppress(OSError, LazyprocError):
            connection = Connection(self._side, dialled=False)
            connection.receive_data(greeting.sock.recv(_STRANGERS_READ))
            greeting.sock.send(connection.send(Abort({"reason": f"TLS is spoken here; use {OPTIONS}"})))

    def _greeted(self, channel: Channel) -> bool:
        """Whether the stranger's HELLO is whole and in our version; who says anything else is gone."""
        if channel not in self._strangers:  # made room in this very round
            return False
        try:
            if self._criu is not None and channel.is_foreign():
                self._forget(channel)
                self._criu(channel.socket, channel.peer)
                return False
            if not isinstance(channel.receive(0), Hello):
                return False
            channel.check_version()
        except (ConnectionLost, ProtocolError) as error:
            self._forget(channel)
            self.ended(channel, error)
            return False
        return True

    def ended(self, channel: Channel, error: LazyprocError) -> None:
        """Close a connection for that reason, which is reported."""
        channel.close()
        self._report(events.Note(f"ended a connection: {error}"))

    def _send_away(self) -> None:
        now = time.monotonic()
        for channel in [channel for channel, until in self._strangers.items() if until <= now]:
            self._forget(channel).close()

    def _forget(self, stranger: Channel | Greeting) -> Channel | Greeting:
        del self._strangers[stranger]
        self._selector.unregister(stranger)
        return stranger


# --- addresses ------------------------------------------------------------------------------------------


def parse_address(text: str) -> tuple[str, int]:
    """("host", port) from HOST:PORT or [IPV6]:PORT. Raises UsageError."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise UsageError("is not an address", where=repr(text), remedy="write HOST:PORT or [IPV6]:PORT")
    if host.startswith("[") and host.endswith("]"):
        return host[1:-1], int(port)
    if ":" in host or "[" in host or "]" in host:
        raise UsageError("is not an address", where=repr(text), remedy="write an IPv6 address as [IPV6]:PORT")
    try:
        host.encode("idna")  # as `socket` does
    except UnicodeError:
        raise UsageError("is not the name of a host", where=repr(text), remedy="check the name") from None
    return host, int(port)
