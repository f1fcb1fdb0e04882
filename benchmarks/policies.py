"""What to fetch next: every policy under the same cargoes, interleaved."""

from __future__ import annotations

from functools import partial

from benchmarks.engines import by_lazyproc
from benchmarks.measure import Result
from benchmarks.toucher import UNITS, moved, samples_of, taken
from benchmarks.touching import Cargo
from benchmarks.wires import Link

LINK = Link("1gbit")
# A mode of touch.c has the us of work after each visit where the cargo is to be slower than the link.
CARGOES = {
    "scan": Cargo("sequential:100", 128),
    "every 7th": Cargo("jumps:100", 128),
    "walks": Cargo("walks:100", 128),
    "random": Cargo("random", 64),
    "random with rests": Cargo("think", 64),
    "zipf": Cargo("zipf", 128),
}
POLICIES = ("sequential", "smallest-first", "around", "stride", "pivots", "adaptive")
SHOWN = ("resident_ms", "stalls", "stall_sum_ms", "stall_p99_ms")


def run(rounds: int) -> Result:
    """At 1 Gbit: between what a link brings and what a cargo touches first there is something to choose."""
    readings = taken(
        rounds,
        {
            f"{name}, {policy}": partial(
                moved, partial(by_lazyproc, options=("--policy", policy)), cargo, LINK
            )
            for name, cargo in CARGOES.items()
            for policy in POLICIES
        },
    )
    samples = samples_of(readings, {name: UNITS[name] for name in SHOWN})
    return Result(f"policies at {LINK.rate}", samples, [])
