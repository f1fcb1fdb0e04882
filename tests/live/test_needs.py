"""What the destination lacks is said before anything is frozen, all of it at once; and asking moves nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lazyproc.hosts import Host, Pair
from lazyproc.migrate.link import Gathering
from lazyproc.pages.channel import Channel
from lazyproc.wire.native import Abort, Party, Prepare, Prepared, Welcome
from tests.live.bad_luck import (
    NOBODY,
    PACED,
    ended,
    lazyproc,
    listener_on,
    migrated,
    moves,
    says,
    started,
    unchanged,
    unharmed,
    way_to,
    without,
)
from tests.live.moving import Receiver, receiving
from tests.live.programs import running, wait_until
from tests.live.real import ending, migrating, move_now
from tests.needs import lacking

# Does what it is told, then writes a byte every 2 ms. IPC numbers: include/uapi/linux/ipc.h.
CARGO = """
import ctypes, mmap, os, socket, sys, time
beats = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
exec(sys.argv[2])
while True:
    os.write(beats, b".")
    time.sleep(0.002)
"""
KEY = 0x1A2B3C
OWN_PID_MAX = (6, 14)  # since then each pid namespace has one


@dataclass(frozen=True, slots=True)
class Cargo:
    pid: int
    beats: Path

    def goes_on(self) -> None:
        size = self.beats.stat().st_size
        wait_until(lambda: self.beats.stat().st_size > size + 2, "it runs")


@contextmanager
def cargo(pair: Pair, script: str) -> Iterator[Cargo]:
    """A program on the source that has done `script` and now runs."""
    beats, log = pair.shared / "beats", pair.source.outside / "cargo.log"
    with log.open("w") as out:
        argv = [sys.executable, "-c", CARGO, str(beats), script]
        process = pair.source.popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd="/")
    (pair.destination.outside / "cargo.log").touch()
    try:
        wait_until(
            lambda: process.poll() is not None or (beats.exists() and beats.stat().st_size > 0),
            "it is set up",
        )
        assert process.poll() is None, log.read_text()
        yield Cargo(process.pid, beats)
    finally:
        process.kill()
        process.wait()


@contextmanager
def sitting(host: Host, script: str) -> Iterator[subprocess.Popen[Any]]:
    """A process on a host that has what `script` takes until the end of the block."""
    code = f"import ctypes, socket, sys\n{script}\nprint('ready', flush=True)\nsys.stdin.read()"
    pipe = subprocess.PIPE
    with host.popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def asked(pair: Pair, receiver: Receiver, pid: int, expected: int) -> list[dict[str, Any]]:
    """The obstacles that `explain --peer` finds."""
    words = ("explain", pair.source.vpid(pid), "--peer", receiver.address, "--insecure", "--json")
    done = lazyproc(pair.source, *words)
    assert done.returncode == expected, done.stderr + done.stdout
    fields = json.loads(done.stdout)
    assert fields["peer"] == receiver.address
    return list(fields["obstacles"])


def segment(key: int) -> str:
    """A System V segment that stays attached."""
    return (
        f"libc = ctypes.CDLL(None); number = libc.shmget({key}, 4096, 0o1600)\n"
        "libc.shmat.restype = ctypes.c_void_p; libc.shmat(number, None, 0)\n"
    )


def bound(family: str, kind: str, name: object, then: str = "pass") -> str:
    """A socket that stays open under a name of its own."""
    variable = f"s{abs(hash((family, kind, name)))}"
    return (
        f"{variable} = socket.socket(socket.{family}, socket.{kind})\n"
        f"{variable}.bind({name!r})\n{then.replace('SOCK', variable)}\n"
    )


@pytest.fixture
def lacking_everything(pair: Pair) -> Iterator[tuple[Cargo, dict[str, str]]]:
    """A program whose every need is unmet at the destination; each need's words by its place."""
    here, there, at = pair.source.outside, pair.destination.outside, pair.source.scratch
    for name in ("missing", "kind", "sized"):
        (here / name).write_text("x" * 5000)
    (there / "kind").mkdir()
    (there / "sized").write_text("x")
    (here / "cwd").mkdir()
    (here / "sockets").mkdir()
    os.mkfifo(here / "fifo")
    (there / "fifo").write_text("")
    pair.source.run(["ip", "address", "add", "10.77.0.50/24", "dev", "eth0"], check=True)
    taken = bound("AF_INET", "SOCK_STREAM", ("0.0.0.0", 8123), "SOCK.listen()")
    taken += bound("AF_INET", "SOCK_DGRAM", ("10.77.0.2", 8124)) + bound("AF_UNIX", "SOCK_STREAM", "\0taken")
    script = (
        f"os.chdir('{at}/cwd')\n"
        f"f1 = open('{at}/missing'); f2 = open('{at}/kind'); f3 = open('{at}/sized', 'rb')\n"
        "m = mmap.mmap(f3.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ)\n"
        f"f4 = os.open('{at}/fifo', os.O_RDWR)\n"
        + segment(KEY)
        + bound("AF_INET", "SOCK_STREAM", ("0.0.0.0", 8123), "SOCK.listen()")
        + bound("AF_INET", "SOCK_DGRAM", ("0.0.0.0", 8124))
        + bound("AF_INET", "SOCK_DGRAM", ("10.77.0.50", 8125))
        + bound("AF_UNIX", "SOCK_STREAM", "\0taken")
        + bound("AF_UNIX", "SOCK_STREAM", f"{at}/sockets/s")
    )
    words = {
        "cwd": f"file {at}/cwd: is not on this host (No such file or directory)",
        "missing": f"file {at}/missing: is not on this host (No such file or directory)",
        "kind": f"file {at}/kind: is another kind of file on this host",
        "sized": f"file {at}/sized: has 1 bytes on this host and had 5000 where the process mapped it",
        "fifo": f"file {at}/fifo: is no FIFO on this host",
        "key": f"SysV segment 0: a segment with its key {KEY:#x} exists on this host",
        "listening": "TCP 0.0.0.0 port 8123: is in use on this host",
        "udp": "UDP 0.0.0.0 port 8124: is in use on this host",
        "address": "UDP 10.77.0.50 port 8125: has an address that is not on this host",
        "name": "unix socket @taken: cannot be made again (Address already in use)",
        "socket file": f"{at}/sockets: the directory of socket {at}/sockets/s is missing",
    }
    with sitting(pair.destination, segment(KEY) + taken), cargo(pair, script) as started_one:
        yield started_one, words


