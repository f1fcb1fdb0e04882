"""A connection held through the move of its address: client, source and destination in one Ethernet.

The client never moves and never notices: no RST, no FIN, no byte lost or doubled in either direction.
"""

from __future__ import annotations

import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pytest

from lazyproc.dump.descriptors import gather_descriptors
from lazyproc.dump.tcp import silence
from lazyproc.errors import PermissionDenied
from lazyproc.kernel.netfilter import Flow, Hold, held, leftovers, release_session
from lazyproc.migrate.address import announce
from lazyproc.model import Checkpoint
from lazyproc.restore.sockets import flows_to_hold, make_sockets
from tests.forked import become_nobody, in_child
from tests.live.descriptors import checkpoint_of, stopped
from tests.live.sockets import Network, eventually, ip, keep, put

PORT = 5000


@dataclass(frozen=True)
class Ethernet:
    """`client` holds the bridge; `source` has the address that moves."""

    client: Network
    source: Network
    target: Network
    family: socket.AddressFamily
    client_address: str
    moving: str

    @property
    def networks(self) -> tuple[Network, Network, Network]:
        return self.client, self.source, self.target

    def give(self, network: Network, verb: str) -> None:
        """Add or delete the moving address."""
        length, extra = (24, "") if self.family == socket.AF_INET else (64, " nodad" if verb == "add" else "")
        with network.inside():
            ip(f"address {verb} {self.moving}/{length} dev eth0{extra}")


@pytest.fixture(params=[socket.AF_INET, socket.AF_INET6])
def ethernet(request: pytest.FixtureRequest) -> Iterator[Ethernet]:
    with ExitStack() as stack:
        client, source, target = (Network(stack) for _ in range(3))
        six = request.param == socket.AF_INET6
        addresses = (
            ["fd00::1/64", "fd00::2/64", "fd00::3/64"]
            if six
            else ["10.9.0.1/24", "10.9.0.2/24", "10.9.0.3/24"]
        )
        with client.inside():
            ip("link add br0 type bridge forward_delay 0")
            for end, network in (("source", source), ("target", target)):
                ip(f"link add {end} type veth peer name eth0 netns {network.path}")
                ip(f"link set {end} master br0 up")
            ip(f"address add {addresses[0]} dev br0" + " nodad" * six)
            ip("link set br0 up")
        for network, address in ((source, addresses[1]), (target, addresses[2])):
            with network.inside():
                ip(f"address add {address} dev eth0" + " nodad" * six)
                ip("link set eth0 up")
        moving = "fd00::77" if six else "10.9.0.77"
        found = Ethernet(client, source, target, request.param, addresses[0].partition("/")[0], moving)
        found.give(source, "add")
        yield found


def _program(net: Ethernet, upstream: bytes) -> None:
    """Connects to the client, leaves some of its data unread and more of its own unsent."""
    sock = put(10, socket.socket(net.family, socket.SOCK_STREAM))
    sock.bind((net.moving, 0))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 21)
    sock.connect((net.client_address, PORT))
    sock.sendall(upstream)
    keep(sock)


def test_a_connection_moves_with_its_address(ethernet: Ethernet) -> None:
    upstream, downstream = os.urandom(1 << 20), os.urandom(50_000)
    late, later = os.urandom(20_000), os.urandom(5_000)
    with ExitStack() as stack:
        with ethernet.client.inside():
            listener = stack.enter_context(socket.socket(ethernet.family, socket.SOCK_STREAM))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 20_000)
            listener.bind((ethernet.client_address, PORT))
            listener.listen()
        with ethernet.source.inside():
            tasks = stack.enter_context(stopped(lambda: _program(ethernet, upstream)))
        peer = stack.enter_context(listener.accept()[0])
        peer.sendall(downstream)
        at_source, at_target = (stack.enter_context(Hold(name)) for name in ("move_source", "move_target"))
        with ethernet.source.inside():
            gathered = gather_descriptors(tasks, hold=at_source.add)
        assert not gathered.obstacles
        checkpoint = checkpoint_of(gathered)
        peer.sendall(late)  # held back at the source
        with gathered.sockets:
            silence(gathered.sockets.connections())
        with ethernet.target.inside():
            at_target.add(flows_to_hold(checkpoint))
        ethernet.give(ethernet.target, "add")
        ethernet.give(ethernet.source, "del")
        with ethernet.target.inside():
            announce("eth0", socket.inet_pton(ethernet.family, ethernet.moving))
            peer.sendall(later)  # reaches the destination before the connection does
            assert eventually(lambda: _held_back("lazyproc_move_target") > 0)
        _run_at_target(ethernet, checkpoint, at_target, peer, upstream, downstream + late + later)
        with ethernet.source.inside():
            assert leftovers() == ["lazyproc_move_source"]
            at_source.release()
            assert leftovers() == []
    assert [network.resets_sent() for network in ethernet.networks] == [0, 0, 0]


