"""Processes with sockets, and their sockets gathered and made again: shared by the test_sockets_* modules."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lazyproc.dump.descriptors import Gathered, explain_descriptors, gather_descriptors
from lazyproc.dump.registry import TaskRef
from lazyproc.dump.tcp import silence
from lazyproc.kernel.sys import syscall
from lazyproc.model import Checkpoint
from lazyproc.restore.files import make_files
from lazyproc.restore.sockets import make_sockets
from tests.live.descriptors import at, checkpoint_of, stopped

SYS_UNSHARE, SYS_SETNS, CLONE_NEWNET = 272, 308, 0x40000000
Body = Callable[[], object]


def handed_over(tasks: Sequence[TaskRef], *, tcp_close: bool = False) -> Checkpoint:
    """The checkpoint of a stopped chain whose connections will end without a word."""
    gathered = gather_descriptors(tasks, tcp_close=tcp_close)
    with gathered.sockets:
        assert not gathered.obstacles, "\n".join(map(str, gathered.obstacles))
        if not tcp_close:
            silence(gathered.sockets.connections())
    return checkpoint_of(gathered)


@contextmanager
def dumped(*bodies: Body, tcp_close: bool = False) -> Iterator[Checkpoint]:
    """The checkpoint of a chain that is gone inside, with its sockets, as it would be on another host."""
    with stopped(*bodies) as tasks:
        checkpoint = handed_over(tasks, tcp_close=tcp_close)
    yield checkpoint


@contextmanager
def remade(*bodies: Body, tcp_close: bool = False) -> Iterator[dict[int, socket.socket]]:
    """Numbers in the first process of the chain to our sockets made from them."""
    with dumped(*bodies, tcp_close=tcp_close) as checkpoint, made_sockets(checkpoint) as found:
        yield found


@contextmanager
def made_sockets(checkpoint: Checkpoint) -> Iterator[dict[int, socket.socket]]:
    """Our sockets by their number in the first process."""
    with ExitStack() as stack:
        made = stack.enter_context(make_files(checkpoint, open_path=os.open))
        sockets = stack.enter_context(make_sockets(checkpoint, made.files))
        sockets.fill_queues(made.files, {})
        sockets.leave_repair()
        numbers = {row.fd: made.files[row.file_id] for row in checkpoint.root.descriptors}
        found = {number: socket.socket(fileno=os.dup(fd)) for number, fd in numbers.items() if _is_socket(fd)}
        for sock in found.values():
            stack.enter_context(sock)
        yield found


def _is_socket(fd: int) -> bool:
    return os.readlink(f"/proc/self/fd/{fd}").startswith("socket:")


def put(number: int, sock: socket.socket) -> socket.socket:
    """Move a socket of the child to the number the test knows it by."""
    at(number, sock.detach())
    return socket.socket(fileno=number)


def keep(*sockets: socket.socket) -> None:
    """Leave the sockets open at their numbers when their Python objects go."""
    for sock in sockets:
        sock.detach()


def words(gathered: Gathered) -> list[str]:
    return [f"{obstacle.where}: {obstacle.why}; {obstacle.remedy}" for obstacle in gathered.obstacles]


def obstacle_words(*bodies: Body) -> list[str]:
    """What stops the dump of such a chain; explaining it beforehand says the same."""
    with stopped(*bodies) as tasks:
        explained = explain_descriptors(tasks)
        gathered = gather_descriptors(tasks)
        with gathered.sockets:
            assert gathered.obstacles == explained
            return words(gathered)


class Network:
    """A network namespace of the test's own, with loopback up."""

    def __init__(self, stack: ExitStack) -> None:
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            syscall(SYS_UNSHARE, CLONE_NEWNET)
            self.fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, self.fd)
            ip("link set lo up")
        finally:
            syscall(SYS_SETNS, home, CLONE_NEWNET)
            os.close(home)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """The calling thread, and what it starts, is in the namespace."""
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        syscall(SYS_SETNS, self.fd, CLONE_NEWNET)
        try:
            yield
        finally:
            syscall(SYS_SETNS, home, CLONE_NEWNET)
            os.close(home)

    @property
    def path(self) -> str:
        """What ip(8) takes as a namespace."""
        return f"/proc/{os.getpid()}/fd/{self.fd}"

    def resets_sent(self) -> int:
        return self._count("OutRsts")

    def segments_sent(self) -> int:
        return self._count("OutSegs")

    def _count(self, name: str) -> int:
        """A counter of TCP in /proc/net/snmp."""
        with self.inside():
            text = Path("/proc/thread-self/net/snmp").read_text()
        names, values = (line.split() for line in text.splitlines() if line.startswith("Tcp:"))
        return int(values[names.index(name)])


def ip(arguments: str) -> None:
    subprocess.run(["ip", *arguments.split()], check=True)


def eventually(condition: Callable[[], bool], deadline: float = 10.0) -> bool:
    """Whether the condition comes true before the deadline, in seconds."""
    until = time.monotonic() + deadline
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.005)
    return True
