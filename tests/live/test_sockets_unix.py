"""Unix sockets: each kind with its name, its peer, what lies in its queue and who waits at it."""

from __future__ import annotations

import ctypes
import errno
import os
import select
import socket
import stat
import struct
from pathlib import Path

import pytest

from lazyproc.dump.descriptors import Gathered, explain_descriptors, gather_descriptors
from lazyproc.errors import Obstacle, RestoreError
from lazyproc.kernel.sockopt import SO_PASSCRED, SO_PEEK_OFF, SO_SNDBUFFORCE, disconnect
from lazyproc.model import Checkpoint, UnixSocket
from lazyproc.restore.names import acting_as
from tests.forked import in_child
from tests.live.descriptors import stopped
from tests.live.inet import told_of
from tests.live.sockets import dumped, keep, made_sockets, obstacle_words, put, remade

STREAM, DGRAM, SEQPACKET = socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET
Unix = socket.AF_UNIX


def _pair(kind: int, first: int = 10, second: int = 11) -> tuple[socket.socket, socket.socket]:
    one, other = socket.socketpair(Unix, kind)
    return put(first, one), put(second, other)


def _receive(sock: socket.socket, size: int = 1 << 20) -> tuple[bytes, list[int]]:
    """Data and descriptors of one message."""
    data, fds, _, _ = socket.recv_fds(sock, size, 16, socket.MSG_DONTWAIT)
    return data, fds


# --- queues
# ---------------------------------------------------------------------------------------------------


def test_a_stream_pair_keeps_both_queues() -> None:
    big = os.urandom(150_000)

    def body() -> None:
        one, other = _pair(STREAM)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        one.sendall(b"hello, ")
        one.sendall(big)
        other.sendall(b"answer")
        other.recv(3)
        keep(one, other)

    with remade(body) as socks:
        socks[11].settimeout(1)
        data = socks[11].recv(1 << 20, socket.MSG_WAITALL | socket.MSG_DONTWAIT)
        assert data == (b"hello, " + big)[3:]
        assert socks[10].recv(99) == b"answer"
        socks[10].send(b"more")
        assert socks[11].recv(99) == b"more"


@pytest.mark.parametrize("kind", [DGRAM, SEQPACKET])
def test_packets_keep_their_boundaries_the_empty_one_too(kind: int) -> None:
    packets = [b"a" * 70_000, b"", b"b", b"cd"]

    def body() -> None:
        one, other = _pair(kind)
        for packet in packets:
            one.send(packet)
        keep(one, other)

    with remade(body) as socks:
        assert [socks[11].recv(1 << 20, socket.MSG_DONTWAIT) for _ in packets] == packets
        with pytest.raises(BlockingIOError):
            socks[11].recv(1, socket.MSG_DONTWAIT)


@pytest.mark.parametrize("kind", [DGRAM, SEQPACKET])
def test_a_packet_that_is_larger_than_most(kind: int) -> None:
    """With a descriptor, between others, one of them empty."""
    large = bytes(range(250)) * 4000

    def body() -> None:
        one, other = _pair(kind)
        one.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 1 << 22)
        null = os.open("/dev/null", os.O_RDONLY)
        one.send(b"before")
        one.send(b"")
        socket.send_fds(one, [large], [null])
        one.send(b"after")
        os.close(null)
        keep(one, other)

    with remade(body) as socks:
        got = [_receive(socks[11]) for _ in range(4)]
        assert [data for data, _ in got] == [b"before", b"", large, b"after"]
        assert [len(fds) for _, fds in got] == [0, 0, 1, 0]
        os.close(got[2][1][0])


def test_dumping_consumes_nothing_and_leaves_no_option_behind() -> None:
    def body() -> None:
        one, other = _pair(STREAM)
        socket.send_fds(one, [b"data"], [1])
        keep(one, other)

    with stopped(body) as tasks:
        first, second = gather_descriptors(tasks), gather_descriptors(tasks)
        with first.sockets, second.sockets, first.registry.taken(tasks[0].pid, 11) as fd:
            assert first.files.keys() == second.files.keys()
            queues = [gathered.files[_file(gathered, 11)].resource for gathered in (first, second)]
            assert queues[0] == queues[1]
            sock = socket.socket(fileno=os.dup(fd))
            with sock:
                assert sock.getsockopt(socket.SOL_SOCKET, SO_PEEK_OFF) == -1
                assert sock.getsockopt(socket.SOL_SOCKET, SO_PASSCRED) == 0
                data, fds = _receive(sock)
                assert (data, len(fds)) == (b"data", 1)
                os.close(fds[0])


