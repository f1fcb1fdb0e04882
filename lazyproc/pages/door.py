"""Where others come in.

A stranger gets nothing: who he is, is asked before a byte of his is read; the HELLO has a deadline; all
strangers wait side by side in one selector, so a slow one delays nobody.
"""

from __future__ import annotations

import errno
import os
import selectors
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Self, TypeAlias

from lazyproc import events
from lazyproc.errors import (
    CannotListen,
    ConnectionLost,
    LazyprocError,
    PermissionDenied,
    ProtocolError,
    UsageError,
)
from lazyproc.pages.address import parse_address
from lazyproc.pages.channel import STRANGERS_READ, Behind, Channel, tune
from lazyproc.pages.peer import Trust, peer_name
from lazyproc.pages.tls import OPTIONS, Greeting, Plain, accepting
from lazyproc.wire.native import Abort, Connection, Hello, Party

HANDSHAKE_S = 5.0  # a stranger's time to say HELLO
MAX_STRANGERS = 64  # at once; the oldest has to go
# CRIU's daemon connects before the tree that it restores has touched a page, and is silent until then.
SILENCE_S = 600.0


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
            connection.receive_data(greeting.sock.recv(STRANGERS_READ))
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
