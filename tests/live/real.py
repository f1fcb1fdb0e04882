"""Moves that are looked at while they happen, and clients that live on one of the test hosts."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lazyproc.dump.walk import tree_of
from lazyproc.errors import NoSuchProcess
from lazyproc.hosts import Host
from lazyproc.kernel import proc
from lazyproc.kernel.netns import CLONE_NEWNET, SYS_SETNS
from lazyproc.kernel.sys import syscall
from tests.live.moving import CLI, MOVE_S, PAGE_KINDS, Receiver, registered
from tests.live.programs import wait_until


@dataclass(frozen=True, slots=True)
class Journey:
    """A running `lazyproc migrate` of the tree under `pid` (the caller's number)."""

    process: subprocess.Popen[Any]
    receiver: Receiver
    pid: int
    folder: Path
    already: int  # trees that the receiver had before

    def log(self) -> str:
        return (self.folder / "migrate.log").read_text()

    def wait_running(self) -> None:
        """Until the tree runs at the destination, most of its memory still to come."""
        wait_until(
            lambda: self.process.poll() is not None or self._arrivals() > self.already,
            "it runs at the destination",
        )
        assert self.process.poll() in (None, 0), f"{self.log()}\nreceiver:\n{self.receiver.notes()}"

    def still_lazy(self) -> bool:
        return self.process.poll() is None

    def finish(self, expected: int = 0) -> dict[str, Any]:
        """What `--json` printed at the end."""
        code = self.process.wait(MOVE_S)
        assert code == expected, f"exit {code}: {self.log()}\nreceiver:\n{self.receiver.notes()}"
        answer: dict[str, Any] = json.loads((self.folder / "migrate.json").read_text())
        return answer

    def arrive(self) -> tuple[int, dict[str, Any]]:
        """The pid of the tree's root at the destination, for the caller; every promise about a move is checked."""
        report = self.finish()
        assert report["pages_total"] == sum(report[f"pages_{kind}"] for kind in PAGE_KINDS), report
        assert not runs(self.pid), "the source still has it"
        new = self.receiver.host.pid(report["root_pid"])
        check_clean(new)
        return new, report

    def _arrivals(self) -> int:
        return self.receiver.notes().splitlines().count("running")


@contextmanager
def migrating(
    source: Host,
    receiver: Receiver,
    pid: int,
    *options: str,
    by: str | None = None,
    run_by: Sequence[str] = (),
    monitor: Path | None = None,
) -> Iterator[Journey]:
    """`lazyproc migrate` under way, to the receiver `by` another address; killed at the end when still there. It is run
    by `run_by`, a command that becomes it. With `monitor` the guest of the QEMU `pid` moves, which has it there.
    """
    folder = source.outside
    journey_log, answer = folder / "migrate.log", folder / "migrate.json"
    already = receiver.notes().splitlines().count("running")
    target = by or receiver.address
    what = ("--qemu", str(monitor)) if monitor else (str(source.vpid(pid)),)
    words = ("migrate", *what, target, *receiver.trust, "--json", "-v", *options)
    argv = [*run_by, *CLI, *words]
    with journey_log.open("w") as log, answer.open("w") as out:
        process = source.popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=log)
    try:
        yield Journey(process, receiver, pid, folder, already)
    finally:
        process.kill()
        process.wait()


def move_now(source: Host, receiver: Receiver, pid: int, *options: str) -> tuple[int, dict[str, Any]]:
    with migrating(source, receiver, pid, *options) as journey:
        return journey.arrive()


def runs(pid: int) -> bool:
    """Whether a process is there and has not ended."""
    try:
        return proc.status(proc.read(pid, "status")).state != "Z"
    except NoSuchProcess:
        return False


def check_clean(root: int) -> None:
    """No process under `root` holds a userfaultfd, has memory registered with one, or is traced or stopped."""
    for pid in tree_of(root):
        try:
            assert registered(pid) == []
            links = {fd: os.readlink(f"/proc/{pid}/fd/{fd}") for fd in proc.descriptor_numbers(pid)}
            status = proc.status(proc.read(pid, "status"))
        except (NoSuchProcess, FileNotFoundError):
            continue  # the tree lives: a child has ended meanwhile
        assert not [link for link in links.values() if "userfaultfd" in link], f"pid {pid} has {links}"
        assert status.tracer_pid == 0
        assert status.state not in "tT"


def processes_of(host: Host) -> dict[int, str]:
    """The command of every process in the host's network, by the caller's pid."""
    home = os.readlink(f"/proc/{host.init_pid}/ns/net")
    found = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.readlink(f"/proc/{entry}/ns/net") == home:
                found[int(entry)] = Path(f"/proc/{entry}/comm").read_text().strip()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it has ended, or is somebody's whom we may not look at
    return found


@contextmanager
def network_of(host: Host) -> Iterator[None]:
    """The calling thread is in the host's network: sockets made here stay there."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    there = os.open(f"/proc/{host.init_pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        syscall(SYS_SETNS, there, CLONE_NEWNET)
        try:
            yield
        finally:
            syscall(SYS_SETNS, home, CLONE_NEWNET)
    finally:
        os.close(there)
        os.close(home)


def dialled(host: Host, address: str, port: int) -> socket.socket:
    """A TCP connection from the host, as soon as somebody listens."""
    found: list[socket.socket] = []

    def try_once() -> bool:
        try:
            found.append(socket.create_connection((address, port), timeout=20))
        except ConnectionRefusedError:
            return False
        return True

    with network_of(host):
        wait_until(try_once, f"somebody listens at {address} port {port}")
    return found[0]


@contextmanager
def ending(pid: int) -> Iterator[None]:
    """SIGKILL for a moved process at the end of the block, when it is still there."""
    pidfd = os.pidfd_open(pid)
    try:
        yield
    finally:
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            select.select([pidfd], [], [], 5)
        except ProcessLookupError:
            pass
        os.close(pidfd)
