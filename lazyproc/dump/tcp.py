"""A TCP connection as data, read in repair mode and left exactly as it was."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from contextlib import suppress

from lazyproc.dump.registry import Refused
from lazyproc.kernel import tcp
from lazyproc.kernel.sockopt import TCP_CLOSING, TCP_FIN_WAIT1, TCP_FIN_WAIT2, TCP_LAST_ACK
from lazyproc.model import TcpState

READS = 4
FIN_SENT = {TCP_FIN_WAIT1, TCP_FIN_WAIT2, TCP_CLOSING, TCP_LAST_ACK}


def read_connection(sock: socket.socket) -> TcpState:
    """Both queues and what TCP_REPAIR shows. The peer's packets have to be held back meanwhile
    (kernel/netfilter).

    `send_seq` and `recv_seq` are write_seq and rcv_nxt, the numbers after the last byte (a FIN counts as
    one).
    """
    with tcp.repaired(sock):
        for _ in range(READS):
            # Between two ends in the tree a delayed ACK may still come, where nothing is held back.
            with suppress(tcp.QueueMoved):
                return _read(sock)
        return _read(sock)


def _read(sock: socket.socket) -> TcpState:
    info = tcp.info(sock)
    unread, unacknowledged, unsent = tcp.queued(sock)
    if info.state in FIN_SENT:  # the FIN is counted, but is no byte that could be read
        unacknowledged, unsent = max(unacknowledged - 1, 0), max(unsent - 1, 0)
    recv_seq, recv_queue = tcp.peek_queue(sock, tcp.RECV_QUEUE, unread)
    send_seq, send_queue = tcp.peek_queue(sock, tcp.SEND_QUEUE, unacknowledged)
    return TcpState(
        send_seq=send_seq,
        recv_seq=recv_seq,
        send_queue=send_queue,
        recv_queue=recv_queue,
        unsent=unsent,
        mss=tcp.max_segment(sock),
        options=info.options,
        send_wscale=info.send_wscale,
        recv_wscale=info.recv_wscale,
        timestamp=tcp.timestamp(sock) if info.options & tcp.OPT_TIMESTAMPS else 0,
        window=tcp.window(sock),
    )


def read_ended(sock: socket.socket) -> TcpState:
    """What is still to be read from a connection that has come to its end; the rest of its state is gone."""
    unread = tcp.queued(sock)[0]
    data = sock.recv(unread, socket.MSG_PEEK | socket.MSG_DONTWAIT) if unread else b""
    return TcpState(0, 0, b"", data, 0, 0, 0, 0, 0, 0, b"")


def ending_error(sock: socket.socket, *, tcp_close: bool) -> int:
    """What ended a connection and waits for the program to be told. Raises Refused; with `tcp_close` what cannot be
    seen is an ordinary end, as of all that is given up.
    """
    try:
        return tcp.ending_error(sock)
    except tcp.Untold:
        if tcp_close:
            return 0
        raise Refused(
            "is a TCP connection that failed, and the error cannot be read without taking it from the program",
            "let the program use the socket, which tells it, or close it first; or use --tcp-close",
        ) from None


def hang_up(connections: Iterable[socket.socket]) -> None:
    """End given up connections, and what waits at listening sockets, now rather than when their tree is killed: the
    others see the end as soon as their peer runs elsewhere without them.
    """
    for sock in connections:
        with suppress(OSError):  # ended already, or never begun
            sock.shutdown(socket.SHUT_RDWR)


def silence(connections: Iterable[socket.socket]) -> None:
    """After the hand-over was committed: closing these connections, and killing who has them, sends
    neither FIN nor RST. They never run again.
    """
    for sock in connections:
        tcp.enter(sock)
