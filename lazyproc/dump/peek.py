"""Reading the queue of a socket without consuming it: the source may have to run on exactly as before.

SO_PEEK_OFF lets MSG_PEEK walk through a queue. One fact to know (net/core/datagram.c): an *empty*
datagram between others is marked when it is peeked, and a later walk passes over it, so it survives one
dump and is missed by a second one after a rollback.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lazyproc.facts import dataclass
from lazyproc.kernel.sockopt import SIOCINQ, SO_PASSCRED, SO_PEEK_OFF, SOL_SOCKET, peek_all_but_last
from lazyproc.model import Packet

_DATAGRAM = 1 << 18  # bytes of a datagram that are looked for first
_SCM_RIGHTS, _SCM_CREDENTIALS, _SCM_PIDFD = 1, 2, 4
_UCRED = struct.Struct("=iii")
_CONTROL = (
    socket.CMSG_SPACE(4 * 253) + socket.CMSG_SPACE(_UCRED.size) + 1024
)  # SCM_MAX_FD, and timestamps etc.
_NOTHING = (socket.MSG_PEEK | socket.MSG_DONTWAIT) | socket.MSG_CMSG_CLOEXEC

Intern = Callable[[int], int]
Vpid = Callable[[int], int | None]


@dataclass(slots=True)
class _Peeked:
    data: bytes
    truncated: bool
    sender: bytes
    fds: list[int]
    credentials: tuple[int, int, int] | None


def read_queue(sock: socket.socket, intern: Intern, vpid: Vpid) -> tuple[Packet, ...]:
    """What lies in the receive queue of a unix or UDP socket, oldest first.

    `intern` takes over a descriptor of ours that was found in a message and gives its file id; `vpid` turns
    a sender's pid into the tree's, None for a stranger's.
    """
    with _walking(sock):
        read = _stream if sock.type == socket.SOCK_STREAM else _datagrams
        return tuple(_packet(peeked, intern, vpid) for peeked in read(sock))


@contextmanager
def _walking(sock: socket.socket) -> Iterator[None]:
    """SO_PEEK_OFF at the start of the queue and, on unix sockets, the senders' credentials shown."""
    offset = sock.getsockopt(SOL_SOCKET, SO_PEEK_OFF)
    credentials = sock.getsockopt(SOL_SOCKET, SO_PASSCRED) if sock.family == socket.AF_UNIX else 1
    try:
        sock.setsockopt(SOL_SOCKET, SO_PEEK_OFF, 0)
        if not credentials:
            sock.setsockopt(SOL_SOCKET, SO_PASSCRED, 1)
        yield
    finally:
        sock.setsockopt(SOL_SOCKET, SO_PEEK_OFF, offset)
        if not credentials:
            sock.setsockopt(SOL_SOCKET, SO_PASSCRED, 0)


def _datagrams(sock: socket.socket) -> Iterator[_Peeked]:
    at, size = 0, _DATAGRAM
    while (peeked := _peek(sock, size)) is not None:
        if peeked.truncated:  # once more from its beginning; its descriptors come again with it
            _close(peeked.fds)
            sock.setsockopt(SOL_SOCKET, SO_PEEK_OFF, at)
            size *= 2
            continue
        at += len(peeked.data)
        # A unix packet always shows credentials here; without them nothing was there but the end
        # (SEQPACKET).
        if not peeked.data and sock.family == socket.AF_UNIX and peeked.credentials is None:
            return
        yield peeked


def _stream(sock: socket.socket) -> Iterator[_Peeked]:
    """A peek ends after a message with descriptors. Peek all there is: one that ended within such a
    message would give its descriptors again with the rest. And not beyond: that would take the error from the program
    that waits there (unix_stream_read_generic).
    """
    (total,) = struct.unpack("=i", fcntl.ioctl(sock, SIOCINQ, bytes(4)))
    at = 0
    while at < total and (peeked := _peek(sock, total - at)) is not None and peeked.data:
        end = at + len(peeked.data)
        plain = _plain_prefix(sock, at, len(peeked.data)) if peeked.fds else 0
        if plain:
            yield _Peeked(peeked.data[:plain], False, b"", [], peeked.credentials)
            peeked.data = peeked.data[plain:]
        yield peeked
        at = end
        sock.setsockopt(SOL_SOCKET, SO_PEEK_OFF, at)


def _plain_prefix(sock: socket.socket, at: int, length: int) -> int:
    """How many of the `length` bytes from `at` come before the message with the descriptors, which is
    the last.
    """
    sock.setsockopt(SOL_SOCKET, SO_PEEK_OFF, at)
    return peek_all_but_last(sock, length)


def _peek(sock: socket.socket, size: int) -> _Peeked | None:
    """One MSG_PEEK; None when the queue is at its end."""
    try:
        data, ancillary, flags, sender = sock.recvmsg(size, _CONTROL, _NOTHING)
    except BlockingIOError:
        return None
    peeked = _Peeked(data, bool(flags & socket.MSG_TRUNC), sockaddr(sock.family, sender), [], None)
    for level, kind, value in ancillary:
        if level != SOL_SOCKET:
            continue
        if kind == _SCM_RIGHTS:
            peeked.fds += struct.unpack(f"={len(value) // 4}i", value)
        elif kind == _SCM_PIDFD:
            _close([*struct.unpack("=i", value)])
        elif kind == _SCM_CREDENTIALS:
            pid, uid, gid = _UCRED.unpack(value)
            peeked.credentials = (pid, uid, gid)
    return peeked


def _packet(peeked: _Peeked, intern: Intern, vpid: Vpid) -> Packet:
    credentials = None
    if peeked.credentials is not None and peeked.credentials[0]:  # pid 0: none were recorded when it was sent
        pid, uid, gid = peeked.credentials
        credentials = (vpid(pid) or 0, uid, gid)
    return Packet(peeked.data, tuple(intern(fd) for fd in peeked.fds), peeked.sender, credentials)


def _close(fds: list[int]) -> None:
    for fd in fds:
        if fd >= 0:
            os.close(fd)


def sockaddr(family: int, address: object) -> bytes:
    """The address that Python gives as the kernel's struct sockaddr, b"" for none."""
    match address:
        case (str(host), int(port)):
            return struct.pack("=H", family) + struct.pack("!H4s8x", port, socket.inet_aton(host))
        case (str(host), int(port), int(flow), int(scope)):
            packed = socket.inet_pton(socket.AF_INET6, host.partition("%")[0])
            return (
                struct.pack("=H", family)
                + struct.pack("!HI16s", port, flow, packed)
                + struct.pack("=I", scope)
            )
        case str(path) if path:
            return struct.pack("=H", family) + os.fsencode(path)
        case bytes(name) if name:
            return struct.pack("=H", family) + name
        case _:
            return b""
