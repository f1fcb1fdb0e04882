"""What cannot be dumped is said before the freeze, in the same words as after it."""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import signal
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from lazyproc.dump import files
from lazyproc.dump.descriptors import explain_descriptors, gather_descriptors
from lazyproc.dump.permits import ALL
from lazyproc.dump.registry import TaskRef
from lazyproc.kernel.fds import unshare_descriptors
from lazyproc.kernel.sys import syscall
from tests.forked import ending
from tests.live.descriptors import REPORT, at, obstacle_words, stopped
from tests.live.lockers import waiters_of
from tests.live.programs import wait_until

SYS_CLONE, SYS_MQ_OPEN, SYS_BPF, SYS_PERF_EVENT_OPEN = 56, 240, 321, 298
SYS_FANOTIFY_INIT, SYS_USERFAULTFD, SYS_IO_URING_SETUP, SYS_FSOPEN = 300, 323, 425, 430
SYS_LANDLOCK_CREATE_RULESET, SYS_MEMFD_SECRET = 444, 447
MFD_HUGETLB, CLONE_FILES, SIGCHLD = 4, 0x400, 17


def _buffer(data: bytes) -> tuple[int, object]:
    """Address of a copy of `data`, and what keeps it alive."""
    held = ctypes.create_string_buffer(data, len(data))
    return ctypes.addressof(held), held


def _call(nr: int, data: bytes, *args: int, first: tuple[int, ...] = ()) -> int:
    """A system call that takes a pointer to `data` after the arguments `first`."""
    address, _held = _buffer(data)
    return syscall(nr, *first, address, *args)


def _terminal() -> None:
    master, slave = os.openpty()
    os.close(master)
    at(10, slave)


def _kvm_vm() -> int:
    return fcntl.ioctl(os.open("/dev/kvm", os.O_RDWR), 0xAE01, 0)  # KVM_CREATE_VM


def _perf() -> int:
    attributes = struct.pack("IIQQQQ", 1, 112, 0, 0, 0, 0) + bytes(72)  # software, cpu clock
    return _call(SYS_PERF_EVENT_OPEN, attributes, 0, -1, -1, 0)


def _bpf_map() -> int:
    return _call(SYS_BPF, struct.pack("IIII", 2, 4, 4, 1) + bytes(56), 72, first=(0,))


def _mqueue() -> int:
    name = f"lazyproc-{os.getpid()}".encode()
    fd = _call(SYS_MQ_OPEN, name + b"\0", os.O_CREAT | os.O_RDWR, 0o600, 0)
    ctypes.CDLL(None).mq_unlink(b"/" + name)
    return fd


def _path_of(fd: int) -> int:
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_PATH)
    finally:
        os.close(fd)


