"""TCP_REPAIR: a connection's state without a packet on the wire (tcp(7) says little; net/ipv4/tcp.c is the
source).

A socket in repair mode sends nothing when it is closed, connected or written to. It needs CAP_NET_ADMIN in
the user namespace that owns its network namespace. Entering sets the socket's reuse to a third value and
leaving clears it, so SO_REUSEADDR has to be set again afterwards; leaving with TCP_REPAIR_OFF sends one
window probe, with TCP_REPAIR_OFF_NO_WP nothing at all.
"""

from __future__ import annotations

import errno
import fcntl
import select
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from lazyproc.facts import dataclass
from lazyproc.kernel._core import ffi
from lazyproc.kernel.sockopt import (
    SIOCINQ,
    SIOCOUTQ,
    SIOCOUTQNSD,
    SO_REUSEADDR,
    SOL_SOCKET,
    SOL_TCP,
    SYS_GETSOCKOPT,
    TCP_MAXSEG,
)
from lazyproc.kernel.sys import syscall

TCP_INFO, TCP_REPAIR, TCP_REPAIR_QUEUE, TCP_QUEUE_SEQ, TCP_REPAIR_OPTIONS = 11, 19, 20, 21, 22
TCP_TIMESTAMP, TCP_REPAIR_WINDOW, TCP_ZEROCOPY_RECEIVE = 24, 29, 35
REPAIR_OFF, REPAIR_ON, REPAIR_OFF_NO_WP = 0, 1, -1
NO_QUEUE, RECV_QUEUE, SEND_QUEUE = 0, 1, 2
OPT_TIMESTAMPS, OPT_SACK, OPT_WSCALE = 1, 2, 4  # TCPI_OPT_*
_TCPOPT_MSS, _TCPOPT_WINDOW, _TCPOPT_SACK_PERM, _TCPOPT_TIMESTAMP = 2, 3, 4, 8
WINDOW = struct.Struct("=5I")  # struct tcp_repair_window: snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup
_U32 = struct.Struct("=I")
_OPTION = struct.Struct("=II")  # struct tcp_repair_opt


@dataclass(frozen=True, slots=True)
class Info:
    """The part of struct tcp_info that is needed. On a listening socket `pending` connections wait of
    `backlog`.
    """

    state: int
    options: int
    send_wscale: int
    recv_wscale: int
    pending: int
    backlog: int


def info(sock: socket.socket) -> Info:
    """TCP_INFO; for the meaning of tcpi_unacked and tcpi_sacked while listening see tcp_get_info()."""
    raw = sock.getsockopt(SOL_TCP, TCP_INFO, 32)
    unacked, sacked = struct.unpack_from("=II", raw, 24)
    return Info(raw[0], raw[5], raw[6] & 15, raw[6] >> 4, unacked, sacked)


class Untold(Exception):
    """An error waits for the program, and which one cannot be seen without taking it away."""


def ending_error(sock: socket.socket) -> int:
    """The errno that waits for the program on a connection that has ended (sk_err): ECONNRESET, EPIPE, or 0.

    SO_ERROR and recv(2) take it away; poll(2) shows only that there is one. After a reset it is EPIPE when the peer
    had sent its FIN before, which recv gives as the end, and else ECONNRESET (tcp_reset). Raises Untold where it may
    be another: after packets without an answer, before there was an answer at all; and where unread bytes hide the FIN.
    """
    poll = select.poll()
    poll.register(sock, 0)
    if not any(events & select.POLLERR for _fd, events in poll.poll(0)):
        return 0
    raw = sock.getsockopt(SOL_TCP, TCP_INFO, 232)
    unanswered = raw[2] or raw[3]  # tcpi_retransmits, tcpi_probes
    connected = any(raw[68:72]) or any(raw[228:232])  # tcpi_rtt, tcpi_snd_wnd
    if unanswered or not connected or queued(sock)[0]:
        raise Untold
    return errno.EPIPE if _is_at_fin(sock) else errno.ECONNRESET


def _is_at_fin(sock: socket.socket) -> bool:
    """Whether the peer's FIN has come and no byte before it is unread: a zero-copy receive of nothing is EIO then."""
    request, size = ffi.new("uint64_t[2]"), ffi.new("uint32_t *", 16)  # up to recv_skip_hint
    where, length = (int(ffi.cast("uintptr_t", each)) for each in (request, size))
    try:
        syscall(SYS_GETSOCKOPT, sock.fileno(), SOL_TCP, TCP_ZEROCOPY_RECEIVE, where, length)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return True
    return False


