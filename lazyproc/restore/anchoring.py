"""Anchors (lazytree.py) for processes that somebody else has built and that run already."""

from __future__ import annotations

import array
import fcntl
import mmap
import os
import socket
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from lazyproc.errors import LazyprocError, NoSuchProcess, RestoreError
from lazyproc.kernel import proc
from lazyproc.kernel.remote import Stub
from lazyproc.kernel.sys import pidfd_getfd, pidfd_open
from lazyproc.kernel.tracee import Memory
from lazyproc.kernel.visit import visiting
from lazyproc.model import PAGE
from lazyproc.restore.lazytree import LazyTask, LazyTree
from lazyproc.restore.pages import read_only
from lazyproc.restore.site import CMSG, MSG_CMSG_CLOEXEC, MSGHDR

IOV, BYTE, CONTROL = 64, 128, 256  # where they lie in the page, behind the message's header
_PAIR = struct.Struct("<2i")
_IOVEC = struct.Struct("<QQ")


def is_traced(pid: int) -> bool:
    """By whoever is about to let it run, or by a debugger. Raises NoSuchProcess."""
    return proc.status(proc.read(pid, "status")).tracer_pid != 0


def plant(task: LazyTask, fds: Sequence[int]) -> None:
    """The process gets `fds` (userfaultfd, ledger, cradle) as its anchors, under the numbers of `task`.

    Its first thread is stopped for less than a millisecond. Raises NoSuchProcess, PermissionDenied (it is traced),
    TraceeError, RestoreError (a number is taken); it has none then, or those before the one that failed.
    """
    numbers = (task.userfaultfd, task.ledger, task.cradle)
    with visiting(task.pid) as (stub, memory), _page_in(stub) as page, _pair_in(stub, memory, page) as pair:
        _send(task.pid, pair[0], fds)
        for fd, number in zip(_receive(stub, memory, page, pair[1], len(fds)), numbers, strict=True):
            _move(stub, fd, number)


@contextmanager
def _page_in(stub: Stub) -> Iterator[int]:
    prot, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    page = stub.call("mmap", 0, PAGE, prot, flags, -1, 0)
    try:
        yield page
    finally:
        stub.call("munmap", page, PAGE)


@contextmanager
def _pair_in(stub: Stub, memory: Memory, page: int) -> Iterator[tuple[int, int]]:
    """Two connected sockets of the process."""
    stub.call("socketpair", socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, 0, page)
    near, far = _PAIR.unpack(memory.read(page, _PAIR.size))
    try:
        yield near, far
    finally:
        for fd in (near, far):
            stub.call("close", fd)


def _send(pid: int, number: int, fds: Sequence[int]) -> None:
    pidfd = pidfd_open(pid)
    try:
        with socket.socket(fileno=pidfd_getfd(pidfd, number)) as near:
            near.sendmsg([b"\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
    finally:
        os.close(pidfd)


def _receive(stub: Stub, memory: Memory, page: int, far: int, count: int) -> list[int]:
    room = CMSG.size + 4 * count
    memory.write(page + IOV, _IOVEC.pack(page + BYTE, 1))
    memory.write(page, MSGHDR.pack(0, 0, page + IOV, 1, page + CONTROL, room, 0))
    stub.call("recvmsg", far, page, socket.MSG_DONTWAIT | MSG_CMSG_CLOEXEC)
    length, _, kind = CMSG.unpack(memory.read(page + CONTROL, CMSG.size))
    arrived = (length - CMSG.size) // 4 if kind == socket.SCM_RIGHTS else 0
    got = list(struct.unpack(f"<{arrived}i", memory.read(page + CONTROL + CMSG.size, 4 * arrived)))
    if arrived < count:
        for fd in got:
            stub.call("close", fd)
        raise RestoreError("has no room for its anchors", where="RLIMIT_NOFILE", remedy="raise it")
    return got


def _move(stub: Stub, fd: int, number: int) -> None:
    """Out of the program's way; what it has opened there meanwhile stays."""
    try:
        got = stub.call("fcntl", fd, fcntl.F_DUPFD_CLOEXEC, number)
    finally:
        stub.call("close", fd)
    if got != number:
        stub.call("close", got)
        raise RestoreError(f"has {number} open already", where="descriptors", remedy="")


def anchor(
    tree: LazyTree, due: Mapping[int, int], ledger: int, cradle: int
) -> tuple[dict[int, int], list[LazyprocError]]:
    """Those of `due` (index of a task to a userfaultfd of ours) that can be visited get their anchors. The others,
    which are traced still, and why some will never get theirs.
    """
    left, failed = {}, []
    with read_only(ledger) as readable:
        for index, userfaultfd in due.items():
            task = tree.tasks[index]
            try:
                if not proc.lives(task.pid, task.started):
                    continue
                if is_traced(task.pid):
                    left[index] = userfaultfd
                else:
                    plant(task, (userfaultfd, readable, cradle))
            except NoSuchProcess:
                continue
            except LazyprocError as error:
                failed.append(error)
    return left, failed
