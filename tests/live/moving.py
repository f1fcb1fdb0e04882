"""Moving processes between two hosts by the public command line, and what must be true after every move."""

from __future__ import annotations

import fcntl
import json
import os
import re
import select
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lazyproc.dump import walk
from lazyproc.errors import NoSuchProcess
from lazyproc.hosts import Host
from lazyproc.kernel import proc
from tests.live.programs import Watch, wait_until

CLI = (sys.executable, "-m", "lazyproc.cli.main")
MOVE_S = 15
END_S = 30
INSECURE = ("--insecure",)
PAGE_KINDS = ("zero", "eager", "urgent", "bulk", "dropped")

# include/uapi/linux/pidfd.h of Linux 6.15
_PIDFD_GET_INFO = 3 << 30 | 64 << 16 | 0xFF << 8 | 11
_PIDFD_INFO_EXIT = 1 << 3
_INFO = struct.Struct("<QQ11Ii")  # mask, cgroupid, pids and ids, exit_code


@dataclass(frozen=True, slots=True)
class Seen:
    """What belongs to a process and must be the same before and after: by number, and by address."""

    descriptors: dict[int, str]
    mappings: tuple[tuple[int, int, str, str], ...]  # start, end, permissions, name


def look(pid: int) -> Seen:
    """Descriptors without the numbers of inodes, mappings with equal neighbours as one."""
    links = {fd: os.readlink(f"/proc/{pid}/fd/{fd}") for fd in proc.descriptor_numbers(pid)}
    found: list[tuple[int, int, str, str]] = []
    for entry in proc.maps(proc.read(pid, "maps")):
        if found and found[-1][1:] == (entry.start, entry.perms, entry.path):
            found[-1] = (found[-1][0], entry.end, entry.perms, entry.path)
        else:
            found.append((entry.start, entry.end, entry.perms, entry.path))
    return Seen({fd: re.sub(r"\[\d+\]", "[]", link) for fd, link in links.items()}, tuple(found))


def tree_of(pid: int) -> dict[int, int]:
    """The processes under `pid` that have not ended, by the number they give themselves."""
    found: dict[int, int] = {}
    for each in walk.tree_of(pid):
        with suppress(NoSuchProcess):  # it has just ended
            status = proc.status(proc.read(each, "status"))
            if status.state != "Z":
                found[status.ns_pid[-1]] = each
    return found


def look_at_tree(pid: int) -> dict[int, Seen]:
    return {vpid: look(each) for vpid, each in tree_of(pid).items()}


def registered(pid: int) -> list[str]:
    """The mappings of a process that are registered with a userfaultfd."""
    entries = proc.smaps(proc.read(pid, "smaps"))
    return [f"{e.entry.start:#x} {e.entry.path}" for e in entries if e.vm_flags & {"um", "uw", "ui"}]


@dataclass(frozen=True, slots=True)
class Moved:
    """A tree at the destination; `pid` is its root as the caller sees it, `notes` what either command said."""

    pid: int
    report: dict[str, Any]
    notes: str

    def check_like(self, before: dict[int, Seen], *, same_maps: bool = True) -> None:
        """The tree is what it was, and nothing of ours is in it."""
        now = tree_of(self.pid)
        assert now.keys() == before.keys(), f"processes {sorted(before)} became {sorted(now)}"
        for vpid, each in now.items():
            assert registered(each) == [], f"pid {vpid} is still registered with a userfaultfd"
            then, seen = before[vpid], look(each)
            assert then.descriptors == seen.descriptors, (
                f"pid {vpid}: {then.descriptors} -> {seen.descriptors}"
            )
            gone, new = set(then.mappings), set(seen.mappings)
            assert not same_maps or gone == new, f"pid {vpid}: gone {gone - new}, new {new - gone}"

    def end(self, watch: Watch, signal: int = 15) -> None:
        """Ask for the last check; it and the exit status, which its parent in there has taken, must be good."""
        pidfd = os.pidfd_open(self.pid)
        try:
            os.kill(self.pid, signal)
            ready, _, _ = select.select([pidfd], [], [], END_S)
            assert ready, f"still runs: {watch.read()}"
            watch.wait_ended()
            assert exit_status(pidfd) == 0, str(watch.read())
        finally:
            os.close(pidfd)