def test_migrate_says_all_that_is_missing_and_freezes_nothing(
    pair: Pair, lacking_everything: tuple[Cargo, dict[str, str]]
) -> None:
    """Without ptrace(2) it comes to the same end: it has not been called."""
    program, words = lacking_everything
    target = pair.source.vpid(program.pid)
    with receiving(pair.destination) as receiver, unchanged(pair.source, pair.destination):
        done = lazyproc(
            pair.source, "migrate", target, receiver.address, "--insecure", "-v", by=without("ptrace")
        )
        assert done.returncode == 3, done.stderr
        missing = {
            name: text for name, text in words.items() if f"{receiver.address}: {text}" not in done.stderr
        }
        assert not missing, done.stderr
        assert "ip address add 10.77.0.50 dev INTERFACE" in done.stderr
        assert "frozen" not in done.stderr.splitlines()
        program.goes_on()
        quiet = lazyproc(pair.source, "migrate", target, receiver.address, "--insecure")
        says(quiet, 3, "cannot be done, nothing has been stopped")
        assert quiet.stderr.count(f"{receiver.address}: ") == len(words)


def test_a_move_does_call_ptrace_and_says_that_it_froze(pair: Pair) -> None:
    """So the test above can fail."""
    with cargo(pair, "") as program, receiving(pair.destination) as receiver:
        words = ("migrate", pair.source.vpid(program.pid), receiver.address, "--insecure", "-v")
        assert lazyproc(pair.source, *words, by=without("ptrace")).returncode == 1
        program.goes_on()
        with migrating(pair.source, receiver, program.pid) as journey:
            new, _ = journey.arrive()
        with ending(new):
            assert "frozen" in journey.log().splitlines()
            program.goes_on()


def test_explain_says_the_same_and_the_receiver_goes_on(
    pair: Pair, lacking_everything: tuple[Cargo, dict[str, str]]
) -> None:
    program, words = lacking_everything
    with receiving(pair.destination) as receiver, unchanged(pair.source, pair.destination):
        found = asked(pair, receiver, program.pid, 3)
        said = {
            text: [o for o in found if o["why"].startswith(f"{receiver.address}: {text}")]
            for text in words.values()
        }
        assert {text: len(those) for text, those in said.items()} == dict.fromkeys(words.values(), 1)
        assert len(found) == len(words)
        assert {o["pid"] for o in found} == {pair.source.vpid(program.pid)}
        assert {o["where"].split()[0] for o in found} == {"fd", "cwd", "mapping"}
        assert all(o["remedy"] for o in found)
        assert len(asked(pair, receiver, program.pid, 3)) == len(found)
        program.goes_on()


