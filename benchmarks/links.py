"""What comes over a link: pages that are waited for and pages that are not, beside a C program that does no more."""

from __future__ import annotations

import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from benchmarks.engines import by_lazyproc
from benchmarks.local_fault import compiled
from benchmarks.measure import Goal, Result, Samples
from benchmarks.toucher import Reading, moved
from benchmarks.touching import MIB, Cargo
from lazyproc.hosts import Host, pair_of_hosts
from lazyproc.model import PAGE

FLOOR_PORT = 7800
FAULT_MIB, BULK_MIB, LINK_MIB = 64, 512, 256
GIGABIT = "1gbit"
LINKS = {GIGABIT: 125e6, "100mbit": 12.5e6}  # bytes a second
STAY_S = 5.5  # the goal is of the seconds 1 to 5
on_demand = partial(by_lazyproc, options=("--no-bulk",))


@contextmanager
def _serving(binary: Path, host: Host) -> Iterator[None]:
    server = host.popen([binary, "serve", str(FLOOR_PORT)], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    server.stdout.readline()
    yield
    server.wait(10)


def floor(binary: Path, what: str, mib: int) -> list[int]:
    """What link_floor.c prints, between fresh hosts."""
    with pair_of_hosts() as pair, _serving(binary, pair.source):
        command = [str(binary), what, str(pair.source.address), str(FLOOR_PORT), str(mib)]
        done = pair.destination.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return [int(word) for word in done.stdout.split()]


def _taken(
    rounds: int, units: dict[str, str], takes: Sequence[Callable[[], dict[str, float]]]
) -> dict[str, Samples]:
    """Every measurement once a round, in turn. A unit is that of the names that begin so."""
    values: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        for take in takes:
            for name, value in take().items():
                values[name].append(value)
    return {
        name: Samples(next(unit for begin, unit in units.items() if name.startswith(begin)), tuple(found))
        for name, found in values.items()
    }


@contextmanager
def _programs() -> Iterator[tuple[Path, Path]]:
    with tempfile.TemporaryDirectory(prefix="lazyproc-bench-", dir="/var/tmp") as folder:
        yield compiled("touch", Path(folder)), compiled("link_floor", Path(folder))


def remote_fault(rounds: int) -> Result:
    """First visits with no bulk beside a C ping-pong, and with bulk beside without at 1 Gbit."""

    def idle(binary: Path, rate: str | None, name: str) -> dict[str, float]:
        reading = moved(on_demand, Cargo(mib=FAULT_MIB), binary, rate, ends_first=True)
        return {f"{name}: p50": reading.stall_p50_ms * 1e3, f"{name}: p99": reading.stall_p99_ms * 1e3}

    def with_bulk(binary: Path) -> dict[str, float]:
        reading = moved(by_lazyproc, Cargo(mib=LINK_MIB), binary, GIGABIT)
        name = f"fault, {GIGABIT}, with bulk"
        return {f"{name}: p50": reading.stall_p50_ms * 1e3, f"{name}: p99": reading.stall_p99_ms * 1e3}

    def plain(binary: Path) -> dict[str, float]:
        p50, p99 = floor(binary, "fault", FAULT_MIB)
        return {"fault, C: p50": p50 / 1e3, "fault, C: p99": p99 / 1e3}

    with _programs() as (touch, link):
        takes = [
            lambda: idle(touch, None, "fault, lazyproc"),
            lambda: plain(link),
            lambda: idle(touch, GIGABIT, f"fault, {GIGABIT}, idle"),
            lambda: with_bulk(touch),
        ]
        samples = _taken(rounds, {"fault": "us"}, takes)
    goals = [
        Goal(
            "p50, lazyproc / C", samples["fault, lazyproc: p50"].median / samples["fault, C: p50"].median, 1.3
        ),
        Goal(
            f"p99 at {GIGABIT}, with bulk / idle",
            samples[f"fault, {GIGABIT}, with bulk: p99"].median
            / samples[f"fault, {GIGABIT}, idle: p99"].median,
            2,
        ),
    ]
    return Result("faults from another host", samples, goals)


def bulk_rate(rounds: int) -> Result:
    """All the memory of a cargo that hardly runs, from its first visit on, beside C without checksums."""

    def ours(binary: Path) -> dict[str, float]:
        return {"bulk, lazyproc": _rate(moved(by_lazyproc, Cargo("think", BULK_MIB), binary))}

    def plain(binary: Path) -> dict[str, float]:
        (took_ns,) = floor(binary, "bulk", BULK_MIB)
        return {"bulk, C": BULK_MIB * MIB / took_ns * 1e3}

    with _programs() as (touch, link):
        samples = _taken(rounds, {"bulk": "MB/s"}, [lambda: ours(touch), lambda: plain(link)])
    ratio = samples["bulk, C"].median / samples["bulk, lazyproc"].median
    return Result("bulk between hosts", samples, [Goal("bulk rate, C / lazyproc", ratio, 1 / 0.85)])


def _rate(reading: Reading) -> float:
    """MB a second from the first visit until all is there."""
    since_first_visit_ms = reading.resident_ms - reading.blackout_ms
    return BULK_MIB * MIB / since_first_visit_ms / 1e3


def slow_links(rounds: int) -> Result:
    """How near a move comes to what a link can carry, and how its cargo works meanwhile."""

    def over(binary: Path, rate: str, mib: int) -> dict[str, float]:
        reading = moved(by_lazyproc, Cargo("zipf", mib), binary, rate, STAY_S)
        board = reading.board
        second, pages = 1_000_000_000, mib * MIB // PAGE
        before = board.rate(board.frozen - 4 * second, board.frozen)
        after = board.rate(board.frozen + second, board.frozen + 5 * second)
        return {
            f"time, {rate}: total / (bytes / link)": reading.resident_ms / 1e3 / (pages * PAGE / LINKS[rate]),
            f"wire, {rate}: bytes / (pages x {PAGE})": reading.report["bytes_wire"] / (pages * PAGE),
            f"slowdown, {rate}: before / seconds 1-5": before / max(after, 1),
            f"gap, {rate}": reading.longest_gap_ms,
        }

    with _programs() as (touch, _):
        takes = [
            partial(over, touch, rate, mib) for rate, mib in ((GIGABIT, 512), ("100mbit", LINK_MIB // 2))
        ]
        units = {"time": "x", "wire": "x", "slowdown": "x", "gap": "ms"}
        samples = _taken(rounds, units, takes)
    limits = {"time": 1.10, "wire": 1.02}
    goals = [
        Goal(name, found.median, limits[name.split(",")[0]])
        for name, found in samples.items()
        if name.split(",")[0] in limits
    ]
    goals += [
        Goal(name, found.median, 2)
        for name, found in samples.items()
        if name.startswith(f"slowdown, {GIGABIT}")
    ]
    goals.append(Goal(f"longest gap, {GIGABIT}, ms", samples[f"gap, {GIGABIT}"].median, 60))
    return Result("links that are the limit", samples, goals)
