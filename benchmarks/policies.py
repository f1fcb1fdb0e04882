"""What to fetch next: every policy under the same cargoes, interleaved."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

from benchmarks.engines import by_lazyproc
from benchmarks.local_fault import compiled
from benchmarks.measure import Result, Samples
from benchmarks.toucher import collected, moved
from benchmarks.touching import Cargo

LINK = "1gbit"
# MiB by mode of touch.c, which has the us of work after each visit where the cargo is to be slower than the link.
MODES = {"random": 64, "think": 64, "zipf": 128, "sequential:100": 128, "jumps:100": 128, "walks:100": 128}
POLICIES = ("sequential", "smallest-first", "around", "stride", "pivots", "adaptive")
SHOWN = ("resident_ms", "stalls", "stall_sum_ms", "stall_p99_ms")


def run(rounds: int) -> Result:
    """At 1 Gbit: between what a link brings and what a cargo touches first there is something to choose."""
    with tempfile.TemporaryDirectory(prefix="lazyproc-bench-", dir="/var/tmp") as folder:
        binary = compiled("touch", Path(folder))
        samples = collected(
            rounds,
            {
                f"{mode}, {policy}": partial(
                    moved,
                    partial(by_lazyproc, options=("--policy", policy)),
                    Cargo(mode, mib),
                    binary,
                    LINK,
                )
                for mode, mib in MODES.items()
                for policy in POLICIES
            },
        )
    named: dict[str, Samples] = {
        f"{name}: {key}": found for (key, name), found in sorted(samples.items()) if key in SHOWN
    }
    return Result(f"policies at {LINK}", named, [])
