"""The links of `make bench` between two hosts."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
import time

import pytest

from benchmarks.wires import CONTROLS, Link, hosts
from lazyproc.hosts import Pair
from tests.live.real import dialled, network_of

ROUND_TRIP_MS = 20.0
PORT = 7810
MIB = 1 << 20


def _listening(pair: Pair) -> socket.socket:
    with network_of(pair.destination):
        return socket.create_server((str(pair.destination.address), PORT))


def test_a_wire_with_a_length_holds_everything_back_and_changes_nothing() -> None:
    data = os.urandom(16 * MIB)
    with (
        hosts(Link(round_trip_ms=ROUND_TRIP_MS)) as pair,
        _listening(pair) as listener,
        dialled(pair.source, str(pair.destination.address), PORT) as here,
        listener.accept()[0] as there,
    ):
        begun = time.monotonic()
        here.sendall(b"?")
        assert there.recv(1) == b"?"
        there.sendall(b"!")
        assert here.recv(1) == b"!"
        assert time.monotonic() - begun >= ROUND_TRIP_MS / 1e3
        sender = threading.Thread(target=here.sendall, args=(data,))
        sender.start()
        came = _all(there, len(data))
        sender.join()
    assert hashlib.sha256(came).digest() == hashlib.sha256(data).digest()


def _all(stream: socket.socket, size: int) -> bytes:
    found = bytearray()
    while len(found) < size:
        part = stream.recv(MIB)
        assert part, f"closed after {len(found)} bytes"
        found += part
    return bytes(found)


@pytest.mark.parametrize("control", CONTROLS)
def test_both_hosts_have_the_congestion_control_of_the_link(control: str) -> None:
    allowed = "/proc/sys/net/ipv4/tcp_allowed_congestion_control"
    with open(allowed) as file:
        before = file.read()
    with hosts(Link(control=control)) as pair:
        for host in (pair.source, pair.destination):
            with network_of(host), socket.socket() as made:
                assert (
                    made.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0")
                    == control.encode()
                )
    with open(allowed) as file:
        assert file.read() == before
