"""TCP connections that stay on their host: within the tree and to outside of it, in every state."""

from __future__ import annotations

import errno
import os
import signal
import socket
import struct

import pytest

from lazyproc.dump.descriptors import early_flows, explain_descriptors, gather_descriptors
from lazyproc.kernel import tcp
from lazyproc.kernel.sockopt import (
    SOL_SOCKET,
    SOL_TCP,
    TCP_CLOSE,
    TCP_CLOSE_WAIT,
    TCP_CLOSING,
    TCP_FIN_WAIT2,
    TCP_LAST_ACK,
)
from lazyproc.restore.sockets import flows_to_hold
from tests.live.descriptors import stopped
from tests.live.inet import (
    BOTH,
    DGRAM,
    INET,
    INET6,
    STREAM,
    Family,
    connected,
    listening,
    outside,
    read_all,
    told_of,
)
from tests.live.sockets import (
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

pytestmark = pytest.mark.usefixtures("network")
MAX_TCP_WINDOW = 32767


# --- within the tree ------------------------------------------------------------------------------------


@BOTH
def test_a_connection_within_the_tree(family: Family, network: Network) -> None:
    def body() -> None:
        listener = listening(family, 5000, 10)
        client = connected(family, 5000, 11)
        server = put(12, listener.accept()[0])
        client.send(b"to the server")
        server.send(b"to the client")
        server.recv(3)
        keep(listener, client, server)

    with remade(body) as socks:
        assert read_all(socks[12], 10) == b"the server"
        assert read_all(socks[11], 13) == b"to the client"
        assert socks[12].getpeername() == socks[11].getsockname()
        socks[11].send(b"on")
        assert read_all(socks[12], 2) == b"on"
        socks[11].shutdown(socket.SHUT_WR)
        assert read_all(socks[12], 1) == b""
    assert network.resets_sent() == 0


@pytest.mark.parametrize(("address", "early"), [("127.0.0.1", []), ("0.0.0.0", [(5001, None)])])
def test_who_accepts_from_the_tree_itself_is_not_held_back_before_the_freeze(
    address: str, early: list[tuple[int, None]]
) -> None:
    """The packets of its connections have its port, too: dropped while the tree still runs, one is waited for (RTO). On
    a loopback address nobody else may ever come.
    """

    def body() -> None:
        within = listening(INET, 5000, 10, address)
        client = put(11, socket.create_connection(("127.0.0.1", 5000)))
        accepted, _ = within.accept()
        keep(within, client, put(12, accepted), listening(INET, 5001, 13, address))

    with stopped(body) as tasks:
        assert [(flow.local[1], flow.remote) for flow in early_flows(tasks)] == early


def test_who_waits_to_be_accepted_by_the_tree_is_not_held_back_before_the_freeze() -> None:
    def body() -> None:
        keep(listening(INET, 5000, 10, "0.0.0.0"), connected(INET, 5000, 11))

    with stopped(body) as tasks:
        assert early_flows(tasks) == []


def test_a_v4_connection_of_a_v6_socket(network: Network) -> None:
    def body() -> None:
        listener = listening(INET6, 5000, 10, "::")
        client = connected(INET, 5000, 11)
        server = put(12, listener.accept()[0])
        client.send(b"mapped")
        keep(listener, client, server)

    with remade(body) as socks:
        assert read_all(socks[12], 6) == b"mapped"
        assert socks[12].getsockname()[0] == "::ffff:127.0.0.1"
        socks[12].send(b"back")
        assert read_all(socks[11], 4) == b"back"
    assert network.resets_sent() == 0


def test_a_connection_of_the_tree_that_nobody_has_accepted() -> None:
    def body() -> None:
        keep(listening(INET, 5000, 10), connected(INET, 5000, 11))

    with dumped(body) as checkpoint, made_sockets(checkpoint) as socks:
        assert flows_to_hold(checkpoint) == [], "it is made by a handshake within the host"
        socks[11].send(b"finally")
        server, address = socks[10].accept()
        with server:
            assert address == socks[11].getsockname()
            assert read_all(server, 7) == b"finally"


def test_what_was_sent_to_who_has_not_accepted_yet_and_has_not_arrived() -> None:
    """As a request that was sent while packets were held back already."""

    def body() -> None:
        listener, client = listening(INET, 5000, 10), connected(INET, 5000, 11)
        ip("link set lo down")
        client.sendall(b"request" * 10_000)
        client.shutdown(socket.SHUT_WR)
        keep(listener, client)

    with dumped(body) as checkpoint:
        ip("link set lo up")
        with made_sockets(checkpoint) as socks:
            server, _ = socks[10].accept()
            with server:
                assert read_all(server, 70_000) == b"request" * 10_000
                assert server.recv(1) == b""


def test_an_answer_of_who_has_closed_the_connection_is_read() -> None:
    """As with HTTP: a connection a request. Who listens does not see it a second time."""

    def body() -> None:
        listener, client = listening(INET, 5000, 10), connected(INET, 5000, 11)
        server, _ = listener.accept()
        with server:
            server.sendall(b"response")
        assert eventually(lambda: tcp.info(client).state == TCP_CLOSE_WAIT)
        keep(listener, client)

    with remade(body) as socks:
        assert socks[11].recv(99) == b"response"
        assert socks[11].recv(99) == b""
        assert tcp.info(socks[10]).pending == 0


def test_a_connection_to_another_host_on_a_port_where_the_tree_listens(network: Network) -> None:
    """As a proxy has them. It is not taken for one to the tree itself, that nobody has accepted."""
    ip("address add 10.9.9.1/32 dev lo")
    with socket.socket(INET, STREAM) as elsewhere:
        elsewhere.setsockopt(SOL_SOCKET, socket.SO_REUSEPORT, 1)
        elsewhere.bind(("10.9.9.1", 5000))
        elsewhere.listen()

        def body() -> None:
            listener = put(10, socket.socket(INET, STREAM))
            listener.setsockopt(SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind(("0.0.0.0", 5000))
            listener.listen()
            client = put(11, socket.create_connection(("10.9.9.1", 5000), source_address=("127.0.0.1", 0)))
            keep(listener, client)

        with stopped(body) as tasks:
            peer, _ = elsewhere.accept()
            checkpoint = handed_over(tasks)
        with peer, made_sockets(checkpoint) as socks:
            peer.sendall(b"on")
            assert read_all(socks[11], 2) == b"on"
    assert network.resets_sent() == 0


# --- to outside -----------------------------------------------------------------------------------------


@BOTH
def test_a_connection_to_outside_with_data_sent_unsent_and_unread(family: Family, network: Network) -> None:
    """The peer reads nothing, so most of a megabyte cannot even be sent."""
    sent = os.urandom(1 << 20)
    from_outside = os.urandom(30_000)
    with outside(family, receive_buffer=20_000) as listener:

        def body() -> None:
            sock = connected(family, 5000, 10)
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
            assert read_all(socks[10], len(from_outside)) == from_outside
            assert read_all(peer, len(sent)) == sent
            peer.sendall(b"more")
            assert read_all(socks[10], 4) == b"more"
            socks[10].sendall(b"end")
            socks[10].shutdown(socket.SHUT_WR)
            assert read_all(peer, 9) == b"end"
    assert network.resets_sent() == 0


def test_a_rolled_back_dump_leaves_the_connection_as_it_was(network: Network) -> None:
    """Not one segment more, and the process goes on with its queues."""
    with outside() as listener:

        def body() -> None:
            sock = connected(INET, 5000, 10)
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
                assert read_all(peer, 27) == b"unread by the peer and more"


# --- ended, by whomever ---------------------------------------------------------------------------------


@BOTH
def test_closed_by_the_peer(family: Family, network: Network) -> None:
    """CLOSE_WAIT: what arrived before the end is read, then the end; the other direction still works."""
    with outside(family) as listener:

        def body() -> None:
            keep(connected(family, 5000, 10))

        with stopped(body) as tasks:
            peer, _ = listener.accept()
            peer.send(b"last words")
            peer.shutdown(socket.SHUT_WR)
            checkpoint = handed_over(tasks)
        with peer, made_sockets(checkpoint) as socks:
            assert tcp.info(socks[10]).state == TCP_CLOSE_WAIT
            assert read_all(socks[10], 99) == b"last words"
            socks[10].send(b"answer")
            assert read_all(peer, 6) == b"answer"
            socks[10].shutdown(socket.SHUT_WR)
            assert read_all(peer, 1) == b""
    assert network.resets_sent() == 0


@BOTH
def test_closed_by_the_tree(family: Family, network: Network) -> None:
    """FIN_WAIT2: the peer saw the end and may still send."""
    with outside(family) as listener:

        def body() -> None:
            sock = connected(family, 5000, 10)
            sock.send(b"last words")
            sock.shutdown(socket.SHUT_WR)
            assert eventually(lambda: tcp.info(sock).state == TCP_FIN_WAIT2)
            keep(sock)

        with stopped(body) as tasks:
            peer, _ = listener.accept()
            checkpoint = handed_over(tasks)
        with peer, made_sockets(checkpoint) as socks:
            assert read_all(peer, 99) == b"last words"
            peer.send(b"answer")
            assert read_all(socks[10], 6) == b"answer"
            assert tcp.info(socks[10]).state == TCP_FIN_WAIT2
            peer.shutdown(socket.SHUT_WR)
            assert read_all(socks[10], 1) == b""
    assert network.resets_sent() == 0


def test_the_end_waits_behind_data_that_was_not_sent(network: Network) -> None:
    """FIN_WAIT1 and, when the peer closed too, LAST_ACK: the FIN is still in the queue."""
    sent = os.urandom(1 << 20)
    with outside(receive_buffer=20_000) as listener:

        def body() -> None:
            sock = connected(INET, 5000, 10)
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
            assert read_all(peer, len(sent) + 1) == sent
            assert read_all(socks[10], 1) == b""
    assert network.resets_sent() == 0


def test_a_connection_that_has_ended_in_both_directions() -> None:
    """What was not read yet is read, then the end; the listener on the same port is none of its business."""

    def body() -> None:
        listener = listening(INET, 5000, 10)
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
    with outside(family) as listener:

        def body() -> None:
            cut_off, complete = connected(family, 5000, 10), connected(family, 5000, 11)
            os.close(900)  # see tests.live.descriptors: the chain is complete
            os.kill(os.getpid(), signal.SIGSTOP)
            told = told_of(cut_off), told_of(complete)
            os._exit(0 if told == ((errno.ECONNRESET, 0), (0, errno.EPIPE)) else 1)

        with stopped(body) as tasks:
            cut_off, complete = listener.accept()[0], listener.accept()[0]
            complete.shutdown(socket.SHUT_WR)
            for peer in (cut_off, complete):
                peer.setsockopt(SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
                peer.close()
            assert explain_descriptors(tasks) == []
            with made_sockets(handed_over(tasks)) as socks:
                assert told_of(socks[10]) == (errno.ECONNRESET, 0)
                assert told_of(socks[11]) == (0, errno.EPIPE)
            os.kill(tasks[0].pid, signal.SIGCONT)
            ended = os.waitid(os.P_PID, tasks[0].pid, os.WEXITED | os.WNOWAIT)
            assert ended is not None
            assert ended.si_status == 0


def test_what_a_connection_was_sent_in_is_no_setting_when_it_has_ended() -> None:
    """The accepted end: its segments were larger than TCP_MAXSEG can be set to, as those within a host are."""

    def body() -> None:
        with listening(INET, 5000, 20) as listener, socket.create_connection(("127.0.0.1", 5000)) as peer:
            sock = put(10, listener.accept()[0])
            peer.setsockopt(SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
        assert sock.getsockopt(SOL_TCP, socket.TCP_MAXSEG) > MAX_TCP_WINDOW
        keep(sock)

    with remade(body) as socks:
        assert told_of(socks[10]) == (errno.ECONNRESET, 0)


def test_a_connection_to_outside_ends_when_asked_for() -> None:
    with outside() as listener:

        def body() -> None:
            keep(connected(INET, 5000, 10))

        with stopped(body) as tasks:
            peer, _ = listener.accept()
            peer.send(b"arrived")
            checkpoint = handed_over(tasks, tcp_close=True)
        with peer, made_sockets(checkpoint) as socks:
            assert read_all(socks[10], 99) == b"arrived"
            with pytest.raises(BrokenPipeError):
                socks[10].send(b"x")


# --- what cannot be done --------------------------------------------------------------------------------


def test_a_connection_being_made_and_one_that_waits() -> None:
    with socket.socket(INET, STREAM) as client:

        def body() -> None:
            ip("route add 10.9.8.0/24 dev lo")
            connecting = put(10, socket.socket(INET, STREAM))
            connecting.setblocking(False)
            assert connecting.connect_ex(("10.9.8.7", 5000)) == errno.EINPROGRESS
            keep(connecting, listening(INET, 5000, 11))

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
        with listening(INET, 5000, 20) as listener:
            cut_off = connected(INET, 5000, 10)
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
    remedy = "let the program use the socket, which tells it, or close it first; or use --tcp-close"
    assert obstacle_words(body) == [f"fd {number}: {why}; {remedy}" for number in (10, 11)]
    with remade(body, tcp_close=True) as socks:
        assert socks[10].recv(99) == b"unread"
        assert [told_of(socks[number]) for number in (10, 11)] == [(0, 0)] * 2


def test_urgent_data_and_a_half_datagram() -> None:
    with outside() as listener:

        def body() -> None:
            corked = put(11, socket.socket(INET, DGRAM))
            corked.connect(("127.0.0.1", 5001))
            corked.send(b"first half", socket.MSG_MORE)
            keep(connected(INET, 5000, 10), corked)

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