def test_asking_is_no_migration(pair: Pair) -> None:
    """`--once` goes on waiting after questions, for the one that commits."""
    with (
        running(*PACED, directory=pair.shared, host=pair.source) as program,
        receiving(pair.destination, "--once") as receiver,
    ):
        with unchanged(pair.source, pair.destination), unharmed(program):
            assert asked(pair, receiver, program.pid, 0) == []
            words = ("check", "--peer", receiver.address, "--insecure", "--json")
            assert lazyproc(pair.source, *words).returncode == 0
            wait_until(lambda: receiver.notes().count("only asked") == 2, "both have left")
        assert receiver.process.poll() is None
        moves(pair, receiver, program)
        assert receiver.process.wait(20) == 0


SHARES = """
free = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
free.setsockopt(socket.SOL_IP, 15, 1)  # IP_FREEBIND
free.bind(("192.0.2.1", 8200))
group = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
group.bind(("239.1.2.3", 8201))
local = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
local.bind(("127.5.6.7", 8202))
routed = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
routed.bind(("198.51.100.7", 8203))
routed.listen()
many = [socket.socket(socket.AF_INET, socket.SOCK_STREAM) for _ in range(2)]
for one in many:
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    one.bind(("0.0.0.0", 8204))
    one.listen()
log = open("SCRATCH/log")
os.write(beats, b".")
growing = open(sys.argv[1], "rb")
private = mmap.mmap(growing.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ)
"""


def test_what_works_without_is_not_asked_for(pair: Pair) -> None:
    """Addresses that need not be on an interface, ports that are shared, logs that have grown on one side only, and a
    file that both hosts see and the program goes on writing to, mapped private.
    """
    for host in (pair.source, pair.destination):
        host.run(["ip", "route", "add", "local", "198.51.100.0/24", "dev", "lo"], check=True)
        (host.outside / "log").write_text("x" * host.number)
    taken = (
        "s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)\n"
        "s.bind(('0.0.0.0', 8204)); s.listen()"
    )
    with (
        sitting(pair.destination, taken),
        cargo(pair, SHARES.replace("SCRATCH", str(pair.source.scratch))) as program,
        receiving(pair.destination) as receiver,
    ):
        assert asked(pair, receiver, program.pid, 0) == []
        new, _ = move_now(pair.source, receiver, program.pid)
        with ending(new):
            program.goes_on()


# --- between the question and the restore -------------------------------------------------------------------


@pytest.mark.parametrize("what", ["file", "address"])
def test_what_goes_away_after_the_question_is_rolled_back(pair: Pair, what: str) -> None:
    """The receiver has said yes: what it finds missing when it builds ends with the source running as before."""
    there, at = pair.destination, pair.source.scratch
    for host in (pair.source, there):
        (host.outside / "file").write_text("")
        host.run(["ip", "address", "add", "10.77.0.50/24", "dev", "eth0"], check=True)
    said = []

    def back(number: int, data: bytes) -> bytes:
        """On the control connection it says 1 WELCOME, 2 PREPARED."""
        if number == 0:
            said.append(data)
            if len(said) == 2 and what == "file":
                (there.outside / "file").unlink()
            elif len(said) == 2:
                there.run(["ip", "address", "delete", "10.77.0.50/24", "dev", "eth0"], check=True)
        return data

    words = {
        "file": (f"file {at}/file: is not on this host", f"copy {at}/file to this host"),
        "address": ("UDP 10.77.0.50 port 8125", "ip address add 10.77.0.50 dev INTERFACE"),
    }
    script = f"f = open('{at}/file')\n" + bound("AF_INET", "SOCK_DGRAM", ("10.77.0.50", 8125))
    with cargo(pair, script) as program, receiving(there) as receiver:
        with way_to(receiver, pair.source, back=back) as address:
            done = lazyproc(
                pair.source, "migrate", pair.source.vpid(program.pid), address, "--insecure", "-v"
            )
        says(subprocess.CompletedProcess("", done.returncode, "", _last(done.stderr)), 1, *words[what])
        assert "frozen" in done.stderr.splitlines()
        program.goes_on()


def _last(text: str) -> str:
    """What is said at the end, behind notes and traceback of -v."""
    return text[text.rindex("\nlazyproc: ") + 1 :]


