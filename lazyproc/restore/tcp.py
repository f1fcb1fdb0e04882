"""TCP connections from their state, in repair mode: nothing is sent before `leave_repair`.

While repair mode is on a connection can be closed again without a trace, so it stays on until the hand-over
has been committed. Sequence numbers: kernel/tcp.py; half-closed states: a FIN that was received is received
once more (kernel/inject), a FIN that was sent is sent once more, and the peer answers it as a duplicate.
"""

from __future__ import annotations

import errno
import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress

from lazyproc.errors import RestoreError
from lazyproc.kernel import inject, tcp
from lazyproc.kernel.netfilter import plain
from lazyproc.kernel.sockopt import (
    SEND_SHUTDOWN,
    SO_BUF_LOCK,
    SO_RCVBUFFORCE,
    SO_REUSEADDR,
    SO_SNDBUF,
    SO_SNDBUFFORCE,
    SOL_SOCKET,
    TCP_CLOSE,
    TCP_CLOSE_WAIT,
    TCP_CLOSING,
    TCP_ESTABLISHED,
    TCP_FIN_WAIT1,
    TCP_FIN_WAIT2,
    TCP_LAST_ACK,
    set_raw,
)
from lazyproc.model import InetSocket, TcpState
from lazyproc.restore.interfaces import set_late
from lazyproc.restore.options import apply

_FIN_SENT = {TCP_FIN_WAIT1, TCP_FIN_WAIT2, TCP_CLOSING, TCP_LAST_ACK}
_FIN_RECEIVED = {TCP_CLOSE_WAIT, TCP_CLOSING, TCP_LAST_ACK}
_AMPLE = 1 << 29  # bytes, doubled by the kernel
_PIECE = 1 << 16
_MOMENT = 5.0  # seconds for a packet to pass the loopback interface


def connect_repaired(
    sock: socket.socket, inet: InetSocket, remote: tuple[str, int] | tuple[str, int, int, int]
) -> None:
    """Bring a bound socket in repair mode to the state of the connection, but for what was never sent."""
    state = inet.tcp
    assert state is not None
    received_fin, sent_fin = inet.state in _FIN_RECEIVED, inet.state in _FIN_SENT
    sent = state.send_queue[: len(state.send_queue) - state.unsent]
    tcp.set_queue_start(sock, tcp.RECV_QUEUE, state.recv_seq - len(state.recv_queue) - received_fin)
    tcp.set_queue_start(sock, tcp.SEND_QUEUE, state.send_seq - len(state.send_queue) - sent_fin)
    sock.connect(remote)
    tcp.set_negotiated(sock, state.options, state.send_wscale, state.recv_wscale, state.mss)
    if state.options & tcp.OPT_TIMESTAMPS:
        tcp.set_timestamp(sock, state.timestamp)
    sock.setsockopt(SOL_SOCKET, SO_RCVBUFFORCE, _AMPLE)
    sock.setsockopt(SOL_SOCKET, SO_SNDBUFFORCE, _AMPLE)
    _refill(sock, tcp.RECV_QUEUE, state.recv_queue)
    _refill(sock, tcp.SEND_QUEUE, sent)
    tcp.select_queue(sock, tcp.NO_QUEUE)
    if state.window:
        tcp.set_window(sock, _window_before_fin(state.window) if received_fin else state.window)
    if received_fin:
        _receive_fin(sock, inet, state)
    set_late(sock, inet)


def _refill(sock: socket.socket, queue: int, data: bytes) -> None:
    tcp.select_queue(sock, queue)
    for start in range(0, len(data), _PIECE):
        piece = data[start : start + _PIECE]
        while piece:
            piece = piece[sock.send(piece, socket.MSG_DONTWAIT) :]


def _window_before_fin(window: bytes) -> bytes:
    send_wl1, send_wnd, max_window, recv_wnd, recv_wup = tcp.WINDOW.unpack(window)
    return tcp.WINDOW.pack(send_wl1, send_wnd, max_window, recv_wnd + 1, (recv_wup - 1) & 0xFFFFFFFF)


