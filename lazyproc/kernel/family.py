"""Processes of our own that outlive the command which started them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

from lazyproc.kernel.arch_x86_64 import SYS
from lazyproc.kernel.sys import syscall

SYS_CLONE = 56
CLONE_FILES = 0x400
PR_SET_PDEATHSIG = 1
EVERY_FD = (1 << 31) - 1
COMM_MAX = 15  # TASK_COMM_LEN less the NUL


def daemon(work: Callable[[], object], name: str) -> int:
    """Run `work` in a process that leads a session of its own, without a terminal, and is no child of ours; its pid.

    Neither Ctrl-C, a hang-up nor our death reaches it. It ends when `work` does.
    """
    reading, writing = os.pipe()
    middle = os.fork()
    if middle == 0:
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            os.close(writing)
            os.setsid()
            _be(work, name)
        os.write(writing, pid.to_bytes(4, "little"))
        os._exit(0)
    os.close(writing)
    os.waitpid(middle, 0)
    with os.fdopen(reading, "rb") as pipe:
        return int.from_bytes(pipe.read(4), "little")


def child(work: Callable[[], object], name: str) -> int:
    """Run `work` in a child process; its pid."""
    pid = os.fork()
    if pid == 0:
        _be(work, name)
    return pid


def child_sharing_descriptors(work: Callable[[], object], name: str) -> int:
    """Run `work` in a child process that has one descriptor table with us (CLONE_FILES); its pid.

    A descriptor that either opens is the other's too, and lives as long as one of them does: so a userfaultfd that is
    born while a process forks (userfaultfd(2), UFFD_EVENT_FORK) is in both at once. exec(2) would end that, so it is a
    fork. To be called while this process has one thread: no lock may be held by another.
    """
    import ctypes

    libc, python = ctypes.PyDLL(None), ctypes.pythonapi  # PyDLL keeps the GIL: the child continues with it
    libc.syscall.restype = ctypes.c_long
    python.PyOS_BeforeFork()
    pid = int(libc.syscall(SYS_CLONE, CLONE_FILES | signal.SIGCHLD, 0, 0, 0, 0))
    if pid == 0:
        python.PyOS_AfterFork_Child()
        _be(work, name)
    python.PyOS_AfterFork_Parent()
    if pid < 0:
        raise OSError("a process that shares our descriptors cannot be made; see `ulimit -u`")
    return pid


def end_with_parent(parent: int) -> None:
    """From now on the end of the thread that forked us, of process `parent`, is ours (prctl(2), PR_SET_PDEATHSIG)."""
    syscall(SYS["prctl"], PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended before we could say so
        os.kill(os.getpid(), signal.SIGKILL)


def keep_only(*fds: int) -> None:
    """Close every other descriptor: userfaultfds, doors and terminals of the process that we were must not live on in
    us.
    """
    null = os.open(os.devnull, os.O_RDWR)
    for fd in {0, 1, 2} - {*fds}:
        os.dup2(null, fd)
    for below, above in pairwise([*sorted({0, 1, 2, *fds}), EVERY_FD]):
        os.closerange(below + 1, above)


def _be(work: Callable[[], object], name: str) -> NoReturn:
    """The rest of a child's life. Nothing of the parent's (exit handlers, open buffers) is run or written again."""
    status = 1
    try:
        with suppress(OSError):
            Path("/proc/self/comm").write_text(name[:COMM_MAX])
        work()
        status = 0
    except BaseException:
        import traceback

        with suppress(Exception):
            traceback.print_exc()
    finally:
        os._exit(status)
