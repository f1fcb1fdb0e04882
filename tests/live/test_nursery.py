"""The program that restored processes are forked from: what it is given, and that its start leaves nothing in us."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lazyproc.errors import HostLacks
from lazyproc.kernel import proc
from lazyproc.kernel._core import ffi, lib
from lazyproc.kernel.arch_x86_64 import SYS
from lazyproc.kernel.nursery import Nursery, nursery
from lazyproc.kernel.tracee import wait_gone

NUMBER = 70
SIG_OF_GLIBC = 32  # which its own functions do not touch
A_DAY_ON = "monotonic 86400 0\nboottime 86400 0\n"


@contextmanager
def started(*, pidns: bool = False) -> Iterator[Nursery]:
    with nursery(pidns=pidns, transport_fd=NUMBER) as made:
        try:
            yield made
        finally:
            os.kill(made.pid, signal.SIGKILL)
            wait_gone([made.pid])


def namespace(pid: int, name: str) -> str:
    return os.readlink(f"/proc/{pid}/ns/{name}")


def disposition(sig: int, handler: int) -> int:
    """Sets that of this process by the kernel's own call, and returns the one before."""
    new, old = ffi.new("uint64_t[4]", [handler, 0, 0, 0]), ffi.new("uint64_t[4]")
    addrs = (int(ffi.cast("intptr_t", action)) for action in (new, old))
    assert lib.lp_syscall(SYS["rt_sigaction"], sig, *addrs, 8, 0, 0) == 0
    return int(old[0])


def test_it_has_nothing_of_ours() -> None:
    blocked = {signal.SIGUSR1, signal.SIGINT}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    ignored = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    glibcs = disposition(SIG_OF_GLIBC, signal.SIG_IGN)
    try:
        with started() as made:
            status = proc.status(proc.read(made.pid, "status"))
            assert (status.sig_blocked, status.sig_ignored, status.sig_caught) == (0, 0, 0)
            assert os.listdir(f"/proc/{made.pid}/fd") == [str(NUMBER)]
            assert proc.read(made.pid, "environ") == b""
            assert os.getsid(made.pid) != os.getsid(0)
            assert all(
                namespace(made.pid, name) == namespace(os.getpid(), name) for name in ("pid", "time", "mnt")
            )
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before | blocked
    finally:
        signal.signal(signal.SIGUSR2, ignored)
        disposition(SIG_OF_GLIBC, glibcs)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_it_is_in_its_namespaces() -> None:
    with started(pidns=True) as made, made.new_clocks() as clocks:
        made.move_transport(NUMBER + 1)
        made.set_clocks(A_DAY_ON)
        assert all(namespace(made.pid, name) != namespace(os.getpid(), name) for name in ("pid", "mnt"))
        assert proc.status(proc.read(made.pid, "status")).ns_pid[-1] == 1
        assert b"86400" in proc.read(made.pid, "timens_offsets")
        assert b"86400" not in proc.read(os.getpid(), "timens_offsets")
        assert namespace(made.pid, "time_for_children") != namespace(os.getpid(), "time")
        assert namespace(made.pid, "time_for_children") == os.readlink(f"/proc/self/fd/{clocks}")
        assert namespace(made.pid, "time") == namespace(os.getpid(), "time")
        assert os.listdir(f"/proc/{made.pid}/fd") == [str(NUMBER + 1)]


def test_offsets_that_the_kernel_refuses() -> None:
    with pytest.raises(HostLacks, match="clocks"), started() as made, made.new_clocks():
        made.set_clocks("nonsense\n")


def test_many_are_started_at_the_same_time() -> None:
    """The half-way processes run in our memory, each on the stack of the thread that sleeps for it."""
    spaces = []

    def work() -> None:
        for _ in range(20):
            with started() as made, made.new_clocks():
                made.set_clocks(A_DAY_ON)
                spaces.append(namespace(made.pid, "time_for_children"))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(spaces) == 80
    assert namespace(os.getpid(), "time") not in spaces
