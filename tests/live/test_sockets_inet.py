"""TCP and UDP sockets that stay on their host: listening, bound, with datagrams. Connections: test_sockets_tcp.py."""

from __future__ import annotations

import ctypes
import errno
import os
import select
import socket
import struct
from contextlib import ExitStack

import pytest

from lazyproc.dump.descriptors import gather_descriptors
from lazyproc.errors import RestoreError
from lazyproc.kernel import tcp
from lazyproc.kernel.sockopt import (
    IP_MTU_DISCOVER,
    IP_PKTINFO,
    IP_RECVERR,
    IP_TOS,
    SO_ATTACH_FILTER,
    SO_PRIORITY,
    SOL_IP,
    SOL_SOCKET,
    SOL_TCP,
    TCP_CONGESTION,
    TCP_DEFER_ACCEPT,
    TCP_LINGER2,
    TCP_USER_TIMEOUT,
    classic_filter,
)
from lazyproc.kernel.sys import syscall
from tests.live.descriptors import stopped
from tests.live.inet import (
    ANY,
    BOTH,
    DGRAM,
    INET,
    INET6,
    LOOPBACK,
    STREAM,
    Family,
    listening,
    outside,
    told_of,
)
from tests.live.sockets import (
    CLONE_NEWNET,
    SYS_UNSHARE,
    Network,
    dumped,
    ip,
    keep,
    made_sockets,
    obstacle_words,
    put,
    remade,
)

pytestmark = pytest.mark.usefixtures("network")


# --- listening and bound --------------------------------------------------------------------------------


@BOTH
def test_a_listening_socket(family: Family) -> None:
    def body() -> None:
        keep(listening(family, 5000, 10, ANY[family]))

    with dumped(body) as checkpoint, made_sockets(checkpoint) as socks:
        assert tcp.info(socks[10]).backlog == 5
        assert socks[10].getsockopt(SOL_SOCKET, socket.SO_REUSEADDR) == 1
        with socket.create_connection((LOOPBACK[family], 5000)) as client:
            server, _ = socks[10].accept()
            with server:
                client.send(b"hi")
                assert server.recv(9) == b"hi"


def test_v6_only_and_v4_share_a_port() -> None:
    def body() -> None:
        six = put(10, socket.socket(INET6, STREAM))
        six.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        six.bind(("::", 5000))
        six.listen()
        keep(six, listening(INET, 5000, 11, "0.0.0.0"))

    with remade(body) as socks:
        assert socks[10].getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == 1
        assert socks[10].getsockname()[1] == socks[11].getsockname()[1] == 5000


