"""Calls in a parked process: one of its threads runs a program of many calls in one stop, and its way home is the
parking code. Were we killed at any instruction, it would end the program by itself and pause for ever as before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from lazyproc.errors import LazyprocError
from lazyproc.facts import replace
from lazyproc.kernel import arch_x86_64 as arch
from lazyproc.kernel import proc, remote
from lazyproc.kernel import tracee as ptrace
from lazyproc.kernel.park import STOP_MS, ParkedProcess, ParkedThread
from lazyproc.kernel.remote import BENCH, Bench
from lazyproc.kernel.tracee import Tracee


def unfiltered(process: ParkedProcess) -> ParkedThread | None:
    """A thread whose seccomp filters cannot kill it when our own death makes them count again."""
    for thread in process.threads:
        if not proc.status(proc.read(process.pid, f"task/{thread.tid}/status")).seccomp:
            return thread
    return None


@contextmanager
def bench_in(
    process: ParkedProcess, thread: ParkedThread, *, traced: bool, size: int = BENCH
) -> Iterator[tuple[Tracee, Bench]]:
    """With that thread of a parked process, which is stopped at the end if it was (`traced`, by us), else let go.

    Raises NoSuchProcess, PermissionDenied when somebody traces it, TraceeError.
    """
    tracee = Tracee(thread.tid)
    if traced:
        with _bench(process, thread, tracee, size) as bench:
            yield tracee, bench
        return
    tracee.seize()
    try:
        tracee.interrupt()
        tracee.wait_stop(STOP_MS)
        with _bench(process, thread, tracee, size) as bench:
            yield tracee, bench
    finally:
        with suppress(LazyprocError):
            tracee.detach()


@contextmanager
def _bench(process: ParkedProcess, thread: ParkedThread, tracee: Tracee, size: int) -> Iterator[Bench]:
    """Wherever it stands, in a program that a killed predecessor has left perhaps, its home is the parking code."""
    status = proc.status(proc.read(process.pid, f"task/{thread.tid}/status"))
    if status.seccomp:
        tracee.set_options(ptrace.PTRACE_O_TRACESYSGOOD | ptrace.PTRACE_O_SUSPEND_SECCOMP)
    at = process.at + (arch.SPIN if status.seccomp else 0)
    home = replace(
        ptrace.states([tracee])[0], registers=arch.parked(thread.registers, at), blocked=arch.MASK64
    )
    ending = remote.ending_signal(status.sig_caught, status.sig_pending | status.shared_pending)
    maps = proc.maps(proc.read(process.pid, "maps"))
    with (
        ptrace.memory(process.pid) as memory,
        remote.borrowed([tracee], [home], memory, maps, ending=ending, size=size) as bench,
    ):
        yield bench
