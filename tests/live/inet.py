"""TCP and UDP sockets as a test wants them, and what they say."""

from __future__ import annotations

import socket

import pytest

from lazyproc.kernel.sockopt import SOL_SOCKET
from tests.live.sockets import put

INET, INET6 = socket.AF_INET, socket.AF_INET6
STREAM, DGRAM = socket.SOCK_STREAM, socket.SOCK_DGRAM
ANY = {INET: "0.0.0.0", INET6: "::"}
LOOPBACK = {INET: "127.0.0.1", INET6: "::1"}
Family = socket.AddressFamily
BOTH = pytest.mark.parametrize("family", [INET, INET6])


def listening(family: Family, port: int, number: int, address: str | None = None) -> socket.socket:
    sock = put(number, socket.socket(family, STREAM))
    sock.setsockopt(SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((address or LOOPBACK[family], port))
    sock.listen(5)
    return sock


def connected(family: Family, port: int, number: int) -> socket.socket:
    sock = put(number, socket.socket(family, STREAM))
    sock.connect((LOOPBACK[family], port))
    return sock


def outside(family: Family = INET, receive_buffer: int = 0) -> socket.socket:
    """Somebody who listens at port 5000 and is not of the tree."""
    listener = socket.socket(family, STREAM)
    if receive_buffer:
        listener.setsockopt(SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    listener.setsockopt(SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((LOOPBACK[family], 5000))
    listener.listen()
    return listener


def read_all(sock: socket.socket, length: int) -> bytes:
    sock.settimeout(5)
    data = b""
    while len(data) < length and (piece := sock.recv(length - len(data))):
        data += piece
    return data


def told_of(sock: socket.socket) -> tuple[int, int]:
    """What recv(2) says, and SO_ERROR then."""
    try:
        assert sock.recv(1) == b""
        error = 0
    except OSError as failed:
        error = failed.errno or 0
    return error, sock.getsockopt(SOL_SOCKET, socket.SO_ERROR)