def test_reuseport_listeners_and_a_bound_socket() -> None:
    def body() -> None:
        socks = []
        for number in (10, 11):
            sock = put(number, socket.socket(INET, STREAM))
            sock.setsockopt(SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind(("127.0.0.1", 5000))
            sock.listen()
            socks.append(sock)
        bound = put(12, socket.socket(INET, STREAM))
        bound.bind(("127.0.0.1", 5001))
        keep(*socks, bound, put(13, socket.socket(INET, STREAM)))

    with remade(body) as socks:
        assert socks[10].getsockname() == socks[11].getsockname() == ("127.0.0.1", 5000)
        assert socks[12].getsockname() == ("127.0.0.1", 5001)
        assert socks[13].getsockname() == ("0.0.0.0", 0)
        socks[12].listen()


def test_options_of_many_kinds() -> None:
    accept_all = struct.pack("=HBBI", 6, 0, 0, 0xFFFF)  # BPF_RET | BPF_K
    wanted = {
        (SOL_SOCKET, socket.SO_KEEPALIVE): struct.pack("i", 1),
        (SOL_SOCKET, socket.SO_LINGER): struct.pack("ii", 1, 7),
        (SOL_SOCKET, SO_PRIORITY): struct.pack("i", 3),
        (SOL_IP, IP_TOS): struct.pack("i", 0x10),
        (SOL_IP, IP_MTU_DISCOVER): struct.pack("i", 2),
        (SOL_TCP, socket.TCP_NODELAY): struct.pack("i", 1),
        (SOL_TCP, socket.TCP_KEEPIDLE): struct.pack("i", 77),
        (SOL_TCP, TCP_USER_TIMEOUT): struct.pack("i", 12_345),
        (SOL_TCP, TCP_LINGER2): struct.pack("i", 9),
        (SOL_TCP, TCP_DEFER_ACCEPT): struct.pack("i", 3),
        (SOL_TCP, TCP_CONGESTION): b"reno".ljust(16, b"\0"),
    }

    def body() -> None:
        sock = listening(INET, 5000, 10)
        for (level, name), value in wanted.items():
            sock.setsockopt(level, name, value)
        program = ctypes.create_string_buffer(accept_all, len(accept_all))
        sock.setsockopt(SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HxxxxxxQ", 1, ctypes.addressof(program)))
        sock.setsockopt(SOL_SOCKET, SO_PRIORITY, 3)  # IP_TOS has changed it
        keep(sock)

    with remade(body) as socks:
        found = {option: socks[10].getsockopt(*option, len(value)) for option, value in wanted.items()}
        assert found == wanted
        assert classic_filter(socks[10]) == accept_all


# --- UDP ------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("wildcard", [False, True])
def test_unread_datagrams_keep_their_senders(family: Family, wildcard: bool) -> None:
    packets = [b"one", b"", b"three" * 1000]

    def body() -> None:
        receiver = put(10, socket.socket(family, DGRAM))
        receiver.bind((ANY[family] if wildcard else LOOPBACK[family], 5000))
        with socket.socket(family, DGRAM) as sender:
            sender.bind((LOOPBACK[family], 6000))
            for packet in packets:
                sender.sendto(packet, (LOOPBACK[family], 5000))
        keep(receiver)

    with remade(body) as socks:
        for packet in packets:
            data, address = socks[10].recvfrom(1 << 16, socket.MSG_DONTWAIT)
            assert (data, address[:2]) == (packet, (LOOPBACK[family], 6000))
        with pytest.raises(BlockingIOError):
            socks[10].recv(1, socket.MSG_DONTWAIT)


def test_v4_datagrams_of_a_v6_socket() -> None:
    def body() -> None:
        receiver = put(10, socket.socket(INET6, DGRAM))
        receiver.bind(("::", 5000))
        with socket.socket(INET, DGRAM) as sender:
            sender.bind(("127.0.0.1", 6000))
            sender.sendto(b"four", ("127.0.0.1", 5000))
        keep(receiver)

    with remade(body) as socks:
        data, address = socks[10].recvfrom(99, socket.MSG_DONTWAIT)
        assert (data, address[:2]) == (b"four", ("::ffff:127.0.0.1", 6000))


def test_a_connected_udp_pair_with_queue_and_shutdown() -> None:
    def body() -> None:
        one, other = put(10, socket.socket(INET, DGRAM)), put(11, socket.socket(INET, DGRAM))
        one.bind(("127.0.0.1", 5000))
        other.bind(("127.0.0.1", 5001))
        one.connect(("127.0.0.1", 5001))
        other.connect(("127.0.0.1", 5000))
        other.send(b"queued")
        one.shutdown(socket.SHUT_WR)
        keep(one, other)

    with remade(body) as socks:
        assert socks[10].recv(99) == b"queued"
        assert socks[10].getpeername() == ("127.0.0.1", 5001)
        with pytest.raises(BrokenPipeError):
            socks[10].send(b"x")
        socks[11].send(b"more")
        assert socks[10].recv(99) == b"more"


# --- what cannot be done --------------------------------------------------------------------------------


def test_kinds_that_cannot_travel() -> None:
    close = "close it before the move and open it again after it"

    def body() -> None:
        keep(
            put(11, socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)),
            put(12, socket.socket(INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)),
            put(13, socket.socket(INET6, DGRAM, socket.IPPROTO_UDPLITE)),
        )

    assert obstacle_words(body) == [
        f"fd 11: is a packet socket on this host's network interfaces; {close}",
        f"fd 12: is a raw IP socket; {close}",
        "fd 13: is a UDP-Lite socket; use UDP",
    ]


@pytest.mark.parametrize("kept", [False, True], ids=["error", "queue of errors"])
def test_an_error_of_a_datagram_stays_with_the_program_that_runs_on(kept: bool) -> None:
    """The answer of a host where nobody listens (ICMP). A look would take it, and took it when the dump failed."""

    def body() -> None:
        sock = put(10, socket.socket(INET, DGRAM))
        sock.setsockopt(SOL_IP, IP_RECVERR, kept)
        with socket.socket(INET, DGRAM) as nobody:
            nobody.bind(("127.0.0.1", 0))
            sock.connect(nobody.getsockname())
        sock.send(b"is anybody there?")
        assert select.select([sock], [], [], 5)[0]
        keep(sock)

    with stopped(body) as tasks:
        gathered = gather_descriptors(tasks)
        with gathered.sockets, gathered.registry.taken(tasks[0].pid, 10) as fd:
            assert [each.where for each in gathered.obstacles] == ["fd 10"] * kept
            with socket.socket(fileno=os.dup(fd)) as sock:
                assert told_of(sock) == (errno.ECONNREFUSED, 0)
    if not kept:
        with remade(body) as socks, pytest.raises(BlockingIOError):
            socks[10].recv(1, socket.MSG_DONTWAIT)


def test_datagrams_whose_destination_matters() -> None:
    def body() -> None:
        sock = put(10, socket.socket(INET, DGRAM))
        sock.setsockopt(SOL_IP, IP_PKTINFO, 1)
        sock.bind(("0.0.0.0", 5000))
        sock.sendto(b"x", ("127.0.0.1", 5000))
        keep(sock)

    with stopped(body) as tasks, gather_descriptors(tasks).sockets as table:
        (found,) = table.registry.obstacles
    assert found.why.startswith("holds unread datagrams whose destination address the program wants to know")


def test_datagrams_of_one_interface() -> None:
    def body() -> None:
        sock = put(10, socket.socket(INET, DGRAM))
        sock.setsockopt(SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
        sock.bind(("127.0.0.1", 5000))
        sock.sendto(b"x", ("127.0.0.1", 5000))
        keep(sock)

    with stopped(body) as tasks, gather_descriptors(tasks).sockets as table:
        (found,) = table.registry.obstacles
    assert found.why == "holds unread datagrams that came to a group or by one interface"


def test_sockets_of_two_networks() -> None:
    def body() -> None:
        one = put(10, socket.socket(INET, STREAM))
        syscall(SYS_UNSHARE, CLONE_NEWNET)
        keep(one, put(11, socket.socket(INET, STREAM)))

    (found,) = obstacle_words(body)
    assert found.startswith("fd 11: is in another network namespace than the tree's other sockets; start the")


def test_an_address_in_use_and_one_that_is_not_here() -> None:
    def body() -> None:
        keep(listening(INET, 5000, 10))

    with dumped(body) as checkpoint:
        in_use = pytest.raises(RestoreError, match="is in use on this host")
        with outside(), in_use as caught, made_sockets(checkpoint):
            pass
        assert caught.value.where == "TCP 127.0.0.1 port 5000"
        with ExitStack() as stack, Network(stack).inside():
            ip("link set lo down")
            ip("address del 127.0.0.1/8 dev lo")
            with (
                pytest.raises(RestoreError, match=r"ip address add 127\.0\.0\.1 dev"),
                made_sockets(checkpoint),
            ):
                pass