def test_who_fetches_a_tree_is_told_what_it_lacks(pair: Pair) -> None:
    """`restore --from` lists it, and `serve` waits for somebody who has it all."""
    source, there = pair.source, pair.destination
    at = source.scratch / "file"
    (source.outside / "file").write_text("")
    with (
        cargo(pair, f"f = open('{at}')") as program,
        ended(
            started(source, "serve", source.vpid(program.pid), "--listen", "10.77.0.1:0", "--insecure")
        ) as server,
    ):
        assert server.stderr is not None
        words = iter(server.stderr.readline, "")
        port = next(line.split()[-1] for line in words if "listening" in line)
        for _ in range(2):
            done = lazyproc(there, "restore", "--from", f"10.77.0.1:{port}", "--insecure", "--json")
            assert done.returncode == 3, done.stderr
            (obstacle,) = json.loads(done.stdout)["obstacles"]
            assert obstacle["why"].startswith(f"file {at}: is not on this host")
            assert (obstacle["pid"], obstacle["where"]) == (source.vpid(program.pid), "fd 4")
        assert server.poll() is None
        program.goes_on()


# --- numbers ------------------------------------------------------------------------------------------------


def test_a_number_that_is_taken_matters_in_the_hosts_namespace_only(pair: Pair) -> None:
    pair.source.run(["sh", "-c", "echo 5000 > /proc/sys/kernel/ns_last_pid"], check=True)
    with cargo(pair, "") as program, ExitStack() as stack:
        number = pair.source.vpid(program.pid)
        last = f"open('/proc/sys/kernel/ns_last_pid', 'w').write('{number - 1}')"
        sleeper = f"{last}\nimport subprocess\nchild = subprocess.Popen(['sleep', '60'])\nassert child.pid == {number}"
        stack.enter_context(sitting(pair.destination, sleeper))
        child = pair.destination.pid(number)
        stack.callback(os.kill, child, signal.SIGKILL)
        with receiving(pair.destination) as receiver:
            assert asked(pair, receiver, program.pid, 0) == []
        with receiving(pair.destination, "--pidns", "host") as receiver:
            (obstacle,) = asked(pair, receiver, program.pid, 3)
            assert (obstacle["pid"], obstacle["where"]) == (number, "process")
            assert obstacle["why"] == f"{receiver.address}: pid {number}: its number is taken on this host"
            says(migrated(pair, receiver, program.pid), 3, "use --pidns auto or new")
        program.goes_on()


def test_a_number_above_the_highest_one_here_matters_in_the_hosts_namespace_only(pair: Pair) -> None:
    """The destination lets its processes have lower numbers than the source: 32768 is what a kernel begins with."""
    if tuple(map(int, os.uname().release.split(".")[:2])) < OWN_PID_MAX:
        lacking("a pid_max of each pid namespace", "use Linux 6.14 or newer: the host's own would be changed")
    pair.source.run(["sh", "-c", "echo 5000 > /proc/sys/kernel/ns_last_pid"], check=True)
    pair.destination.run(["sh", "-c", "echo 1000 > /proc/sys/kernel/pid_max"], check=True)
    with cargo(pair, "") as program:
        with receiving(pair.destination, "--pidns", "host") as receiver:
            (obstacle,) = asked(pair, receiver, program.pid, 3)
            assert "no process can have its number on this host (kernel.pid_max is 1000)" in obstacle["why"]
            says(migrated(pair, receiver, program.pid), 3, "use --pidns auto or new")
        program.goes_on()
        with receiving(pair.destination) as receiver:
            assert asked(pair, receiver, program.pid, 0) == []
            new, report = move_now(pair.source, receiver, program.pid)
            with ending(new):
                assert report["root_vpid"] == 5001
                program.goes_on()


# --- features -----------------------------------------------------------------------------------------------


def test_a_kernel_without_what_every_restore_takes(pair: Pair) -> None:
    with cargo(pair, "") as program, receiving(pair.destination, by=without("clone3")) as receiver:
        found = asked(pair, receiver, program.pid, 3)
        assert [(o["pid"], o["where"]) for o in found] == [(0, "host")]
        assert "choose pids" in found[0]["why"]


def test_what_only_some_trees_take_is_asked_for_by_those(pair: Pair) -> None:
    """Without nf_tables a destination cannot hold packets back, which matters to connections with others."""
    listens = bound("AF_INET", "SOCK_STREAM", ("10.77.0.2", 8300), "SOCK.listen()")
    connects = "s = socket.create_connection(('10.77.0.2', 8300))"
    with sitting(pair.destination, listens), receiving(pair.destination, by=without("nf_tables")) as receiver:
        with cargo(pair, "") as program:
            assert asked(pair, receiver, program.pid, 0) == []
        (pair.shared / "beats").unlink()
        with cargo(pair, connects) as program:
            found = asked(pair, receiver, program.pid, 3)
    (obstacle,) = (o for o in found if "nftables: " in o["why"])
    assert obstacle["where"] == "fd 4"
    assert "packets cannot be held back: Protocol not supported" in obstacle["why"]