def test_a_reset_that_the_program_has_not_seen() -> None:
    """Behind all that is unread; whoever looks must not take it away."""

    def body() -> None:
        one, other = _pair(STREAM)
        one.send(b"not read by the other")
        other.send(b"unread")
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1000)
        other.close()
        keep(one)

    def tell(sock: socket.socket) -> None:
        assert sock.recv(6, socket.MSG_DONTWAIT) == b"unread"
        assert told_of(sock) == (errno.ECONNRESET, 0)
        assert told_of(sock) == (0, 0)

    with stopped(body) as tasks:
        first, second = gather_descriptors(tasks), gather_descriptors(tasks)
        with first.sockets, second.sockets, first.registry.taken(tasks[0].pid, 10) as fd:
            assert first.obstacles == second.obstacles == []
            with socket.socket(fileno=os.dup(fd)) as sock:
                tell(sock)
    with remade(body) as socks:
        tell(socks[10])


def test_packets_behind_an_error() -> None:
    """A peek would take the error first, also from the program."""

    def body() -> None:
        one, other = _pair(SEQPACKET)
        one.send(b"not read by the other")
        other.send(b"unread")
        other.close()
        keep(one)

    assert [each.split("; ")[0] for each in obstacle_words(body)] == [
        "fd 10: has an error for the program, and may hold packets behind it, which cannot be seen without taking it"
    ]


def _file(gathered: Gathered, fd: int) -> int:
    (rows,) = gathered.descriptors.values()
    return next(row.file_id for row in rows if row.fd == fd)


def test_descriptors_travel_with_the_bytes_they_were_sent_with(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")

    def body() -> None:
        one, other = _pair(STREAM)
        file = os.open(path, os.O_RDONLY)
        os.dup2(file, 20)
        reading, writing = os.pipe()
        os.write(writing, b"in the pipe")
        one.send(b"plain")
        socket.send_fds(one, [b"with two"], [20, reading])
        one.send(b"plain again")
        socket.send_fds(one, [b"with one"], [20])
        os.lseek(20, 3, os.SEEK_SET)
        os.close(reading)
        keep(one, other)

    with remade(body) as socks:
        # A read stops after a message with descriptors; it may begin before it, as on every Linux.
        assert _receive(socks[11], 5) == (b"plain", [])
        data, (file, reading) = _receive(socks[11])
        assert data == b"with two"
        assert os.read(reading, 99) == b"in the pipe"
        assert _receive(socks[11], 11) == (b"plain again", [])
        data, (again,) = _receive(socks[11])
        assert data == b"with one"
        assert os.read(file, 4) == b"tent", "the position is shared with descriptor 20"
        assert os.read(again, 4) == b""
        for fd in (file, reading, again):
            os.close(fd)


def test_a_socket_in_a_queue_has_its_own_queue() -> None:
    def body() -> None:
        one, other = _pair(STREAM)
        inner, outer = socket.socketpair(Unix, DGRAM)
        outer.send(b"deep")
        socket.send_fds(one, [b"x"], [inner.fileno()])
        put(12, outer).detach()
        inner.close()
        keep(one, other)

    with remade(body) as socks:
        _, (fd,) = _receive(socks[11])
        with socket.socket(fileno=fd) as inner:
            assert inner.recv(99) == b"deep"
            inner.send(b"back")
            assert socks[12].recv(99) == b"back"


def test_recorded_credentials_stay_and_others_stay_unrecorded() -> None:
    def body() -> None:
        one, other = _pair(SEQPACKET)
        one.send(b"before")
        other.setsockopt(socket.SOL_SOCKET, SO_PASSCRED, 1)
        ucred = struct.pack("3i", os.getpid(), 1234, 99)
        one.sendmsg([b"after"], [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, ucred)])
        keep(one, other)

    with remade(body) as socks:
        assert socks[11].getsockopt(socket.SOL_SOCKET, SO_PASSCRED) == 1
        found = []
        for _ in range(2):
            data, rows, _, _ = socks[11].recvmsg(99, 99)
            found.append((data, struct.unpack("3i", rows[0][2])))
        assert found == [(b"before", (0, 65534, 65534)), (b"after", (os.getpid(), 1234, 99))]