def _receive_fin(sock: socket.socket, inet: InetSocket, state: TcpState) -> None:
    assert inet.remote is not None
    seq = (state.recv_seq - 1) & 0xFFFFFFFF
    sent_fin = inet.state in _FIN_SENT
    unacknowledged = (state.send_seq - len(state.send_queue) - sent_fin) & 0xFFFFFFFF
    window = tcp.WINDOW.unpack(state.window)[1] >> state.send_wscale if state.window else 0xFFFF
    inject.fin(plain(inet.remote), plain(inet.local), seq, unacknowledged, min(window, 0xFFFF))
    _await(sock, lambda now: now != TCP_ESTABLISHED)


def _await(sock: socket.socket, reached: Callable[[int], bool]) -> None:
    deadline = time.monotonic() + _MOMENT
    while not reached(tcp.info(sock).state):
        if time.monotonic() > deadline:
            raise RestoreError(
                "the end of a TCP connection cannot be received again",
                where=f"local port {sock.getsockname()[1]}",
                remedy="let the host's firewall accept packets on the loopback interface",
            )
        time.sleep(0.0005)


def end(sock: socket.socket, unread: bytes, error: int) -> None:
    """Bring a socket to where a connection has ended in both directions: `unread` can be read, then comes the end or
    the `error` of a reset, which is EPIPE behind a FIN and else ECONNRESET.

    By a real connection within this host, since nothing of it shows afterwards: such a socket has no peer.
    """
    with socket.socket(sock.family, socket.SOCK_STREAM) as listener:
        listener.bind((sock.getsockname()[0], 0))
        listener.listen(1)
        sock.setsockopt(SOL_SOCKET, SO_RCVBUFFORCE, _AMPLE)
        sock.settimeout(_MOMENT)
        sock.connect(listener.getsockname())
        sock.settimeout(None)
        peer = listener.accept()[0]
    with peer:
        peer.sendall(unread)
        if error != errno.ECONNRESET:
            peer.shutdown(socket.SHUT_WR)
            _await(sock, lambda state: state == TCP_CLOSE_WAIT)
        if error:
            peer.setsockopt(SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
            peer.close()
        else:
            sock.shutdown(socket.SHUT_RDWR)
        _await(sock, lambda state: state == TCP_CLOSE)


def leave_repair(sock: socket.socket, inet: InetSocket) -> None:
    """After the commit: the connection lives. A window probe makes the peer answer at once; what was never
    sent is sent, and so is the FIN of a half-closed connection.
    """
    state = inet.tcp
    assert state is not None
    tcp.leave(sock, probe=True)
    reuse = inet.options.values.get((SOL_SOCKET, SO_REUSEADDR))
    if reuse is not None:
        sock.setsockopt(SOL_SOCKET, SO_REUSEADDR, reuse)
    with suppress(ConnectionError):  # the peer has ended it meanwhile: the program will see
        _send_rest(sock, inet, state.send_queue[len(state.send_queue) - state.unsent :])
    if inet.shutdown & SEND_SHUTDOWN:
        with suppress(OSError):
            sock.shutdown(socket.SHUT_WR)


def send_again(sock: socket.socket, data: bytes) -> None:
    """Without waiting for who reads it: there is room for all. SO_SNDBUF is another one afterwards."""
    sock.setsockopt(SOL_SOCKET, SO_SNDBUFFORCE, _AMPLE)
    while data:
        data = data[sock.send(data, socket.MSG_DONTWAIT) :]


def _send_rest(sock: socket.socket, inet: InetSocket, rest: bytes) -> None:
    send_again(sock, rest)
    size = inet.options.values.get((SOL_SOCKET, SO_SNDBUF))
    if size is not None:
        set_raw(sock, SOL_SOCKET, SO_SNDBUF, size)
    apply(sock, inet.options, ((SOL_SOCKET, SO_BUF_LOCK),))
