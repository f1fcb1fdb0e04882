"""--tcp-close: peers from outside see an ordinary end, as soon as the tree has moved and not before."""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from lazyproc.hosts import Host, Trio
from tests.live.bad_luck import without
from tests.live.moving import CLI, Receiver, migrate, receiving, run_cli
from tests.live.programs import SOURCES, wait_until
from tests.live.real import migrating
from tests.live.real_gate import gate_to
from tests.live.tracees import state_of

PORT = 5000
SERVICE = SOURCES / "tcp_service.py"
CLONE_NEWNET = 0x40000000
WAIT_S = 10


@dataclass(frozen=True, slots=True)
class Look:
    """What the service has written last."""

    clock: float
    state: str
    rest: str
    later: int


@dataclass(frozen=True, slots=True)
class Service:
    """tcp_service.py on the trio's source, and its first client on the trio's third host."""

    pid: int
    status: Path
    client: socket.socket

    def look(self) -> Look:
        return Look(*json.loads(self.status.read_text()))

    def answers(self) -> None:
        self.client.sendall(b"are you there\n")
        assert self.client.recv(99) == b"ARE YOU THERE\n"

    def wait_look(self) -> Look:
        """The next one; the destination's clock goes on where the source's was."""
        before = self.look()
        wait_until(lambda: self.look().clock > before.clock, "the service looks again")
        return self.look()

    def client_ended(self, timeout: float) -> bool:
        """Whether the peer has ended the connection: FIN, or RST."""
        ready, _, _ = select.select([self.client], [], [], timeout)
        if not ready:
            return False
        with suppress(ConnectionResetError):
            assert self.client.recv(99) == b""
        return True


