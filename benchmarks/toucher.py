"""One cargo, several engines: how long until all its memory is there, and what its first visits cost it meanwhile."""

from __future__ import annotations

import tempfile
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.engines import ENGINES, Engine, Report
from benchmarks.measure import Goal, Result, Samples, Track
from benchmarks.touching import (
    SLOT_NS,
    SLOTS_SHOWN,
    Board,
    Cargo,
    Load,
    Toucher,
    pid_in,
    resident_kib,
    stall_ms,
    touching,
)
from benchmarks.wires import WHOLE, Link, hosts
from lazyproc.hosts import Pair

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
class Stay:
    """For how long the cargo is left alone: before the move, at least from the freeze on, and when all is there."""

    before_s: float = 0.0
    after_s: float = 0.0
    settled_s: float = 0.0


BRIEF = Stay()
SHOWN = Stay(before_s=0.3, settled_s=0.3)  # where throughput is looked at


@dataclass(frozen=True, slots=True)
class Reading:
    """One move, as its cargo and the kernel saw it."""

    board: Board
    until_there_ms: float  # from the start of the engine's commands until the cargo runs at the destination
    resident_ms: float  # from the last visit before the move until every page is there
    stall_sum_ms: float
    stall_p50_ms: float
    stall_p99_ms: float
    spectrum: tuple[int, ...]  # of first visits
    throughput: Track
    resident: Track  # MiB
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
    load: Load,
    link: Link = WHOLE,
    stay: Stay = BRIEF,
    *,
    ends_first: bool = False,
) -> Reading:
    """One move of a fresh cargo between fresh hosts."""
    with hosts(link) as pair:
        return moved_between(pair, engine, load, stay, ends_first=ends_first)


def moved_between(
    pair: Pair,
    engine: Engine,
    load: Load,
    stay: Stay = BRIEF,
    *,
    ends_first: bool = False,
) -> Reading:
    """One move of a fresh cargo. It ends when the engine has; or first, where the engine waits for that."""
    with tempfile.TemporaryDirectory(dir=pair.shared) as name:
        directory = Path(name)
        images = directory / "images"
        images.mkdir()
        with touching(load, directory, pair.source) as toucher:
            time.sleep(stay.before_s)
            whole_kib, begun = load.whole_kib(toucher.program.pid), time.time_ns()
            with engine(pair, pair.source.vpid(toucher.program.pid), images) as report:
                pid, growth = _until_resident(pair, toucher, whole_kib)
                if ends_first:
                    board, status = toucher.finish(pid)
            if not ends_first:
                since_freeze_s = (time.time_ns() - Board.read(toucher.board).frozen) / 1e9
                time.sleep(max(stay.settled_s, stay.after_s - since_freeze_s))
                board, status = toucher.finish(pid)
    return Reading(
        board,
        (board.resumed - begun) / 1e6,
        (growth[-1][0] - board.frozen) / 1e6,
        board.stalls_sum / 1e6,
        stall_ms(status, 0.5),
        stall_ms(status, 0.99),
        status.stalls,
        board.throughput(growth[-1][0] + int(stay.settled_s * 1e9)),
        _resident(board.frozen, growth),
        report,
    )


Growth = list[tuple[int, int]]  # time of day (ns), KiB that are there


def _until_resident(pair: Pair, toucher: Toucher, whole_kib: int) -> tuple[int, Growth]:
    """The cargo's pid at the destination, and how its memory came, until all its pages were there."""
    until, growth = time.monotonic() + DEADLINE_S, Growth()
    pid = 0
    while not growth or growth[-1][1] < whole_kib:
        if time.monotonic() > until:
            raise RuntimeError(f"{growth[-1:]} of {whole_kib} KiB are there after {DEADLINE_S} s")
        if pid or toucher.has_moved():
            pid = pid or pid_in(pair.destination, toucher.load.binary.name)
            there = resident_kib(pid)
            growth.append((time.time_ns(), there))
        time.sleep(POLL_S)
    return pid, growth


def _resident(frozen: int, growth: Growth) -> Track:
    """What was there at the end of each slot since the freeze."""
    times = [at for at, _ in growth]
    last = min((times[-1] - frozen) // SLOT_NS + 1, SLOTS_SHOWN)
    seen = [bisect_right(times, frozen + slot * SLOT_NS) for slot in range(last)]
    kib = [*(growth[count - 1][1] if count else 0 for count in seen), growth[-1][1]]
    return Track("MiB", 0.0, SLOT_NS / 1e6, tuple(round(each / 1024, 1) for each in kib))


Readings = Mapping[str, Sequence[Reading]]


def taken(rounds: int, runners: Mapping[str, Callable[[], Reading]]) -> Readings:
    """Every runner once a round, in turn."""
    found: dict[str, list[Reading]] = defaultdict(list)
    for _ in range(rounds):
        for name, run in runners.items():
            found[name].append(run())
    return found


def samples_of(readings: Readings, units: Mapping[str, str] = UNITS) -> dict[str, Samples]:
    """FIELD, RUNNER: the readings of fields that are numbers."""
    return {
        f"{key}, {name}": Samples(unit, tuple(float(getattr(reading, key)) for reading in each))
        for key, unit in sorted(units.items())
        for name, each in readings.items()
    }


def result_of(scene: str, readings: Readings, goals: Iterable[Goal], samples: dict[str, Samples]) -> Result:
    """With what the plots need."""
    tracks = {
        f"{what}, {name}": [getattr(reading, what) for reading in each]
        for what in ("throughput", "resident")
        for name, each in readings.items()
    }
    spectra = {f"first visits, {name}": [r.spectrum for r in each] for name, each in readings.items()}
    return Result(scene, samples, tuple(goals), tracks, spectra)


def _scene(mode: str, mib: int) -> Callable[[int], Result]:
    def run(rounds: int) -> Result:
        readings = taken(
            rounds, {name: _runner(engine, Cargo(mode, mib)) for name, engine in ENGINES.items()}
        )
        samples = samples_of(readings)
        goals = [
            Goal.of(
                f"{key}, lazyproc / CRIU lazy", limit, samples[f"{key}, {OURS}"], samples[f"{key}, {LAZY}"]
            )
            for key, limit in GOALS.items()
        ]
        return result_of(
            f"first visits to {mib} MiB, {mode}", readings, goals if mode == "random" else [], samples
        )

    return run


def _runner(engine: Engine, cargo: Cargo) -> Callable[[], Reading]:
    return lambda: moved(engine, cargo, stay=SHOWN)


random = _scene("random", 512)
think, sequential, zipf = (_scene(mode, 256) for mode in ("think", "sequential", "zipf"))
