"""System calls in a process that runs: its first thread is stopped for the moment they take."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from lazyproc.kernel import proc
from lazyproc.kernel import tracee as ptrace
from lazyproc.kernel.remote import Stub, lone_stub, refuse_unfit
from lazyproc.kernel.settle import settle, settle_again
from lazyproc.kernel.tracee import Memory, Tracee

STOP_MS = 2000


def call_in(pid: int, name: str, *args: int) -> None:
    """Make the call in the first thread of `pid`; see `visiting`."""
    with visiting(pid) as (stub, _):
        stub.call(name, *args)


@contextmanager
def visiting(pid: int) -> Iterator[tuple[Stub, Memory]]:
    """Calls in the first thread of `pid`, and its memory; the other threads run on. The program does not see the stop.

    Raises NoSuchProcess, PermissionDenied (a debugger traces it), TraceeError.
    """
    tracee = Tracee(pid)
    tracee.seize(ptrace.PTRACE_O_TRACESYSGOOD)
    try:
        tracee.interrupt()
        tracee.wait_stop(STOP_MS)
        stopped_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        status, ours = (proc.status(proc.read(each, "status")) for each in (pid, os.getpid()))
        (state,) = ptrace.states([tracee])
        refuse_unfit([tracee], [state])
        with ptrace.memory(pid) as memory:
            stopped = settle(tracee, state, status, memory, None, stopped_ns)
            if status.seccomp and not ours.seccomp:  # who is filtered may not suspend a filter (ptrace(2))
                tracee.set_options(ptrace.PTRACE_O_TRACESYSGOOD | ptrace.PTRACE_O_SUSPEND_SECCOMP)
            try:
                with lone_stub(tracee, stopped.state, memory, proc.maps(proc.read(pid, "maps"))) as stub:
                    yield stub, memory
            finally:
                settle_again(tracee, stopped.ended_by_stop, status, stopped.state.blocked)
    finally:
        tracee.detach()