KINDS: dict[str, tuple[Callable[[], int], str]] = {
    "path of a socket": (
        lambda: _path_of(socket.socket().detach()),
        "is an O_PATH descriptor of socket:[",
    ),
    "path of an eventfd": (
        lambda: _path_of(os.eventfd(0)),
        "is an O_PATH descriptor of anon_inode:[eventfd]; let the program close it",
    ),
    "pidfd": (lambda: os.pidfd_open(os.getpid()), "is a pidfd; let the program close it"),
    "userfaultfd": (lambda: syscall(SYS_USERFAULTFD, 0), "is a userfaultfd: the program serves its own"),
    "io_uring": (
        lambda: _call(SYS_IO_URING_SETUP, bytes(120), first=(4,)),
        "is an io_uring, whose rings and requests in flight the kernel does not give out; run the program",
    ),
    "fanotify": (lambda: syscall(SYS_FANOTIFY_INIT, 0, 0), "is a fanotify group of this host"),
    "perf": (_perf, "is a performance counter of this host; stop profiling"),
    "bpf": (_bpf_map, "is a BPF map in this host's kernel"),
    "fsopen": (lambda: _call(SYS_FSOPEN, b"tmpfs\0", 0), "is a file system being configured"),
    "landlock": (
        lambda: _call(SYS_LANDLOCK_CREATE_RULESET, struct.pack("Q", 1), 8, 0),
        "is a Landlock ruleset",
    ),
    "kvm": (
        lambda: os.open("/dev/kvm", os.O_RDWR),
        "/dev/kvm is KVM (character device 10:232); move a virtual",
    ),
    "kvm-vm": (_kvm_vm, "is a KVM virtual machine; move it with `lazyproc migrate --qemu`"),
    "tun": (lambda: os.open("/dev/net/tun", os.O_RDWR), "/dev/net/tun is a tun/tap interface of this host"),
    "fuse": (lambda: os.open("/dev/fuse", os.O_RDWR), "/dev/fuse is a FUSE connection to this host's kernel"),
    "kmsg": (
        lambda: os.open("/dev/kmsg", os.O_RDONLY),
        "/dev/kmsg is a device of this host (character device 1:11)",
    ),
    "namespace": (lambda: os.open("/proc/self/ns/net", 0), "is a handle on a namespace of this host (net)"),
    "memfd_secret": (lambda: syscall(SYS_MEMFD_SECRET, 0), "is secret memory, which nobody but the process"),
    "hugetlb": (lambda: os.memfd_create("huge", MFD_HUGETLB), "is on hugetlbfs; run the program without"),
    "mqueue": (_mqueue, "is a POSIX message queue; let the program close the queue"),
    "proc": (
        lambda: os.open("/proc/1/status", 0),
        "describes a process of this host; let the program close it",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_that_cannot_be_dumped(kind: str) -> None:
    make, words = KINDS[kind]
    try:
        os.close(make())
    except OSError as error:
        pytest.skip(f"this kernel makes no {kind} here: {error.strerror}")
    with stopped(lambda: at(10, make())) as tasks:
        explained = [obstacle for obstacle in explain_descriptors(tasks) if obstacle.where == "fd 10"]
        gathered = gather_descriptors(tasks)
        with gathered.sockets:
            assert [o for o in gathered.obstacles if o.where == "fd 10"] == explained
    assert len(explained) == 1
    assert words in f"{explained[0].why}; {explained[0].remedy}"


def test_a_terminal_whose_master_is_elsewhere() -> None:
    words = next(words for words in obstacle_words(_terminal) if words.startswith("fd 10: /dev/"))
    assert "is a terminal of this host; start the program with input and output redirected: setsid" in words


def test_standard_regular_tree_has_no_obstacle(tmp_path: Path) -> None:
    def body() -> None:
        at(10, os.open(tmp_path / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND))
        reading, writing = os.pipe()
        at(11, reading)
        at(12, writing)
        os.write(12, b"unread")

    with stopped(body) as tasks:
        assert explain_descriptors(tasks) == []


def test_leases_and_who_waits_for_a_lock(tmp_path: Path) -> None:
    def lease() -> None:
        at(10, os.open(tmp_path / "leased", os.O_CREAT | os.O_RDWR))
        fcntl.fcntl(10, fcntl.F_SETLEASE, fcntl.F_WRLCK)

    def lock() -> None:
        at(10, os.open(tmp_path / "locked", os.O_CREAT | os.O_RDWR))
        fcntl.lockf(10, fcntl.LOCK_SH, 5)

    (words,) = obstacle_words(lease)
    assert words.startswith(
        "fd 10: it holds a lease for writing, which ends when the file is opened elsewhere; "
    )
    with stopped(lock) as tasks:
        assert explain_descriptors(tasks) == []
        waiter = os.fork()
        if waiter == 0:
            with ending(), (tmp_path / "locked").open("r+") as file:
                fcntl.lockf(file, fcntl.LOCK_EX)
        try:
            wait_until(lambda: waiters_of(tmp_path / "locked") == [waiter], "somebody waits")
            (against,) = explain_descriptors(tasks)
        finally:
            os.kill(waiter, signal.SIGKILL)
            os.waitpid(waiter, 0)
        assert (against.pid, against.where) == (tasks[0].pid, "fd 10")
        assert against.why.startswith(f"pid {waiter} waits for its file lock (POSIX)")


def test_hard_link_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()

    def body() -> None:
        at(10, os.open(tmp_path / "a", os.O_CREAT | os.O_RDWR))
        os.rename(tmp_path / "a", tmp_path / "b")
        os.link(tmp_path / "b", tmp_path / "elsewhere" / "c")
        os.unlink(tmp_path / "b")

    (words,) = obstacle_words(body)
    assert f"{tmp_path / 'b'} does not lead to it from the tree's root directory" in words
    assert f"give it back that name: ln -L /proc/PID/fd/N {tmp_path / 'b'}" in words


def test_too_much_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "CONTENT_LIMIT", 2 << 20)

    def body() -> None:
        at(10, os.open(tmp_path / "big", os.O_CREAT | os.O_RDWR))
        os.posix_fallocate(10, 0, 3 << 20)
        os.unlink(tmp_path / "big")

    (words,) = obstacle_words(body)
    assert (
        "the deleted file has 3 MiB that would have to travel with the process, and 2 MiB is the limit"
        in words
    )


def test_too_much_content_in_all(tmp_path: Path) -> None:
    """The limit of a move is one of all files together: their content is one message with the rest of the images."""

    def body() -> None:
        for number in (10, 11):
            at(number, os.open(tmp_path / "big", os.O_CREAT | os.O_RDWR))
            os.posix_fallocate(number, 0, 30 << 20)
            os.unlink(tmp_path / "big")

    (words,) = obstacle_words(body)
    assert (
        "the deleted file has 30 MiB that would have to travel with the process, all such files have 60 MiB, and "
        "48 MiB is the limit of a move; keep it on a file system that both hosts have, or use checkpoint"
    ) in words
    with stopped(body) as tasks:
        gathered = gather_descriptors(tasks, permits=ALL)
        with gathered.sockets:
            assert not gathered.obstacles


def test_shared_descriptor_table() -> None:
    def share() -> None:
        if syscall(SYS_CLONE, CLONE_FILES | SIGCHLD) == 0:
            os.kill(os.getpid(), 19)

    with stopped(share) as tasks:
        children = Path(f"/proc/{tasks[0].pid}/task/{tasks[0].pid}/children").read_text().split()
        child = int(children[0])
        pidfd = os.pidfd_open(child)
        try:
            both = [*tasks, TaskRef(child, child, pidfd)]
            (obstacle,) = explain_descriptors(both)
        finally:
            os.close(pidfd)
            os.kill(child, 9)
    assert obstacle.pid == child
    assert obstacle.where == "process"
    assert f"it shares its descriptor table with pid {tasks[0].pid} (CLONE_FILES)" in obstacle.why


def test_thread_with_a_table_of_its_own() -> None:
    def body() -> None:
        started = threading.Event()

        def alone() -> None:
            unshare_descriptors()
            os.close(REPORT)
            started.set()
            threading.Event().wait()

        threading.Thread(target=alone, daemon=True).start()
        started.wait()

    (words,) = obstacle_words(body)
    assert re.match(r"thread \d+: it has a descriptor table of its own", words)


def test_explaining_a_running_process_that_opens_and_closes() -> None:
    """Descriptors that go while they are looked at are no error."""
    pid = os.fork()
    if pid == 0:
        try:
            os.closerange(0, 4096)
            while True:
                for fd in (os.open("/dev/null", os.O_RDONLY), os.eventfd(0), *os.pipe()):
                    os.close(fd)
        finally:
            os._exit(1)
    pidfd = os.pidfd_open(pid)
    try:
        for _ in range(50):
            explain_descriptors([TaskRef(pid, pid, pidfd)])
    finally:
        os.close(pidfd)
        os.kill(pid, 9)
        os.waitpid(pid, 0)
