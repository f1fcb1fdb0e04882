"""Taking memory away from a parked process, which never runs again: it is madvise(2) in the process itself, since
process_madvise(2) refuses MADV_DONTNEED for another one (docs/adr/0014-release.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lazyproc.errors import TraceeError
from lazyproc.facts import dataclass
from lazyproc.kernel.park import ParkedProcess, ParkedThread
from lazyproc.kernel.parked import bench_in
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


@contextmanager
def discarding(process: ParkedProcess, thread: ParkedThread, traced: bool) -> Iterator[Discarder]:
    """In a parked process, with that thread; see `bench_in`."""
    with bench_in(process, thread, traced=traced) as (tracee, bench):
        yield Discarder(tracee, bench)
