"""What a trace of all faults costs: the mean first touch of local pages, with `restore --trace` and without.

The mean and not the median: the drain takes its time from few touches.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import lazyproc
from benchmarks.local_fault import Cargo, compiled
from benchmarks.measure import Goal, Result, interleaved

PAGES = 1 << 16  # 256 MiB, and as many faults
PAIRS = 3  # in each round: one run differs from the next by more than what is looked for


def run(rounds: int) -> Result:
    with tempfile.TemporaryDirectory(prefix="lazyproc-bench-", dir="/var/tmp") as name:
        folder = Path(name)
        cargo, trace = Cargo(folder, compiled("first_touch", folder), PAGES), folder / "trace"

        def traced() -> float:
            mean = cargo.touch_all(trace).mean / 1e3
            seen = lazyproc.read_trace(trace)
            if len(seen) < PAGES or seen.lost:
                raise RuntimeError(f"the trace has {len(seen)} faults of {PAGES}, {seen.lost} are lost")
            return mean

        samples = interleaved(
            {"mean first touch, traced": traced, "not traced": lambda: cargo.touch_all().mean / 1e3},
            rounds * PAIRS,
            "us",
        )
    on, off = samples.values()
    return Result(
        "the cost of a trace",
        samples,
        [Goal("mean first touch, traced / not traced", on.median / off.median, 1.02)],
    )
