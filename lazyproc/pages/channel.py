"""A connection that speaks lazyproc.wire.native."""

from __future__ import annotations

import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import ParamSpec, Self, TypeVar

from lazyproc.errors import ConnectionLost, ProtocolError
from lazyproc.facts import dataclass
from lazyproc.pages.peer import peer_name
from lazyproc.pages.tls import HANDSHAKE_RECORD
from lazyproc.wire.frame import Type
from lazyproc.wire.native import VERSION, Abort, Connection, Event, Hello, Party, Ping, Pong, Welcome

STALL_S = 30  # a peer that takes or acknowledges nothing for so long is gone
_READ = 4 << 20  # bytes in one recv(2)
STRANGERS_READ = 256 << 10
_P = ParamSpec("_P")
_T = TypeVar("_T")


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
