"""Taking memory away from a parked process, which never runs again: it is madvise(2) in the process itself, since
process_madvise(2) refuses MADV_DONTNEED for another one (docs/adr/0014-release.md).

One of its threads runs a program of many calls in one stop, and its way home is the parking code: were we killed at any
instruction, the thread would end the program by itself and pause for ever as before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from lazyproc.errors import LazyprocError, TraceeError
from lazyproc.facts import dataclass, replace
from lazyproc.kernel import arch_x86_64 as arch
from lazyproc.kernel import proc, remote
from lazyproc.kernel import tracee as ptrace
from lazyproc.kernel.park import STOP_MS, ParkedProcess, ParkedThread
from lazyproc.kernel.remote import Bench, Call
from lazyproc.kernel.tracee import Tracee

MADV_DONTNEED = 4
CALLS = 1024  # in one program


@dataclass(frozen=True, slots=True)
class Discarder:
    """A parked process, stopped, with a bench in it."""

    tracee: Tracee
    bench: Bench

    def discard(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Free (address, bytes) of private memory. What the kernel refuses stays: nobody depends on its being free.
        Raises NoSuchProcess when it is killed meanwhile, TraceeError.
        """
        for first in range(0, len(ranges), CALLS):
            part = ranges[first : first + CALLS]
            calls = [Call("madvise", (*each, MADV_DONTNEED), may_fail=True) for each in part]
            try:
                self.bench.run(self.tracee, calls)
            except TraceeError:
                self.bench.memory.demand_there()
                raise


def may_discard(process: ParkedProcess) -> ParkedThread | None:
    """A thread that can do it: its seccomp filters, when our own death makes them count again, might kill it."""
    for thread in process.threads:
        if not proc.status(proc.read(process.pid, f"task/{thread.tid}/status")).seccomp:
            return thread
    return None


@contextmanager
def discarding(process: ParkedProcess, thread: ParkedThread, traced: bool) -> Iterator[Discarder]:
    """With that thread of a parked process, which is stopped at the end if it was (`traced`, by us), else let go.

    Raises NoSuchProcess, PermissionDenied when somebody traces it, TraceeError.
    """
    tracee = Tracee(thread.tid)
    if traced:
        with _bench(process, thread, tracee) as discarder:
            yield discarder
        return
    tracee.seize()
    try:
        tracee.interrupt()
        tracee.wait_stop(STOP_MS)
        with _bench(process, thread, tracee) as discarder:
            yield discarder
    finally:
        with suppress(LazyprocError):
            tracee.detach()


@contextmanager
def _bench(process: ParkedProcess, thread: ParkedThread, tracee: Tracee) -> Iterator[Discarder]:
    """Wherever it stands, in a program that a killed predecessor has left perhaps, its home is the parking code."""
    status = proc.status(proc.read(process.pid, f"task/{thread.tid}/status"))
    home = replace(
        ptrace.states([tracee])[0],
        registers=arch.parked(thread.registers, process.at),
        blocked=arch.MASK64,
    )
    ending = remote.ending_signal(status.sig_caught, status.sig_pending | status.shared_pending)
    maps = proc.maps(proc.read(process.pid, "maps"))
    with (
        ptrace.memory(process.pid) as memory,
        remote.borrowed([tracee], [home], memory, maps, ending=ending) as bench,
    ):
        yield Discarder(tracee, bench)