@contextmanager
def _network_of(host: Host) -> Iterator[None]:
    """Sockets that this thread makes meanwhile are the host's."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/thread-self/ns/net") as home, open(f"/proc/{host.init_pid}/ns/net") as there:
        assert libc.setns(there.fileno(), CLONE_NEWNET) == 0
        try:
            yield
        finally:
            assert libc.setns(home.fileno(), CLONE_NEWNET) == 0


def dialled(client: Host, address: object) -> socket.socket:
    with _network_of(client):
        sock = socket.socket()
        sock.settimeout(WAIT_S)
        sock.connect((str(address), PORT))
        return sock


@contextmanager
def service(trio: Trio, *options: str) -> Iterator[Service]:
    status = trio.source.ground.shared / "status"
    process = trio.source.popen(
        [sys.executable, str(SERVICE), str(status), *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: _listens(trio.source), "the service listens")
        with dialled(trio.client, trio.source.address) as client:
            found = Service(process.pid, status, client)
            found.answers()
            wait_until(status.exists, "the service has looked")
            yield found
    finally:
        process.kill()
        process.wait()


def _listens(host: Host) -> bool:
    text = Path(f"/proc/{host.init_pid}/net/tcp").read_text()
    return any(f":{PORT:04X} 00000000:0000 0A" in line for line in text.splitlines())


@pytest.fixture
def receiver(trio: Trio) -> Iterator[Receiver]:
    with receiving(trio.destination) as waiting:
        yield waiting


def arrived(trio: Trio, receiver: Receiver, it: Service) -> int:
    """The service has moved, its connections given up; its pid there."""
    report = json.loads(migrate(trio.source, receiver, it.pid, "--tcp-close").stdout)
    return trio.destination.pid(report["root_pid"])


def ended(pid: int) -> None:
    pidfd = os.pidfd_open(pid)
    try:
        os.kill(pid, signal.SIGKILL)
        assert select.select([pidfd], [], [], WAIT_S)[0]
    finally:
        os.close(pidfd)


def test_the_peer_sees_the_end_when_the_tree_has_moved(trio: Trio, receiver: Receiver) -> None:
    """At once, not when the last page has come; the tree sees it too, and goes on serving where it is."""
    with service(trio) as it:
        it.client.sendall(b"half a line")
        wait_until(lambda: it.look().rest == "half a line", "the service has read it")
        options = ("--insecure", "--json", "--tcp-close", "--max-rate", "4000000")
        moving = trio.source.popen(
            [*CLI, "migrate", str(trio.source.vpid(it.pid)), receiver.address, *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert it.client_ended(WAIT_S)
        assert state_of(it.pid) != "Z", "the frozen tree still serves its pages"
        wait_until(lambda: it.look().state == "ended", "the tree has read the end")
        assert it.look().rest == "half a line"
        report = json.loads(moving.communicate(timeout=WAIT_S)[0])
        moved = trio.destination.pid(report["root_pid"])
        with dialled(trio.client, trio.destination.address):
            wait_until(lambda: it.look().later == 1, "a new client is served at the destination")
        ended(moved)


def test_what_has_come_is_read_before_the_end(trio: Trio, receiver: Receiver) -> None:
    with service(trio) as it:
        os.kill(it.pid, signal.SIGSTOP)
        it.client.sendall(b"not read yet")
        wait_until(lambda: _unread(trio.source) == len("not read yet"), "it has come")
        moved = arrived(trio, receiver, it)
        assert it.client_ended(WAIT_S)
        os.kill(moved, signal.SIGCONT)
        wait_until(lambda: it.look().state == "ended", "the tree has read the end")
        assert it.look().rest == "not read yet"
        ended(moved)


def _unread(host: Host) -> int:
    """Bytes in the receive queues of the host's TCP connections at the service's port."""
    lines = Path(f"/proc/{host.init_pid}/net/tcp").read_text().splitlines()[1:]
    rows = [line.split() for line in lines]
    return sum(
        int(row[4].split(":")[1], 16) for row in rows if row[1].endswith(f":{PORT:04X}") and row[3] == "01"
    )


def test_a_rollback_leaves_the_connection_as_it_was(trio: Trio, receiver: Receiver) -> None:
    """It is called off when the tree is frozen and has been built at the destination."""
    with (
        service(trio) as it,
        gate_to(receiver, trio.source, closes_at=3) as gate,
        migrating(trio.source, receiver, it.pid, "--tcp-close", by=gate.address) as journey,
    ):
        it.client.sendall(b"half a")
        assert gate.reached.wait(WAIT_S)
        assert "frozen" in journey.log().splitlines()
        journey.process.send_signal(signal.SIGINT)
        assert journey.finish(expected=1)["exit_code"] == 1
        assert not it.client_ended(0)
        it.client.sendall(b" line\n")
        assert it.client.recv(99) == b"HALF A LINE\n"
        it.answers()
        with dialled(trio.client, trio.source.address):
            wait_until(lambda: it.look().later == 1, "and it still listens")


def test_no_packet_filter_is_needed(trio: Trio, receiver: Receiver) -> None:
    lacking = without("nf_tables")
    with service(trio) as it:
        with migrating(trio.source, receiver, it.pid, run_by=lacking) as journey:
            journey.finish(expected=3)  # which also lacks the address there
        it.answers()
        with migrating(trio.source, receiver, it.pid, "--tcp-close", run_by=lacking) as journey:
            moved = trio.destination.pid(journey.finish()["root_pid"])
        assert it.client_ended(WAIT_S)
        ended(moved)


def test_connections_within_the_tree_move_all_the_same(trio: Trio, receiver: Receiver) -> None:
    with service(trio, "--inner") as it:
        moved = arrived(trio, receiver, it)
        assert it.client_ended(WAIT_S)
        wait_until(lambda: it.look().state == "ended", "the tree has read the end")
        it.wait_look()  # which tries the inner connection
        ended(moved)


def test_who_was_not_accepted_yet_is_given_up_as_well(trio: Trio, receiver: Receiver) -> None:
    with service(trio) as it:
        vpid = trio.source.vpid(it.pid)
        os.kill(it.pid, signal.SIGSTOP)
        with dialled(trio.client, trio.source.address) as waiting:
            done = run_cli(trio.source, "explain", vpid, expected=3)
            assert "was not accepted yet" in done.stdout
            assert "--tcp-close" in done.stdout
            run_cli(trio.source, "explain", vpid, "--tcp-close")
            moved = arrived(trio, receiver, it)
            assert Service(it.pid, it.status, waiting).client_ended(WAIT_S)
        assert it.client_ended(WAIT_S)
        ended(moved)
