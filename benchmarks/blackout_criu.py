"""The blackout as the cargo sees it, lazyproc beside CRIU with lazy pages: threads, mappings and a gibibyte."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from benchmarks.engines import by_lazy_criu, by_lazyproc
from benchmarks.measure import Goal, Result, Samples, brief
from benchmarks.toucher import LAZY, OURS, moved
from benchmarks.touching import Cargo

PLAIN = Cargo("think", 1024, 5)
THREADS, VMAS = 64, 1000
# A small cargo, and what of it is grown: what each costs is the difference.
SMALL = Cargo("think", 64)
GROWN = {f"{THREADS} threads": Cargo("think", 64, THREADS), f"{VMAS} VMAs": Cargo("think", 64, 1, VMAS)}
PROTOTYPE_MS = {f"{THREADS} threads": THREADS * 0.085, f"{VMAS} VMAs": VMAS * 0.002}


def run(rounds: int) -> Result:
    values: dict[str, list[float]] = defaultdict(list)
    ours = {"5 threads, 1 GiB": PLAIN, "1 thread": SMALL, **GROWN}
    for _ in range(rounds):
        for name, cargo in ours.items():
            values[f"{name}, {OURS}"].append(moved(by_lazyproc, cargo).blackout_ms)
        values[f"5 threads, 1 GiB, {LAZY}"].append(moved(by_lazy_criu, PLAIN).blackout_ms)
    samples = {name: Samples("ms", tuple(found)) for name, found in values.items()}
    base = samples[f"1 thread, {OURS}"]
    mine, theirs = (samples[f"5 threads, 1 GiB, {engine}"] for engine in (OURS, LAZY))
    goals = [Goal.of("5 threads, 1 GiB: lazyproc / CRIU lazy", 1 / 15, mine, theirs)]
    for name, slope in PROTOTYPE_MS.items():
        grown = samples[f"{name}, {OURS}"]
        added = Samples(
            "x", tuple((more - less) / slope for more, less in zip(grown.values, base.values, strict=True))
        )
        goal = Goal.of(f"{name}: what they add / the prototype's", 3, added)
        goals.append(replace(goal, words=f"{brief(added.median * slope)} / {brief(slope)} ms"))
    return Result("blackout seen by the cargo", samples, goals)