# --- states
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("how", "reads", "writes"), [(socket.SHUT_RD, 0, 1), (socket.SHUT_WR, 1, 0)])
def test_half_shutdown(how: int, reads: int, writes: int) -> None:
    def body() -> None:
        one, other = _pair(STREAM)
        other.send(b"q")
        one.shutdown(how)
        keep(one, other)

    with remade(body) as socks:
        assert socks[10].recv(9) == b"q"
        if not writes:
            with pytest.raises(BrokenPipeError):
                socks[10].send(b"x")
            assert socks[11].recv(9) == b""
        if not reads:
            assert socks[10].recv(9) == b""
            with pytest.raises(BrokenPipeError):
                socks[11].send(b"x")


@pytest.mark.parametrize("kind", [STREAM, SEQPACKET])
def test_the_peer_is_gone_and_its_last_words_stay(kind: int) -> None:
    def body() -> None:
        one, other = _pair(kind)
        other.send(b"last words")
        other.close()
        keep(one)

    with remade(body) as socks:
        assert socks[10].recv(99) == b"last words"
        assert socks[10].recv(99) == b""
        with pytest.raises(BrokenPipeError):
            socks[10].send(b"x")


def test_a_datagram_peer_is_gone() -> None:
    def body() -> None:
        one, other = _pair(DGRAM)
        other.send(b"last words")
        other.close()
        keep(one)

    with remade(body) as socks:
        assert socks[10].recv(99) == b"last words"
        with pytest.raises(ConnectionRefusedError):
            socks[10].send(b"x")


def test_options_come_back() -> None:
    def body() -> None:
        one, other = _pair(STREAM)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("qq", 7, 500_000))
        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 50_000)
        one.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, 2)
        one.setblocking(False)
        other.send(b"abcdef")
        keep(one, other)

    with remade(body) as socks:
        one = socks[10]
        assert struct.unpack("qq", one.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 16)) == (7, 500_000)
        assert one.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 100_000
        assert not os.get_blocking(one.fileno())
        assert one.recv(99, socket.MSG_PEEK) == b"cdef"


# --- names
# ----------------------------------------------------------------------------------------------------


def test_a_listening_socket_file_keeps_mode_owner_and_backlog(tmp_path: Path) -> None:
    path = tmp_path / "listen"

    def body() -> None:
        sock = put(10, socket.socket(Unix, STREAM))
        sock.bind(str(path))
        os.chmod(path, 0o640)
        os.chown(path, 1, 2)
        sock.listen(3)
        keep(sock)

    with dumped(body) as checkpoint:
        unix = checkpoint.files[_row(checkpoint, 10)].resource
        assert isinstance(unix, UnixSocket)
        assert unix.backlog == 3
        with made_sockets(checkpoint) as socks:
            status = path.stat()
            assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o640, 1, 2)
            assert socks[10].getsockname() == str(path)
            with socket.socket(Unix, STREAM) as client:
                client.connect(str(path))
                socks[10].accept()[0].close()
    assert list(tmp_path.iterdir()) == [path]


def _row(checkpoint: Checkpoint, fd: int) -> int:
    return next(row.file_id for row in checkpoint.root.descriptors if row.fd == fd)


def test_a_relative_name_stays_relative_and_its_file_stays_where_it_is(tmp_path: Path) -> None:
    def body() -> None:
        os.chdir(tmp_path)
        sock = put(10, socket.socket(Unix, DGRAM))
        sock.bind("here.sock")
        os.chdir("/")
        keep(sock)

    with remade(body) as socks:
        assert socks[10].getsockname() == "here.sock"
        with socket.socket(Unix, DGRAM) as client:
            client.sendto(b"hi", str(tmp_path / "here.sock"))
        assert socks[10].recv(9) == b"hi"


def test_a_renamed_socket_file(tmp_path: Path) -> None:
    def body() -> None:
        sock = put(10, socket.socket(Unix, DGRAM))
        sock.bind(str(tmp_path / "new"))
        os.rename(tmp_path / "new", tmp_path / "ready")
        keep(sock)

    with remade(body) as socks:
        assert socks[10].getsockname() == str(tmp_path / "new")
        assert [path.name for path in tmp_path.iterdir()] == ["ready"]
        with socket.socket(Unix, DGRAM) as client:
            client.sendto(b"hi", str(tmp_path / "ready"))
        assert socks[10].recv(9) == b"hi"


def test_an_unlinked_name_leaves_no_file_and_disturbs_none(tmp_path: Path) -> None:
    path = tmp_path / "sock"

    def body() -> None:
        sock = put(10, socket.socket(Unix, DGRAM))
        sock.bind(str(path))
        path.unlink()
        path.write_text("somebody else's")
        keep(sock)

    with remade(body) as socks:
        assert socks[10].getsockname() == str(path)
        assert path.read_text() == "somebody else's"


