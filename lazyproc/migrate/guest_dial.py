"""Connections to a QEMU that waits for a guest. It ends when what connects to it sends none: so whatever can be refused
is refused before.
"""

from __future__ import annotations

import socket
import time
from ipaddress import ip_address

from lazyproc.errors import ConnectionLost, PermissionDenied, UsageError
from lazyproc.pages.address import parse_address
from lazyproc.pages.dial import connect
from lazyproc.pages.peer import Trust, peer_uid
from lazyproc.pages.relay import relayed
from lazyproc.pages.tls import OPTIONS, dialling, handshaken

UNIX = "unix:"
UNSENT = 1 << 17  # bytes that may wait in front of a page that is waited for
ANSWER_S = 30.0
ACCEPT_S = 5.0
INCOMING = "start QEMU with -incoming there"


def demand_fit(target: str, trust: Trust) -> None:
    """What `dialled` would refuse, as far as it can be told without connecting. Raises UsageError, PermissionDenied."""
    if target.startswith(UNIX):
        if trust.tls is not None:
            raise UsageError("TLS is for HOST:PORT", where=target, remedy="leave out the --tls options")
        return
    host, port = parse_address(target)
    if trust.tls is not None:
        dialling(trust.tls)
    elif not trust.insecure and _is_elsewhere(host, port):
        raise PermissionDenied(
            "is another host, and nothing proves who waits there",
            where=target,
            remedy=f"use TLS ({OPTIONS}), or --insecure on a network that is yours alone",
        )


def _is_elsewhere(host: str, port: int) -> bool:
    """An address of this host is reached from itself. Nothing is sent (udp(7)). What is not reached is told later."""
    try:
        names = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
        return not any(_is_here(family, name) for family, _, _, _, name in names)
    except OSError:
        return False


def _is_here(family: int, name: tuple[object, ...]) -> bool:
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.connect(name)
        ours, theirs = (str(each[0]).partition("%")[0] for each in (sock.getsockname(), sock.getpeername()))
    return ours == theirs or ip_address(theirs).is_loopback


def dialled(target: str, trust: Trust) -> socket.socket:
    """TLS as QEMU has it: from byte 0. Raises UsageError, ConnectionLost, PermissionDenied."""
    if target.startswith(UNIX):
        return _dialled_here(target, trust)
    sock = connect(target, ANSWER_S, INCOMING)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(ANSWER_S * 1e3))
    if trust.tls is None:
        try:
            _await_accepted(sock, trust)
            trust.check(sock)
        except BaseException:
            sock.close()
            raise
        return sock
    return relayed(handshaken(sock, trust.tls, parse_address(target)[0], target))


def _await_accepted(sock: socket.socket, trust: Trust) -> None:
    """Before that nobody has the other end, and the kernel says of nobody who he is."""
    deadline = time.monotonic() + ACCEPT_S
    while not trust.insecure and peer_uid(sock) is None and time.monotonic() < deadline:
        time.sleep(0.001)


def _dialled_here(target: str, trust: Trust) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        try:
            sock.connect(target.removeprefix(UNIX))
        except OSError as error:
            what = f"nobody waits there ({error.strerror or error})"
            raise ConnectionLost(what, where=target, remedy=INCOMING) from error
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNSENT)
        trust.check(sock)
    except BaseException:
        sock.close()
        raise
    return sock
