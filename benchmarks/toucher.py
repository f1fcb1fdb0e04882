"""One cargo, several engines: how long until all its memory is there, and what its first visits cost it meanwhile."""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.engines import ENGINES, Engine, Report
from benchmarks.local_fault import compiled
from benchmarks.measure import Goal, Result, Samples
from benchmarks.touching import Board, Cargo, Toucher, pid_in, resident_kib, stall_ms, touching
from lazyproc.hosts import Pair, pair_of_hosts

DEADLINE_S = 120.0
POLL_S = 0.002
OURS, LAZY = "lazyproc", "CRIU lazy"
# Fields of Reading that have a goal, and what of CRIU's they may be.
GOALS = {"resident_ms": 1 / 5, "stall_sum_ms": 1 / 4, "stall_p99_ms": 1 / 4}
UNITS = {"resident_ms": "ms", "stall_sum_ms": "ms", "stall_p50_ms": "ms", "stall_p99_ms": "ms"} | {
    "stalls": "stalls",
    "blackout_ms": "ms",
    "longest_gap_ms": "ms",
}


@dataclass(frozen=True, slots=True)
class Reading:
    """One move, as its cargo and the kernel saw it."""

    board: Board
    resident_ms: float  # from the last visit before the move until every page is there
    stall_sum_ms: float
    stall_p50_ms: float
    stall_p99_ms: float
    report: Report

    @property
    def stalls(self) -> float:
        return self.board.stalls

    @property
    def blackout_ms(self) -> float:
        return self.board.blackout_ms

    @property
    def longest_gap_ms(self) -> float:
        return self.board.longest_gap / 1e6


def moved(
    engine: Engine,
    cargo: Cargo,
    binary: Path,
    rate: str | None = None,
    stay_s: float = 0.0,
    *,
    ends_first: bool = False,
) -> Reading:
    """One move of a fresh cargo between fresh hosts. It runs for `stay_s` more at each end, and ends when the engine
    has; or first, where the engine waits for that."""
    with pair_of_hosts(rate) as pair, tempfile.TemporaryDirectory(dir=pair.shared) as name:
        directory = Path(name)
        images = directory / "images"
        images.mkdir()
        with touching(cargo, binary, directory, pair.source) as toucher:
            time.sleep(stay_s)
            with engine(pair, pair.source.vpid(toucher.program.pid), images) as report:
                pid, resident = _until_resident(pair, toucher)
                if ends_first:
                    board, status = toucher.finish(pid)
            if not ends_first:
                time.sleep(stay_s)
                board, status = toucher.finish(pid)
    return Reading(
        board,
        (resident - board.frozen) / 1e6,
        board.stalls_sum / 1e6,
        stall_ms(status, 0.5),
        stall_ms(status, 0.99),
        report,
    )


def _until_resident(pair: Pair, toucher: Toucher) -> tuple[int, int]:
    """The cargo's pid at the destination, and the time of day (ns) at which all its pages were there."""
    toucher.wait_moved()
    pid, whole = pid_in(pair.destination), toucher.cargo.mib << 10
    until = time.monotonic() + DEADLINE_S
    while resident_kib(pid) < whole:
        if time.monotonic() > until:
            raise RuntimeError(f"{resident_kib(pid)} of {whole} KiB are there after {DEADLINE_S} s")
        time.sleep(POLL_S)
    return pid, time.time_ns()


def collected(rounds: int, runners: Mapping[str, Callable[[], Reading]]) -> dict[tuple[str, str], Samples]:
    """Every runner once a round, in turn; by field of Reading and name of runner."""
    values: dict[tuple[str, str], list[float]] = defaultdict(list)
    for _ in range(rounds):
        for name, run in runners.items():
            reading = run()
            for key in UNITS:
                values[key, name].append(float(getattr(reading, key)))
    return {key: Samples(UNITS[key[0]], tuple(found)) for key, found in values.items()}


def _scene(mode: str) -> Callable[[int], Result]:
    def run(rounds: int) -> Result:
        with tempfile.TemporaryDirectory(prefix="lazyproc-bench-", dir="/var/tmp") as folder:
            binary = compiled("touch", Path(folder))
            samples = collected(
                rounds, {name: _runner(engine, Cargo(mode), binary) for name, engine in ENGINES.items()}
            )
        goals = [
            Goal(
                f"{key}, lazyproc / CRIU lazy",
                samples[key, OURS].median / samples[key, LAZY].median,
                limit,
            )
            for key, limit in GOALS.items()
        ]
        named = {f"{key}, {name}": found for (key, name), found in sorted(samples.items())}
        return Result(f"first visits to 512 MiB, {mode}", named, goals if mode == "random" else [])

    return run


def _runner(engine: Engine, cargo: Cargo, binary: Path) -> Callable[[], Reading]:
    return lambda: moved(engine, cargo, binary)


random, think, sequential, zipf = (_scene(mode) for mode in ("random", "think", "sequential", "zipf"))