def test_an_accepted_connection_shows_its_listeners_name_though_that_is_gone(tmp_path: Path) -> None:
    def body() -> None:
        listener = socket.socket(Unix, STREAM)
        listener.bind(str(tmp_path / "gone"))
        listener.listen()
        client = put(10, socket.socket(Unix, STREAM))
        client.bind("\0client of the test")
        client.connect(str(tmp_path / "gone"))
        server = put(11, listener.accept()[0])
        listener.close()
        (tmp_path / "gone").unlink()
        server.send(b"welcome")
        keep(client, server)

    with remade(body) as socks:
        assert socks[10].getpeername() == socks[11].getsockname() == str(tmp_path / "gone")
        assert socks[11].getpeername() == socks[10].getsockname() == b"\0client of the test"
        assert socks[10].recv(99) == b"welcome"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [STREAM, SEQPACKET])
def test_abstract_listener_with_accepted_and_waiting_connections(kind: int) -> None:
    def body() -> None:
        listener = put(10, socket.socket(Unix, kind))
        listener.bind("\0listener of the test")
        listener.listen(2)
        clients = []
        for number in (11, 12, 13):
            client = put(number, socket.socket(Unix, kind))
            client.connect("\0listener of the test")
            clients.append(client)
            if number == 11:
                put(20, listener.accept()[0]).detach()
        keep(listener, *clients)

    with remade(body) as socks:
        socks[11].send(b"one")
        assert socks[20].recv(9) == b"one"
        socks[12].send(b"two")
        socks[13].send(b"three")
        for expected in (b"two", b"three"):
            server, _ = socks[10].accept()
            with server:
                assert server.recv(9) == expected
                assert server.getsockname() == b"\0listener of the test"
        assert select.select([socks[10]], [], [], 0) == ([], [], [])


def test_named_datagram_senders_are_named_again(tmp_path: Path) -> None:
    def body() -> None:
        receiver = put(10, socket.socket(Unix, DGRAM))
        receiver.bind(str(tmp_path / "receiver"))
        inside = put(11, socket.socket(Unix, DGRAM))
        inside.bind("\0sender inside")
        inside.connect(str(tmp_path / "receiver"))
        with socket.socket(Unix, DGRAM) as gone, socket.socket(Unix, DGRAM) as unnamed:
            gone.bind(str(tmp_path / "gone"))
            (tmp_path / "gone").unlink()
            for sender in (gone, inside, unnamed):
                sender.sendto(b"x", str(tmp_path / "receiver"))
        keep(receiver, inside)

    with remade(body) as socks:
        senders = [socks[10].recvfrom(9)[1] for _ in range(3)]
        assert senders == [str(tmp_path / "gone"), b"\0sender inside", None]
        socks[11].send(b"connected")
        assert socks[10].recv(99) == b"connected"
    assert [path.name for path in tmp_path.iterdir()] == ["receiver"]


def test_a_disconnected_half_of_a_datagram_pair() -> None:
    def body() -> None:
        one, other = _pair(DGRAM)
        disconnect(other)
        one.send(b"still arrives")
        keep(one, other)

    with remade(body) as socks:
        assert socks[11].recv(99) == b"still arrives"
        socks[10].send(b"again")
        assert socks[11].recv(99) == b"again"
        with pytest.raises(OSError, match="not connected"):
            socks[11].send(b"x")


def test_peer_credentials_show_the_user_again() -> None:
    def body() -> None:
        os.setegid(1235)
        os.seteuid(1234)
        one, other = socket.socketpair(Unix, STREAM)
        os.seteuid(0)
        os.setegid(0)
        keep(put(10, one), put(11, other))

    with remade(body) as socks:
        for number in (10, 11):
            raw = socks[number].getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            assert struct.unpack("3i", raw)[1:] == (1234, 1235)
    assert (os.geteuid(), os.getegid()) == (0, 0)


# --- what cannot be done
# --------------------------------------------------------------------------------------


def test_connected_to_outside(tmp_path: Path) -> None:
    path = str(tmp_path / "log")
    with socket.socket(Unix, DGRAM) as outside, socket.socket(Unix, STREAM) as listener:
        outside.bind(path)
        listener.bind("\0outside of the test")
        listener.listen()

        def body() -> None:
            sock = put(10, socket.socket(Unix, DGRAM))
            sock.connect(path)
            waiting = put(11, socket.socket(Unix, STREAM))
            waiting.connect("\0outside of the test")
            keep(sock, waiting)

        found = obstacle_words(body)
    assert found == [
        f"fd 10: is connected to socket {path} outside of the process tree; "
        "move both ends in one tree, or close it before the move and connect again after it",
        "fd 11: waits to be accepted by socket @outside of the test outside of the process tree; "
        "try again in a moment, or let the program accept it first",
    ]