def _run_at_target(
    ethernet: Ethernet,
    checkpoint: Checkpoint,
    hold: Hold,
    peer: socket.socket,
    upstream: bytes,
    downstream: bytes,
) -> None:
    files: dict[int, int] = {}
    with ethernet.target.inside(), make_sockets(checkpoint, files) as sockets:
        sockets.fill_queues(files, {})
        hold.release()
        sockets.leave_repair()
        number = next(row.file_id for row in checkpoint.root.descriptors if row.fd == 10)
        with socket.socket(fileno=os.dup(files[number])) as sock:
            received = _in_background(peer, len(upstream))
            assert _read(sock, len(downstream)) == downstream
            assert received() == upstream
            sock.sendall(b"on it goes")
            assert _read(peer, 10) == b"on it goes"
            sock.shutdown(socket.SHUT_WR)
            assert _read(peer, 1) == b""


def _held_back(table: str) -> int:
    """How many packets a table has dropped."""
    return sum(int(count) for count in re.findall(r"counter packets (\d+) bytes \d+ drop", _listing(table)))


def _listing(table: str) -> str:
    """As nft(8) understands what we have told the kernel."""
    argv = ["nft", "list", "table", "inet", table]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


def _in_background(sock: socket.socket, length: int) -> Callable[[], bytes]:
    found: list[bytes] = []
    thread = threading.Thread(target=lambda: found.append(_read(sock, length)))
    thread.start()

    def result() -> bytes:
        thread.join()
        return found[0]

    return result


def _read(sock: socket.socket, length: int) -> bytes:
    sock.settimeout(10)
    data = bytearray()
    while len(data) < length and (piece := sock.recv(length - len(data))):
        data += piece
    return bytes(data)


def test_a_rolled_back_move_goes_on_at_the_source(ethernet: Ethernet) -> None:
    """What was made at the destination is closed again, still in repair mode: nobody hears of it."""
    with ExitStack() as stack:
        with ethernet.client.inside():
            listener = stack.enter_context(
                socket.create_server((ethernet.client_address, PORT), family=ethernet.family)
            )
        with ethernet.source.inside():
            tasks = stack.enter_context(stopped(lambda: _program(ethernet, b"upstream")))
            peer = stack.enter_context(listener.accept()[0])
            with held(
                "move_source",
                [Flow(socket.IPPROTO_TCP, (socket.inet_pton(ethernet.family, ethernet.moving), 1), None)],
            ):
                gathered = gather_descriptors(tasks)
            checkpoint = checkpoint_of(gathered)
        ethernet.give(ethernet.target, "add")
        flows = flows_to_hold(checkpoint)
        with ethernet.target.inside(), held("move_target", flows), make_sockets(checkpoint, {}):
            pass
        ethernet.give(ethernet.target, "del")
        with ethernet.source.inside():
            announce("eth0", socket.inet_pton(ethernet.family, ethernet.moving))
        with gathered.sockets:
            (sock,) = gathered.sockets.connections()
            peer.sendall(b"downstream")
            assert _read(peer, 8) == b"upstream"
            assert _read(sock, 10) == b"downstream"
            sock.sendall(b"on")
            assert _read(peer, 2) == b"on"
    assert ethernet.target.resets_sent() == 0


def test_holding_stops_exactly_the_flow_and_nothing_else(ethernet: Ethernet) -> None:
    local = socket.inet_pton(ethernet.family, ethernet.moving)
    with ethernet.source.inside():
        receivers = [socket.socket(ethernet.family, socket.SOCK_DGRAM) for _ in range(2)]
        for number, receiver in enumerate(receivers):
            receiver.bind((ethernet.moving, PORT + number))
    with ethernet.client.inside():
        sender = socket.socket(ethernet.family, socket.SOCK_DGRAM)
    with ExitStack() as stack:
        for sock in (*receivers, sender):
            stack.enter_context(sock)
        with ethernet.source.inside(), held("some", [Flow(socket.IPPROTO_UDP, (local, PORT), None)]) as table:
            assert leftovers() == [table] == ["lazyproc_some"]
            for port in (PORT, PORT + 1):
                sender.sendto(b"x", (ethernet.moving, port))
            assert _read(receivers[1], 1) == b"x"
        assert leftovers() == []
        with pytest.raises(BlockingIOError):
            receivers[0].recv(9, socket.MSG_DONTWAIT)
        sender.sendto(b"y", (ethernet.moving, PORT))
        assert _read(receivers[0], 1) == b"y"


def _flows(ethernet: Ethernet, ports: Sequence[int]) -> list[Flow]:
    local = socket.inet_pton(ethernet.family, ethernet.moving)
    return [Flow(socket.IPPROTO_UDP, (local, port), None) for port in ports]


