"""What sock_diag says of real sockets, and who may pass for a local peer."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lazyproc.kernel import sockdiag
from lazyproc.kernel.sockdiag import TCP_CLOSE, TCP_ESTABLISHED, TCP_LISTEN, InetInfo, UnixInfo
from tests.needs import require_root

NOBODY = 65534
CLONE_NEWNET = 0x40000000
LOOPBACK = socket.inet_aton("127.0.0.1")


def inode(sock: socket.socket) -> int:
    return os.fstat(sock.fileno()).st_ino


def unix_info(sock: socket.socket) -> UnixInfo:
    return sockdiag.unix_sockets()[inode(sock)]


def inet_info(sock: socket.socket, protocol: int) -> InetInfo:
    (info,) = (i for i in sockdiag.inet_sockets(sock.family, protocol) if i.inode == inode(sock))
    return info


# --- unix ---------------------------------------------------------------------------------------------------


def test_a_pair_of_unix_sockets() -> None:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other:
        one.send(b"four")
        one.shutdown(socket.SHUT_WR)
        first, second = unix_info(one), unix_info(other)
        size = other.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
    assert (first.peer, second.peer) == (second.inode, first.inode)
    assert first.type == second.type == socket.SOCK_SEQPACKET
    assert first.state == second.state == TCP_ESTABLISHED
    assert (first.name, first.file, first.pending) == (b"", None, ())
    assert first.wqueue > 0  # memory, not bytes
    assert second.rqueue == 4
    assert (first.shutdown, second.shutdown) == (2, 1)
    assert second.meminfo[1] == size
    assert first.uid == os.geteuid()


def test_a_listening_unix_socket_and_those_who_wait(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(str(path))
        server.listen(7)
        client.connect(str(path))
        info, waiting = unix_info(server), unix_info(client)
        accepted, _ = server.accept()
        with accepted:
            answered = unix_info(client)
            assert answered.peer == inode(accepted)
            assert unix_info(accepted).name == os.fsencode(path)
    assert (info.state, info.name, info.rqueue, info.wqueue) == (TCP_LISTEN, os.fsencode(path), 1, 7)
    assert info.pending == (waiting.inode,)
    assert waiting.peer == 0
    stat = path.stat()
    assert info.file is not None
    assert (info.file[0], os.makedev(*info.file[1:])) == (stat.st_ino, stat.st_dev)


def test_an_abstract_name_and_an_unbound_datagram_socket() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as named, socket.socket(socket.AF_UNIX) as bare:
        name = b"\0lazyproc\0" + str(os.getpid()).encode()
        named.bind(name)
        assert unix_info(named).name == name
        assert unix_info(named).type == socket.SOCK_DGRAM
        assert (unix_info(bare).state, unix_info(bare).peer) == (TCP_CLOSE, 0)


def test_more_sockets_than_one_answer_holds() -> None:
    pairs = [socket.socketpair() for _ in range(400)]
    try:
        assert {inode(sock) for pair in pairs for sock in pair} <= sockdiag.unix_sockets().keys()
    finally:
        for sock in (sock for pair in pairs for sock in pair):
            sock.close()


# --- inet ---------------------------------------------------------------------------------------------------


@contextmanager
def connection(host: str) -> Iterator[tuple[socket.socket, socket.socket, socket.socket]]:
    """Listener, client and the accepted end. The listener takes both families."""
    with (
        socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=3) as server,
        socket.create_connection((host, server.getsockname()[1])) as client,
    ):
        accepted, _ = server.accept()
        with accepted:
            yield server, client, accepted


def test_a_tcp_connection() -> None:
    with connection("127.0.0.1") as (server, client, accepted):
        accepted.sendall(b"seven..")
        client.recv(7, socket.MSG_PEEK | socket.MSG_WAITALL)
        client.shutdown(socket.SHUT_WR)
        info, listening = inet_info(client, socket.IPPROTO_TCP), inet_info(server, socket.IPPROTO_TCP)
        port, peer_port = client.getsockname()[1], client.getpeername()[1]
    assert (info.family, info.protocol, info.uid) == (socket.AF_INET, socket.IPPROTO_TCP, os.geteuid())
    assert (info.local, info.remote) == ((LOOPBACK, port), (LOOPBACK, peer_port))
    assert (info.rqueue, info.shutdown, info.interface) == (7, 2, 0)
    assert (listening.state, listening.local, listening.remote) == (TCP_LISTEN, (bytes(16), peer_port), None)
    assert (listening.rqueue, listening.wqueue) == (0, 3)


def test_a_udp_socket_bound_to_an_interface() -> None:
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
        sock.bind(("::1", 0))
        info = inet_info(sock, socket.IPPROTO_UDP)
        port = sock.getsockname()[1]
    assert (info.state, info.local, info.remote) == (TCP_CLOSE, (bytes(15) + b"\1", port), None)
    assert info.interface == socket.if_nametoindex("lo")


# --- peers --------------------------------------------------------------------------------------------------


def peer_uid(accepted: socket.socket) -> int | None:
    return sockdiag.peer_uid_of_tcp(accepted.getsockname(), accepted.getpeername())


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_uid_of_a_local_peer(host: str) -> None:
    """An IPv4 client of an IPv6 listener shows as ::ffff:127.0.0.1 here and as 127.0.0.1 there."""
    with connection(host) as (_, _, accepted):
        assert peer_uid(accepted) == os.geteuid()


@contextmanager
def somebody_else() -> Iterator[None]:
    require_root()
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def test_the_uid_is_the_peers_not_ours() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        with somebody_else():
            client = socket.create_connection(server.getsockname())
        accepted, _ = server.accept()
        with client, accepted:
            assert peer_uid(accepted) == NOBODY
            assert peer_uid(client) == os.geteuid()


def test_a_peer_that_has_closed_is_nobody() -> None:
    """Its orphaned socket, and TIME_WAIT after it, show uid 0 to those who do not look closer."""
    with connection("127.0.0.1") as (_, client, accepted):
        client.close()
        assert accepted.recv(1) == b""
        names = accepted.getsockname(), accepted.getpeername()
        assert sockdiag.peer_uid_of_tcp(*names) is None
        accepted.close()
        assert sockdiag.peer_uid_of_tcp(*names) is None


def test_a_listener_is_not_taken_for_the_peer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert sockdiag.peer_uid_of_tcp(("127.0.0.1", 1), server.getsockname()) is None


def test_a_peer_that_reset_the_connection_is_nobody() -> None:
    with connection("::1") as (_, client, accepted):
        names = accepted.getsockname(), accepted.getpeername()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        assert sockdiag.peer_uid_of_tcp(*names) is None


# --- namespaces ---------------------------------------------------------------------------------------------


def test_a_thread_in_another_network_namespace_sees_that_ones_sockets() -> None:
    require_root()
    there: list[tuple[set[int], int]] = []

    def look() -> None:
        assert ctypes.CDLL(None).unshare(CLONE_NEWNET) == 0
        with socket.socket(socket.AF_UNIX) as ours:
            there.append((set(sockdiag.unix_sockets()), inode(ours)))

    with socket.socket(socket.AF_UNIX) as here:
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        ((seen, expected),) = there
        assert seen == {expected}
        assert inode(here) in sockdiag.unix_sockets()
