"""TCP and UDP sockets that stay on their host: listening, bound, connected within the tree and to
outside of it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from lazyproc.dump.descriptors import early_flows, explain_descriptors, gather_descriptors
from lazyproc.errors import RestoreError
from lazyproc.kernel import tcp
from lazyproc.kernel.sockopt import (
    IP_MTU_DISCOVER,
    IP_PKTINFO,
    IP_TOS,
    SO_ATTACH_FILTER,
    SO_PRIORITY,
    SOL_IP,
    SOL_SOCKET,
    SOL_TCP,
    TCP_CLOSE,
    TCP_CLOSE_WAIT,
    TCP_CLOSING,
    TCP_CONGESTION,
    TCP_DEFER_ACCEPT,
    TCP_FIN_WAIT2,
    TCP_LAST_ACK,
    TCP_LINGER2,
    TCP_USER_TIMEOUT,
    classic_filter,
)
from lazyproc.kernel.sys import syscall
from lazyproc.restore.sockets import flows_to_hold
from tests.live.descriptors import stopped
from tests.live.sockets import (
    CLONE_NEWNET,
    SYS_UNSHARE,
    Network,
    dumped,
    eventually,
    handed_over,
    ip,
    keep,
    made_sockets,
    obstacle_words,
    put,
    remade,
    words,
)

INET, INET6 = socket.AF_INET, socket.AF_INET6
STREAM, DGRAM = socket.SOCK_STREAM, socket.SOCK_DGRAM
ANY = {INET: "0.0.0.0", INET6: "::"}
LOOPBACK = {INET: "127.0.0.1", INET6: "::1"}
Family = socket.AddressFamily
MAX_TCP_WINDOW = 32767
BOTH = pytest.mark.parametrize("family", [INET, INET6])


@pytest.fixture(autouse=True)
def network() -> Iterator[Network]:
    """Every test here runs in a network of its own: ports are free, resets are countable."""
    with ExitStack() as stack:
        own = Network(stack)
        with own.inside():
            yield own


def _listener(family: Family, port: int, number: int, address: str | None = None) -> socket.socket:
    sock = put(number, socket.socket(family, STREAM))
    sock.setsockopt(SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((address or LOOPBACK[family], port))
    sock.listen(5)
    return sock


def _connected(family: Family, port: int, number: int) -> socket.socket:
    sock = put(number, socket.socket(family, STREAM))
    sock.connect((LOOPBACK[family], port))
    return sock


def _read(sock: socket.socket, length: int) -> bytes:
    sock.settimeout(5)
    data = b""
    while len(data) < length and (piece := sock.recv(length - len(data))):
        data += piece
    return data


# --- listening and bound
# --------------------------------------------------------------------------------------


@BOTH
def test_a_listening_socket(family: Family) -> None:
    def body() -> None:
        keep(_listener(family, 5000, 10, ANY[family]))

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
        keep(six, _listener(INET, 5000, 11, "0.0.0.0"))

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
        sock = _listener(INET, 5000, 10)
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


# --- UDP
# ------------------------------------------------------------------------------------------------------


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


# --- connections
# ----------------------------------------------------------------------------------------------


@BOTH
def test_a_connection_within_the_tree(family: Family, network: Network) -> None:
    def body() -> None:
        listener = _listener(family, 5000, 10)
        client = _connected(family, 5000, 11)
        server = put(12, listener.accept()[0])
        client.send(b"to the server")
        server.send(b"to the client")
        server.recv(3)
        keep(listener, client, server)

    with remade(body) as socks:
        assert _read(socks[12], 10) == b"the server"
        assert _read(socks[11], 13) == b"to the client"
        assert socks[12].getpeername() == socks[11].getsockname()
        socks[11].send(b"on")
        assert _read(socks[12], 2) == b"on"
        socks[11].shutdown(socket.SHUT_WR)
        assert _read(socks[12], 1) == b""
    assert network.resets_sent() == 0


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
def test_who_accepts_from_the_tree_itself_is_not_held_back_before_the_freeze(address: str) -> None:
    """The packets of its connections have its port, too: dropped while the tree still runs, one is waited for (RTO)."""

    def body() -> None:
        within = _listener(INET, 5000, 10, address)
        client = put(11, socket.create_connection(("127.0.0.1", 5000)))
        accepted, _ = within.accept()
        keep(within, client, put(12, accepted), _listener(INET, 5001, 13, address))

    with stopped(body) as tasks:
        assert [(flow.local[1], flow.remote) for flow in early_flows(tasks)] == [(5001, None)]


def test_a_v4_connection_of_a_v6_socket(network: Network) -> None:
    def body() -> None:
        listener = _listener(INET6, 5000, 10, "::")
        client = _connected(INET, 5000, 11)
        server = put(12, listener.accept()[0])
        client.send(b"mapped")
        keep(listener, client, server)

    with remade(body) as socks:
        assert _read(socks[12], 6) == b"mapped"
        assert socks[12].getsockname()[0] == "::ffff:127.0.0.1"
        socks[12].send(b"back")
        assert _read(socks[11], 4) == b"back"
    assert network.resets_sent() == 0


def test_a_connection_of_the_tree_that_nobody_has_accepted() -> None:
    def body() -> None:
        keep(_listener(INET, 5000, 10), _connected(INET, 5000, 11))

    with dumped(body) as checkpoint, made_sockets(checkpoint) as socks:
        assert flows_to_hold(checkpoint) == [], "it is made by a handshake within the host"
        socks[11].send(b"finally")
        server, address = socks[10].accept()
        with server:
            assert address == socks[11].getsockname()
            assert _read(server, 7) == b"finally"


def _outside(family: Family = INET, receive_buffer: int = 0) -> socket.socket:
    listener = socket.socket(family, STREAM)
    if receive_buffer:
        listener.setsockopt(SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    listener.setsockopt(SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((LOOPBACK[family], 5000))
    listener.listen()
    return listener


@BOTH
def test_a_connection_to_outside_with_data_sent_unsent_and_unread(family: Family, network: Network) -> None:
    """The peer reads nothing, so most of a megabyte cannot even be sent."""
    sent = os.urandom(1 << 20)
    from_outside = os.urandom(30_000)
    with _outside(family, receive_buffer=20_000) as listener:

        def body() -> None:
            sock = _connected(family, 5000, 10)
            sock.setsockopt(SOL_SOCKET, socket.SO_SNDBUF, 1 << 21)
            sock.setsockopt(SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.sendall(sent)
            keep(sock)

        with stopped(body) as tasks:
            peer, _ = listener.accept()
            peer.sendall(from_outside)
            first = gather_descriptors(tasks)
            with first.sockets:
                (sock,) = first.sockets.connections()
                assert not tcp.is_repaired(sock)
                assert sock.getsockopt(SOL_SOCKET, socket.SO_REUSEADDR) == 1
            assert network.resets_sent() == 0
            checkpoint = handed_over(tasks)
        with peer, made_sockets(checkpoint) as socks:
            assert socks[10].getsockopt(SOL_SOCKET, socket.SO_REUSEADDR) == 1
            assert _read(socks[10], len(from_outside)) == from_outside
            assert _read(peer, len(sent)) == sent
            peer.sendall(b"more")
            assert _read(socks[10], 4) == b"more"
            socks[10].sendall(b"end")
            socks[10].shutdown(socket.SHUT_WR)
            assert _read(peer, 9) == b"end"
    assert network.resets_sent() == 0


@BOTH
def test_closed_by_the_peer(family: Family, network: Network) -> None:
    """CLOSE_WAIT: what arrived before the end is read, then the end; the other direction still works."""
    with _outside(family) as listener:

        def body() -> None:
            keep(_connected(family, 5000, 10))

        with stopped(body) as tasks:
            peer, _ = listener.accept()
            peer.send(b"last words")
            peer.shutdown(socket.SHUT_WR)
            checkpoint = handed_over(tasks)
        with peer, made_sockets(checkpoint) as socks:
            assert tcp.info(socks[10]).state == TCP_CLOSE_WAIT
            assert _read(socks[10], 99) == b"last words"
            socks[10].send(b"answer")
            assert _read(peer, 6) == b"answer"
            socks[10].shutdown(socket.SHUT_WR)
            assert _read(peer, 1) == b""
    assert network.resets_sent() == 0


@BOTH
def test_closed_by_the_tree(family: Family, network: Network) -> None:
    """FIN_WAIT2: the peer saw the end and may still send."""
    with _outside(family) as listener:

        def body() -> None:
            sock = _connected(family, 5000, 10)
            sock.send(b"last words")
            sock.shutdown(socket.SHUT_WR)
            keep(sock)

        with stopped(body) as tasks:
            peer, _ = listener.accept()
            checkpoint = handed_over(tasks)
        with peer, made_sockets(checkpoint) as socks:
            assert _read(peer, 99) == b"last words"
            peer.send(b"answer")
            assert _read(socks[10], 6) == b"answer"
            assert tcp.info(socks[10]).state == TCP_FIN_WAIT2
            peer.shutdown(socket.SHUT_WR)
            assert _read(socks[10], 1) == b""
    assert network.resets_sent() == 0


def test_the_end_waits_behind_data_that_was_not_sent(network: Network) -> None:
    """FIN_WAIT1 and, when the peer closed too, LAST_ACK: the FIN is still in the queue."""
    sent = os.urandom(1 << 20)
    with _outside(receive_buffer=20_000) as listener:

        def body() -> None:
            sock = _connected(INET, 5000, 10)
            sock.setsockopt(SOL_SOCKET, socket.SO_SNDBUF, 1 << 21)
            sock.sendall(sent)
            sock.shutdown(socket.SHUT_WR)
            keep(sock)

        with stopped(body) as tasks:
            peer, _ = listener.accept()
            peer.shutdown(socket.SHUT_WR)
            checkpoint = handed_over(tasks)
        with peer, made_sockets(checkpoint) as socks:
            assert tcp.info(socks[10]).state in (TCP_CLOSING, TCP_LAST_ACK)
            assert _read(peer, len(sent) + 1) == sent
            assert _read(socks[10], 1) == b""
    assert network.resets_sent() == 0


def test_a_rolled_back_dump_leaves_the_connection_as_it_was(network: Network) -> None:
    """Not one segment more, and the process goes on with its queues."""
    with _outside() as listener:

        def body() -> None:
            sock = _connected(INET, 5000, 10)
            sock.send(b"unread by the peer")
            os.close(900)  # see tests.live.descriptors: the chain is complete
            os.kill(os.getpid(), signal.SIGSTOP)
            if sock.recv(6) == b"unread":
                sock.send(b" and more")
            os._exit(0)

        with stopped(body) as tasks:
            peer, _ = listener.accept()
            with peer:
                peer.send(b"unread")
                before = network.segments_sent()
                with gather_descriptors(tasks).sockets:
                    pass
                assert network.segments_sent() == before
                os.kill(tasks[0].pid, signal.SIGCONT)
                assert _read(peer, 27) == b"unread by the peer and more"


def test_a_connection_that_has_ended_in_both_directions() -> None:
    """What was not read yet is read, then the end; the listener on the same port is none of its business."""

    def body() -> None:
        listener = _listener(INET, 5000, 10)
        with socket.create_connection(("127.0.0.1", 5000)) as peer:
            sock = put(11, listener.accept()[0])
            peer.send(b"last words")
            peer.shutdown(socket.SHUT_WR)
            sock.shutdown(socket.SHUT_WR)
            assert eventually(lambda: tcp.info(sock).state == TCP_CLOSE)
        keep(listener, sock)

    with remade(body) as socks:
        assert socks[11].recv(99) == b"last words"
        assert socks[11].recv(99) == b""
        with pytest.raises(BrokenPipeError):
            socks[11].send(b"x")
        assert tcp.info(socks[10]).pending == 0


@BOTH
def test_a_reset_that_the_program_has_not_seen(family: Family, network: Network) -> None:
    """What came before it is no whole stream, unless the end had come too; the source is still told of it as well."""
    with _outside(family) as listener:

        def body() -> None:
            cut_off, complete = _connected(family, 5000, 10), _connected(family, 5000, 11)
            os.close(900)  # see tests.live.descriptors: the chain is complete
            os.kill(os.getpid(), signal.SIGSTOP)
            told = _told(cut_off), _told(complete)
            os._exit(0 if told == ((errno.ECONNRESET, 0), (0, errno.EPIPE)) else 1)

        with stopped(body) as tasks:
            cut_off, complete = listener.accept()[0], listener.accept()[0]
            complete.shutdown(socket.SHUT_WR)
            for peer in (cut_off, complete):
                peer.setsockopt(SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
                peer.close()
            assert explain_descriptors(tasks) == []
            with made_sockets(handed_over(tasks)) as socks:
                assert _told(socks[10]) == (errno.ECONNRESET, 0)
                assert _told(socks[11]) == (0, errno.EPIPE)
            os.kill(tasks[0].pid, signal.SIGCONT)
            ended = os.waitid(os.P_PID, tasks[0].pid, os.WEXITED | os.WNOWAIT)
            assert ended is not None
            assert ended.si_status == 0


def test_what_a_connection_was_sent_in_is_no_setting_when_it_has_ended() -> None:
    """The accepted end: its segments were larger than TCP_MAXSEG can be set to, as those within a host are."""

    def body() -> None:
        with _listener(INET, 5000, 20) as listener, socket.create_connection(("127.0.0.1", 5000)) as peer:
            sock = put(10, listener.accept()[0])
            peer.setsockopt(SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
        assert sock.getsockopt(SOL_TCP, socket.TCP_MAXSEG) > MAX_TCP_WINDOW
        keep(sock)

    with remade(body) as socks:
        assert _told(socks[10]) == (errno.ECONNRESET, 0)


def _told(sock: socket.socket) -> tuple[int, int]:
    """What recv(2) says, and SO_ERROR then."""
    try:
        assert sock.recv(1) == b""
        error = 0
    except OSError as failed:
        error = failed.errno or 0
    return error, sock.getsockopt(SOL_SOCKET, socket.SO_ERROR)


def test_a_connection_to_outside_ends_when_asked_for() -> None:
    with _outside() as listener:

        def body() -> None:
            keep(_connected(INET, 5000, 10))

        with stopped(body) as tasks:
            peer, _ = listener.accept()
            peer.send(b"arrived")
            checkpoint = handed_over(tasks, tcp_close=True)
        with peer, made_sockets(checkpoint) as socks:
            assert _read(socks[10], 99) == b"arrived"
            with pytest.raises(BrokenPipeError):
                socks[10].send(b"x")


# --- what cannot be done
# --------------------------------------------------------------------------------------


def test_kinds_that_cannot_travel() -> None:
    close = "close it before the move and open it again after it"

    def body() -> None:
        keep(
            put(10, socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)),
            put(11, socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)),
            put(12, socket.socket(INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)),
            put(13, socket.socket(INET6, DGRAM, socket.IPPROTO_UDPLITE)),
        )

    assert obstacle_words(body) == [
        f"fd 10: is a netlink socket: it talks to this host's kernel; {close}",
        f"fd 11: is a packet socket on this host's network interfaces; {close}",
        f"fd 12: is a raw IP socket; {close}",
        "fd 13: is a UDP-Lite socket; use UDP",
    ]


def test_a_connection_being_made_and_one_that_waits() -> None:
    with socket.socket(INET, STREAM) as client:

        def body() -> None:
            ip("route add 10.9.8.0/24 dev lo")
            connecting = put(10, socket.socket(INET, STREAM))
            connecting.setblocking(False)
            assert connecting.connect_ex(("10.9.8.7", 5000)) == errno.EINPROGRESS
            keep(connecting, _listener(INET, 5000, 11))

        with stopped(body) as tasks:
            client.bind(("127.0.0.1", 6000))
            client.connect(("127.0.0.1", 5000))
            for gathered in (gather_descriptors(tasks), gather_descriptors(tasks)):
                with gathered.sockets:
                    assert words(gathered) == [
                        "fd 10: is a TCP connection that is being made; try again in a moment",
                        "fd 11: holds a connection from 127.0.0.1 port 6000 that was not accepted yet; "
                        "try again in a moment, stop the clients from connecting, or use --tcp-close",
                    ]


def test_errors_that_only_the_program_can_read() -> None:
    """Whether the end had come before a reset shows when nothing is unread; and why nothing could be connected to."""

    def body() -> None:
        with _listener(INET, 5000, 20) as listener:
            cut_off = _connected(INET, 5000, 10)
            peer = listener.accept()[0]
        peer.send(b"unread")
        peer.setsockopt(SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
        peer.close()
        refused = put(11, socket.socket(INET, STREAM))
        refused.setblocking(False)
        assert refused.connect_ex(("127.0.0.1", 5000)) in (errno.EINPROGRESS, errno.ECONNREFUSED)
        assert eventually(lambda: tcp.info(refused).state == TCP_CLOSE)
        keep(cut_off, refused)

    why = "is a TCP connection that failed, and the error cannot be read without taking it from the program"
    remedy = "try again in a moment, let the program read it or close the socket first, or use --tcp-close"
    assert obstacle_words(body) == [f"fd {number}: {why}; {remedy}" for number in (10, 11)]
    with remade(body, tcp_close=True) as socks:
        assert socks[10].recv(99) == b"unread"
        assert [_told(socks[number]) for number in (10, 11)] == [(0, 0)] * 2


def test_urgent_data_and_a_half_datagram() -> None:
    with _outside() as listener:

        def body() -> None:
            corked = put(11, socket.socket(INET, DGRAM))
            corked.connect(("127.0.0.1", 5001))
            corked.send(b"first half", socket.MSG_MORE)
            keep(_connected(INET, 5000, 10), corked)

        with stopped(body) as tasks:
            peer, _ = listener.accept()
            with peer:
                peer.send(b"!", socket.MSG_OOB)
                gathered = gather_descriptors(tasks)
                with gathered.sockets:
                    assert words(gathered) == [
                        "fd 10: holds urgent (MSG_OOB) data; let the program read it first",
                        "fd 11: holds a datagram that was not sent yet (UDP_CORK, MSG_MORE); "
                        "try again in a moment",
                    ]


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


def test_members_of_multicast_groups() -> None:
    def body() -> None:
        lo = socket.if_nametoindex("lo")
        ip4 = struct.pack("=4s4sI", socket.inet_aton("239.1.2.3"), bytes(4), lo)
        ip6 = socket.inet_pton(INET6, "ff02::fb") + struct.pack("=I", lo)
        every = struct.pack("=4s4sI", socket.inet_aton("224.0.0.1"), bytes(4), lo)
        for number, family in ((10, INET), (11, INET6), (12, INET6), (13, INET), (14, INET), (15, INET6)):
            keep(put(number, socket.socket(family, DGRAM)))
        for number, level, option, group in (
            (10, SOL_IP, socket.IP_ADD_MEMBERSHIP, ip4),
            (11, SOL_IP, socket.IP_ADD_MEMBERSHIP, ip4),
            (12, socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, ip6),
            (13, SOL_IP, socket.IP_ADD_MEMBERSHIP, every),
        ):
            with socket.socket(fileno=os.dup(number)) as sock:
                sock.setsockopt(level, option, group)

    leave = "let the program leave it (close the socket) before the move and join it again after it"
    assert obstacle_words(body) == [
        f"fd 10: has joined the multicast group 239.1.2.3 on interface lo; {leave}",
        f"fd 11: has joined the multicast group 239.1.2.3 on interface lo; {leave}",
        f"fd 12: has joined the multicast group ff02::fb on interface lo; {leave}",
        f"fd 13: has joined the multicast group 224.0.0.1 on interface lo; {leave}",
    ]


def test_sockets_of_two_networks() -> None:
    def body() -> None:
        one = put(10, socket.socket(INET, STREAM))
        syscall(SYS_UNSHARE, CLONE_NEWNET)
        keep(one, put(11, socket.socket(INET, STREAM)))

    (found,) = obstacle_words(body)
    assert found.startswith("fd 11: is in another network namespace than the tree's other sockets; start the")


def test_an_address_in_use_and_one_that_is_not_here() -> None:
    def body() -> None:
        keep(_listener(INET, 5000, 10))

    with dumped(body) as checkpoint:
        in_use = pytest.raises(RestoreError, match="is in use on this host")
        with _outside(), in_use as caught, made_sockets(checkpoint):
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
