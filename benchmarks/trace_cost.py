"""What a trace of all faults costs: the mean first touch of local pages, with `restore --trace` and without.

The mean and not the median: the drain takes its time from few touches. The cargo and its pager have a processor each:
where the scheduler puts them both on one, now and then, a touch costs a fifth, and hides what is looked for.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lazyproc
from benchmarks.local_fault import PAGES, Cargo
from benchmarks.measure import Goal, Result, interleaved, paired

PAIRS = 2  # in each round: one run differs from the next by more than what is looked for


@contextmanager
def on(cpu: int) -> Iterator[None]:
    """This process, and what it starts meanwhile, on one processor."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def run(rounds: int) -> Result:
    cpus = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="lazyproc-bench-", dir="/var/tmp") as name:
        folder = Path(name)
        with on(cpus[0]):
            cargo = Cargo(folder, PAGES)
        trace = folder / "trace"

        def traced() -> float:
            mean = cargo.touch_all(trace).mean / 1e3
            seen = lazyproc.read_trace(trace)
            if len(seen) < PAGES or seen.lost:
                raise RuntimeError(f"the trace has {len(seen)} faults of {PAGES}, {seen.lost} are lost")
            return mean

        with on(cpus[-1]):
            samples = interleaved(
                {"mean first touch, traced": traced, "not traced": lambda: cargo.touch_all().mean / 1e3},
                rounds * PAIRS,
                "us",
            )
    goal = Goal.of("traced / not traced, median of the pairs", 1.02, paired(*samples.values()))
    return Result("the cost of a trace", samples, [goal])