def test_flows_that_come_later_are_held_back_with_the_first(ethernet: Ethernet) -> None:
    remote = socket.inet_pton(ethernet.family, ethernet.client_address), 4000
    (first,) = _flows(ethernet, [PORT])
    with Hold("grows") as hold:
        with ethernet.source.inside():
            hold.add([first])
            hold.add([first, Flow(socket.IPPROTO_TCP, first.local, remote)])
            word = "ip6" if ethernet.family == socket.AF_INET6 else "ip"
            listed = _listing("lazyproc_grows")
        for ours, theirs in ("ds", "sd"):
            udp = f"{word} {ours}addr {ethernet.moving} udp {ours}port {PORT}"
            ends = f"{word} {theirs}addr . tcp {theirs}port . {word} {ours}addr . tcp {ours}port"
            tcp = f"{ends} @connections_6_{len(first.local[0])}"
            assert listed.count(f"{udp} counter packets 0 bytes 0 drop\n") == 1
            assert listed.count(f"{tcp} counter packets 0 bytes 0 drop\n") == 1
        assert f"elements = {{ {ethernet.client_address} . 4000 . {ethernet.moving} . {PORT} }}" in listed
        assert listed.count("drop\n") == 4
        with ethernet.source.inside():
            hold.release()
            assert leftovers() == []
            hold.release()  # nothing is left to do


def test_what_is_held_back_ends_with_whoever_holds_it_unless_it_is_kept(ethernet: Ethernet) -> None:
    for keep_it in (False, True):
        with ethernet.source.inside(), _holder(_flows(ethernet, [PORT]), keep=keep_it) as holder:
            assert "lazyproc_killed" in leftovers()
            holder.send_signal(signal.SIGKILL)
            holder.wait()
            assert leftovers() == (["lazyproc_killed_kept"] if keep_it else [])
            if keep_it:
                assert f"udp dport {PORT} counter packets 0 bytes 0 drop" in _listing("lazyproc_killed_kept")
                release_session("killed")
                assert leftovers() == []
            release_session("killed")


def test_what_is_kept_is_let_through_by_whoever_kept_it_or_stays(ethernet: Ethernet) -> None:
    with ethernet.source.inside():
        with Hold("once") as hold:
            hold.add(_flows(ethernet, [PORT]))
            hold.keep()
            assert sorted(leftovers()) == ["lazyproc_once", "lazyproc_once_kept"]
        assert leftovers() == []
        with Hold("once") as hold:
            hold.add(_flows(ethernet, [PORT]))
            hold.keep()
            hold.forget()
        assert leftovers() == ["lazyproc_once_kept"]
        release_session("once")
        assert leftovers() == []


@contextmanager
def _holder(flows: list[Flow], *, keep: bool) -> Iterator[subprocess.Popen[bytes]]:
    """A process that holds these back, in the network namespace of the calling thread."""
    program = (
        "import pickle, sys; from lazyproc.kernel.netfilter import Hold; hold = Hold('killed');"
        "hold.add(pickle.loads(bytes.fromhex(sys.argv[1])));"
        f"hold.keep() if {keep} else None; print(); sys.stdout.flush(); sys.stdin.read()"
    )
    argv = [sys.executable, "-c", program, pickle.dumps(flows).hex()]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.communicate()


def test_thousands_of_connections_are_held_back_by_one_rule_each_way(ethernet: Ethernet) -> None:
    """Every packet of the host goes by these rules."""
    local = socket.inet_pton(ethernet.family, ethernet.moving), PORT
    remote = socket.inet_pton(ethernet.family, ethernet.client_address)
    flows = [Flow(socket.IPPROTO_TCP, local, (remote, 10_000 + number)) for number in range(2500)]
    with ethernet.source.inside(), held("many", flows) as table:
        listed = _listing(table)
        ends = re.escape(f"{ethernet.client_address} . 1xxxx . {ethernet.moving} . {PORT}")
        assert len(set(re.findall(ends.replace("xxxx", r"\d{4}"), listed))) == 2500
        assert listed.count("drop\n") == 2


def test_a_bad_session_name_is_no_tables_name() -> None:
    with pytest.raises(ValueError, match="table's name"):
        Hold("x; flush ruleset")


def test_a_table_of_another_is_not_touched_and_what_was_held_back_stays(ethernet: Ethernet) -> None:
    """All of a batch, or nothing."""
    with ethernet.source.inside(), held("both", _flows(ethernet, [PORT])) as table:
        before = _listing(table)
        with Hold("both") as other, pytest.raises(PermissionDenied):
            other.add(_flows(ethernet, [PORT + 1]))
        assert _listing(table) == before


def test_without_privilege_it_says_what_to_do() -> None:
    def unprivileged() -> None:
        become_nobody()
        Hold("nobody").add([Flow(socket.IPPROTO_TCP, (bytes(4), 1), None)])

    with pytest.raises(PermissionDenied, match="CAP_NET_ADMIN"):
        in_child(unprivileged)