def exit_status(pidfd: int) -> int:
    """The wait status of a process that somebody else has reaped (PIDFD_GET_INFO, Linux 6.15)."""
    info = bytearray()

    def reaped() -> bool:
        info[:] = _INFO.pack(_PIDFD_INFO_EXIT, *[0] * 13)
        try:
            fcntl.ioctl(pidfd, _PIDFD_GET_INFO, info)
        except ProcessLookupError:  # reaped after pidfd_info (fs/pidfs.c) had looked for the status
            return False
        return bool(_INFO.unpack(info)[0] & _PIDFD_INFO_EXIT)

    wait_until(reaped, "its parent reaps it")
    return int(_INFO.unpack(info)[13])


@dataclass(slots=True)
class Receiver:
    """A running `lazyproc receive` on `host`."""

    host: Host
    process: subprocess.Popen[Any]
    log: Path
    address: str
    trust: Sequence[str] = INSECURE  # options of whoever comes

    def notes(self) -> str:
        return self.log.read_text()


@contextmanager
def receiving(
    host: Host,
    *options: str,
    by: Sequence[str] = (),
    expected: int = 0,
    trust: Sequence[str] = INSECURE,
    clients: Sequence[str] = INSECURE,
) -> Iterator[Receiver]:
    """`lazyproc receive` on a port of its own choice, run `by` another command that becomes it; interrupted at the
    end, which must be exit 0 (`expected`: otherwise when the test has ended it). `trust` are its options for who is let
    in, `clients` those of who comes.
    """
    log = host.outside / "receive.log"
    log.write_text("")
    with log.open("w") as file:
        argv = [*by, *CLI, "receive", "--listen", f"{host.address}:0", *trust, "-v", *options]
        process = host.popen(argv, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
    try:
        wait_until(
            lambda: process.poll() is not None or "listening on port" in log.read_text(), "receive listens"
        )
        port = re.search(r"listening on port (\d+)", log.read_text())
        assert port, log.read_text()
        yield Receiver(host, process, log, f"{host.address}:{port[1]}", clients)
        process.send_signal(2)
        assert process.wait(END_S) == expected, log.read_text()
    finally:
        process.kill()
        process.wait()


def run_cli(
    host: Host, *words: object, expected: int = 0, more: str = ""
) -> subprocess.CompletedProcess[str]:
    """A command on `host`; its exit code must be `expected`. `more` is said when it is not."""
    argv = [*CLI, *map(str, words)]
    try:
        done = host.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=MOVE_S)
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"not done in {MOVE_S} s: {error.stderr!r}\n{more}") from None
    assert done.returncode == expected, f"exit code {done.returncode}: {done.stderr}\n{more}"
    return done


def migrate(
    source: Host, receiver: Receiver, pid: int, *options: str, expected: int = 0
) -> subprocess.CompletedProcess[str]:
    """`lazyproc migrate` on `source` of a process whose pid the caller knows."""
    words = ("migrate", source.vpid(pid), receiver.address, *receiver.trust, "--json", "-v", *options)
    return run_cli(source, *words, expected=expected, more=f"receiver:\n{receiver.notes()}")


def checkpoint(host: Host, pid: int, images: Path, *options: str) -> None:
    run_cli(host, "checkpoint", host.vpid(pid), "-D", images, "-v", *options)


def restore(host: Host, images: Path, *options: str) -> Moved:
    """`lazyproc restore` that returns when every page is there; the tree runs on."""
    done = run_cli(host, "restore", "-D", images, "--detach", "--json", "-v", *options)
    report = json.loads(done.stdout)
    return Moved(host.pid(report["root_pid"]), report, done.stderr)


def move(
    source: Host, receiver: Receiver, pid: int, *options: str, same_maps: bool = True, whole_tree: bool = True
) -> Moved:
    """Move a tree. Its pages must add up, nothing of it may be left behind and nothing of ours be left in it."""
    before = look_at_tree(pid) if whole_tree else {}
    olds = tree_of(pid).values()
    done = migrate(source, receiver, pid, *options)
    report = json.loads(done.stdout)
    assert report["pages_total"] == sum(report[f"pages_{kind}"] for kind in PAGE_KINDS), report
    assert not any(_lives(old) for old in olds)
    moved = Moved(receiver.host.pid(report["root_pid"]), report, done.stderr)
    if whole_tree:
        moved.check_like(before, same_maps=same_maps)
    return moved


def _lives(pid: int) -> bool:
    try:
        return proc.status(proc.read(pid, "status")).state != "Z"
    except NoSuchProcess:
        return False