@contextmanager
def repaired(sock: socket.socket) -> Iterator[None]:
    """Repair mode for the length of a block, without a trace: no packet leaves, SO_REUSEADDR is as before."""
    reuse = sock.getsockopt(SOL_SOCKET, SO_REUSEADDR)
    enter(sock)
    try:
        yield
    finally:
        sock.setsockopt(SOL_TCP, TCP_REPAIR, REPAIR_OFF_NO_WP)
        sock.setsockopt(SOL_SOCKET, SO_REUSEADDR, reuse)


def enter(sock: socket.socket) -> None:
    """Turn repair mode on. PermissionError without CAP_NET_ADMIN; EPERM too on a listening socket."""
    sock.setsockopt(SOL_TCP, TCP_REPAIR, REPAIR_ON)


def is_repaired(sock: socket.socket) -> bool:
    """Whether repair mode is on."""
    return sock.getsockopt(SOL_TCP, TCP_REPAIR) == REPAIR_ON


def select_queue(sock: socket.socket, queue: int) -> None:
    sock.setsockopt(SOL_TCP, TCP_REPAIR_QUEUE, queue)


def queue_end(sock: socket.socket) -> int:
    """The sequence number after the last byte of the selected queue: rcv_nxt or write_seq."""
    return int(_U32.unpack(sock.getsockopt(SOL_TCP, TCP_QUEUE_SEQ, 4))[0])


def set_queue_start(sock: socket.socket, queue: int, seq: int) -> None:
    """The sequence number of the queue's first byte, before connect(2); data sent to the queue moves its
    end.
    """
    select_queue(sock, queue)
    sock.setsockopt(SOL_TCP, TCP_QUEUE_SEQ, _U32.pack(seq & 0xFFFFFFFF))


def queued(sock: socket.socket) -> tuple[int, int, int]:
    """Bytes unread; bytes not acknowledged (a FIN counts as one); those of them never sent."""
    return _count(sock, SIOCINQ), _count(sock, SIOCOUTQ), _count(sock, SIOCOUTQNSD)


def _count(sock: socket.socket, request: int) -> int:
    return int(_U32.unpack(fcntl.ioctl(sock, request, bytes(4)))[0])


class QueueMoved(OSError):
    """A packet came between counting a queue's bytes and reading them."""


def peek_queue(sock: socket.socket, queue: int, length: int) -> tuple[int, bytes]:
    """The end and the `length` bytes of a queue. QueueMoved when it holds another number of bytes."""
    select_queue(sock, queue)
    end = queue_end(sock)
    data = sock.recv(length + 1, socket.MSG_PEEK | socket.MSG_DONTWAIT) if length else b""
    if len(data) != length:
        raise QueueMoved(5, f"a TCP queue of {length} bytes gave {len(data)}")
    return end, data


def timestamp(sock: socket.socket) -> int:
    """The connection's clock, with the unit in its lowest bit; opaque."""
    return int(_U32.unpack(sock.getsockopt(SOL_TCP, TCP_TIMESTAMP, 4))[0])


def max_segment(sock: socket.socket) -> int:
    """In repair mode: the peer's MSS as negotiated (mss_clamp)."""
    return sock.getsockopt(SOL_TCP, TCP_MAXSEG)


def window(sock: socket.socket) -> bytes:
    """struct tcp_repair_window, 20 bytes."""
    return sock.getsockopt(SOL_TCP, TCP_REPAIR_WINDOW, WINDOW.size)


def set_negotiated(sock: socket.socket, options: int, send_wscale: int, recv_wscale: int, mss: int) -> None:
    """What the handshake agreed on (TCPI_OPT_* bits); only on a connection that nothing was sent on yet."""
    rows = [(_TCPOPT_MSS, mss)]
    if options & OPT_SACK:
        rows.append((_TCPOPT_SACK_PERM, 0))
    if options & OPT_WSCALE:
        rows.append((_TCPOPT_WINDOW, send_wscale | recv_wscale << 16))
    if options & OPT_TIMESTAMPS:
        rows.append((_TCPOPT_TIMESTAMP, 0))
    sock.setsockopt(SOL_TCP, TCP_REPAIR_OPTIONS, b"".join(_OPTION.pack(*row) for row in rows))


def set_timestamp(sock: socket.socket, value: int) -> None:
    sock.setsockopt(SOL_TCP, TCP_TIMESTAMP, _U32.pack(value))


def set_window(sock: socket.socket, value: bytes) -> None:
    sock.setsockopt(SOL_TCP, TCP_REPAIR_WINDOW, value)


def leave(sock: socket.socket, *, probe: bool) -> None:
    """Turn repair mode off; `probe` sends a window probe, so that the peer answers at once."""
    sock.setsockopt(SOL_TCP, TCP_REPAIR, REPAIR_OFF if probe else REPAIR_OFF_NO_WP)
