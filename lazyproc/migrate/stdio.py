"""The far end of ssh://: a receiver for one tree, and connections to it over standard input and output."""

from __future__ import annotations

import os
import socket
import threading
from contextlib import suppress

from lazyproc.errors import ConnectionLost, ProtocolError
from lazyproc.events import Listener
from lazyproc.kernel import family
from lazyproc.kernel.ready import readable
from lazyproc.migrate.arrival import Terms
from lazyproc.migrate.destination import receive
from lazyproc.migrate.link import NOT_KNOWN
from lazyproc.migrate.reception import hand_on
from lazyproc.pages.channel import Channel
from lazyproc.pages.dial import Unreachable, connect
from lazyproc.pages.door import HANDSHAKE_S
from lazyproc.pages.peer import Trust
from lazyproc.pages.ssh import greeting
from lazyproc.wire.native import Hello, Party

STDIN, STDOUT = 0, 1
CHUNK = 256 << 10
CONNECT_S = 10.0


def host_receiver(listener: Listener) -> None:
    """`receive` for one tree, on a port of 127.0.0.1 that the greeting names, until standard input ends.

    Only this user and root can connect to it (lazyproc.pages.peer).
    """
    receive(
        "127.0.0.1:0",
        Terms(),
        once=True,
        insecure=False,
        listener=listener,
        opened=lambda port: _write(STDOUT, greeting(port)),
        over=_hung_up,
    )


def _hung_up() -> bool:
    return bool(readable([STDIN], 0)) and not os.read(STDIN, CHUNK)


def join(port: int) -> None:
    """Standard input and output become a connection to the receiver at `port` of this host, until both have ended.

    Raises ConnectionLost, PermissionDenied when that is another user's.
    """
    sock = _receiver(port)
    _write(STDOUT, greeting())
    threading.Thread(target=_inward, args=(sock,), daemon=True).start()
    first = sock.recv(CHUNK)
    Trust().check(sock)  # it has accepted: now the kernel knows whose it is (pages/dial.py)
    _write(STDOUT, first)
    _copy(sock.fileno(), STDOUT)


def _receiver(port: int) -> socket.socket:
    try:
        sock = connect(f"127.0.0.1:{port}", CONNECT_S)
    except Unreachable:
        return _reception()
    sock.settimeout(None)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def _reception() -> socket.socket:
    """With receiver and keeper gone, the journal still knows how a session has ended, or that it can be resumed."""
    ours, theirs = socket.socketpair()

    def attend() -> None:
        ours.close()
        channel = Channel(theirs, Party.DESTINATION)
        with suppress(ConnectionLost, ProtocolError):  # of whoever has called
            hello = channel.receive(HANDSHAKE_S)
            channel.check_version()
            if isinstance(hello, Hello) and hello.resume:
                hand_on(channel, hello)
            elif hello is not None:
                channel.refuse(NOT_KNOWN)

    with theirs:
        family.child(attend, "lazyproc-tell")
    return ours


def _inward(sock: socket.socket) -> None:
    try:
        _copy(STDIN, sock.fileno())
        sock.shutdown(socket.SHUT_WR)
    except OSError:  # one side is gone, and with us the other
        os._exit(1)


def _copy(source: int, target: int) -> None:
    """Until `source` ends. One buffer is under way: who writes faster has to wait."""
    while data := os.read(source, CHUNK):
        _write(target, data)


def _write(target: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(target, view) :]