class FirstChannel(Channel):
    """Greets as lazyproc did before it could be asked."""

    def welcome(self) -> None:
        assert self.hello is not None
        self.send(Welcome(self.hello.session, revision=0))


@pytest.mark.parametrize("answer", [Prepared(), Abort({"reason": "not today"})])
def test_an_older_receiver_is_asked_what_it_knows(pair: Pair, answer: Prepared | Abort) -> None:
    """Nothing that it would not understand is sent to it."""
    heard: list[object] = []

    def serve(sock: socket.socket) -> None:
        with closing(Gathering()) as gathering:
            link = None
            while link is None:
                channel = FirstChannel(sock.accept()[0], Party.DESTINATION)
                channel.receive(20)
                link = gathering.add(channel)
            with link.control, link.urgent, link.bulk:
                while True:
                    heard.append(link.control.receive(20))
                    if isinstance(heard[-1], Prepare):
                        link.control.send(answer)

    with cargo(pair, "") as program, listener_on(pair.destination, serve) as address:
        target = pair.source.vpid(program.pid)
        done = lazyproc(pair.source, "explain", target, "--peer", address, "--insecure")
        assert "is an older lazyproc" in done.stderr
        assert done.returncode == (0 if isinstance(answer, Prepared) else 3), done.stderr
        assert ("not today" in done.stdout) == isinstance(answer, Abort)
    assert heard[0].__class__ is Prepare
    assert heard[1:] == ([Abort({"reason": "only asked"})] if isinstance(answer, Prepared) else [])


# --- check --peer -------------------------------------------------------------------------------------------


def findings(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, str]]:
    rows = json.loads(done.stdout)["findings"]
    assert len({row["name"] for row in rows}) == len(rows)
    return {row["name"].removeprefix("peer: "): row for row in rows if row["name"].startswith("peer: ")}


def checked(
    host: Host, target: str, *options: str, by: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    return lazyproc(host, "check", "--peer", target, "--json", *options, by=by)


def test_two_hosts_that_fit(pair: Pair) -> None:
    with receiving(pair.destination) as receiver, unchanged(pair.source, pair.destination):
        done = checked(pair.source, receiver.address, "--insecure")
        found = findings(done)
    assert done.returncode == 0
    for name in (
        "reachable",
        "let in",
        "protocol",
        "processor",
        "vdso",
        "time namespaces",
        "userfaultfd",
        "memory",
    ):
        assert found[name]["state"] == "ok", found[name]
    assert " ms" in found["reachable"]["detail"]


def test_a_peer_that_lacks_what_it_takes(pair: Pair) -> None:
    with receiving(pair.destination, by=without("userfaultfd")) as receiver:
        done = checked(pair.source, receiver.address, "--insecure")
    assert done.returncode == 3
    assert findings(done)["userfaultfd of tasks"]["state"] == "missing"
    assert all(row["remedy"] for row in findings(done).values() if row["state"] != "ok")


def test_a_peer_that_is_not_there(pair: Pair) -> None:
    done = checked(pair.source, "10.77.0.2:1", "--insecure")
    assert done.returncode == 3
    (only,) = findings(done).values()
    assert (only["name"], only["state"], only["detail"]) == (
        "peer: reachable",
        "missing",
        "nobody listens there",
    )
    assert only["remedy"]


def test_who_is_not_let_in_learns_nothing(pair: Pair) -> None:
    """A user of the same host, and somebody from another one: that it listens, and no more."""
    here = pair.destination
    with ended(started(here, "receive", "--listen", "0.0.0.0:0")) as receiver:
        assert receiver.stderr is not None
        port = receiver.stderr.readline().split()[-1]
        for host, target, by in (
            (here, f"127.0.0.1:{port}", NOBODY),
            (pair.source, f"{here.address}:{port}", ()),
        ):
            found = findings(checked(host, target, "--insecure", by=by))
            assert {name: row["state"] for name, row in found.items()} == {
                "reachable": "ok",
                "let in": "missing",
            }
            assert "--allow-uid" in found["let in"]["remedy"]


def test_a_stranger_is_not_asked(pair: Pair) -> None:
    """Without --insecure we tell nothing to whoever sits there."""
    with receiving(pair.destination) as receiver:
        found = findings(checked(pair.source, receiver.address))
    assert found["trusted"]["state"] == "missing"
    assert "--insecure" in found["trusted"]["remedy"]
    assert "processor" not in found