def test_data_sent_to_nobody_yet_and_a_strangers_connection() -> None:
    def body() -> None:
        listener = put(10, socket.socket(Unix, STREAM))
        listener.bind("\0busy listener")
        listener.listen()
        client = put(11, socket.socket(Unix, STREAM))
        client.connect("\0busy listener")
        client.send(b"lost?")
        with socket.socket(Unix, STREAM) as gone:
            gone.connect("\0busy listener")
        keep(listener, client)

    first, second = obstacle_words(body)
    assert first.startswith("fd 10: holds a connection that was closed before it was accepted; try again")
    assert second.startswith(
        "fd 11: has sent data that waits until socket @busy listener accepts the connection"
    )


def test_urgent_data() -> None:
    def body() -> None:
        one, other = _pair(STREAM)
        one.send(b"!", socket.MSG_OOB)
        keep(one, other)

    assert obstacle_words(body) == ["fd 11: holds urgent (MSG_OOB) data; let the program read it first"]


def test_another_file_or_a_live_socket_in_the_place(tmp_path: Path) -> None:
    path = tmp_path / "taken"

    def body() -> None:
        sock = put(10, socket.socket(Unix, STREAM))
        sock.bind(str(path))
        keep(sock)

    with dumped(body) as checkpoint:
        path.unlink()
        path.write_text("precious")
        no_socket = pytest.raises(RestoreError, match="a file that is no socket is in the place")
        with no_socket as caught, made_sockets(checkpoint):
            pass
        assert caught.value.where == str(path)
        assert path.read_text() == "precious"
        path.unlink()
        with socket.socket(Unix, STREAM) as other:
            other.bind(str(path))
            with (
                pytest.raises(RestoreError, match="another socket is in the place"),
                made_sockets(checkpoint),
            ):
                pass
        path.unlink()
        tmp_path.rename(tmp_path.with_name("moved"))
        missing = pytest.raises(RestoreError, match=r"directory .*: is not on this host")
        with missing, made_sockets(checkpoint):
            pass


def test_an_abstract_name_that_is_taken() -> None:
    def body() -> None:
        sock = put(10, socket.socket(Unix, DGRAM))
        sock.bind("\0taken name")
        keep(sock)

    taken = pytest.raises(RestoreError, match="unix socket @taken name: cannot be made again")
    with dumped(body) as checkpoint, socket.socket(Unix, DGRAM) as other:
        other.bind("\0taken name")
        with taken, made_sockets(checkpoint):
            pass


def test_a_user_connects_to_roots_socket_file(tmp_path: Path) -> None:
    """SO_PEERCRED shows the user, though the user could not open the file now."""

    def body() -> None:
        listener = put(10, socket.socket(Unix, STREAM))
        listener.bind(str(tmp_path / "listen"))
        listener.listen()
        client = put(11, socket.socket(Unix, STREAM))
        os.chmod(tmp_path / "listen", 0o777)
        with acting_as((0, 1234, 1235)):
            client.connect(str(tmp_path / "listen"))
        os.chmod(tmp_path / "listen", 0o600)
        keep(listener, client, put(12, listener.accept()[0]))

    with remade(body) as socks:
        found = [socks[n].getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[4:] for n in (11, 12)]
        assert found == [struct.pack("2i", 0, 0), struct.pack("2i", 1234, 1235)]


def test_nobody_but_root_may_look_for_socket_files(tmp_path: Path) -> None:
    def body() -> None:
        sock = put(10, socket.socket(Unix, DGRAM))
        sock.bind(str(tmp_path / "sock"))
        keep(sock)

    with stopped(body) as tasks:

        def unprivileged() -> list[Obstacle]:
            _drop_net_admin()
            return explain_descriptors(tasks)

        (found,) = in_child(unprivileged)
    assert "fd 10: is a socket that only root may look into" in str(found)


def _drop_net_admin() -> None:
    """Effective capabilities without CAP_NET_ADMIN (bit 12)."""
    header = ctypes.create_string_buffer(struct.pack("=Ii", 0x20080522, 0))
    data = ctypes.create_string_buffer(24)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.capget(header, data) == 0
    low = struct.unpack_from("=I", data)[0] & ~(1 << 12)
    struct.pack_into("=I", data, 0, low)
    assert libc.capset(header, data) == 0
