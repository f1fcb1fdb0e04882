"""What comes over a link: pages that are waited for and pages that are not, beside a C program that does no more."""

from __future__ import annotations

import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

from benchmarks.engines import by_lazyproc
from benchmarks.measure import Goal, Result, Samples
from benchmarks.programs import program
from benchmarks.toucher import Reading, Stay, moved, result_of
from benchmarks.touching import MIB, Cargo
from benchmarks.wires import BYTES_A_SECOND, WHOLE, Link, hosts
from lazyproc.hosts import Host
from lazyproc.model import PAGE

FLOOR_PORT = 7800
FAULT_MIB, BULK_MIB, LINK_MIB = 64, 512, 256
GIGABIT = Link("1gbit")
SLOW = ((GIGABIT, 512), (Link("100mbit"), 64))  # MiB of the cargo that is moved over it
STAY = Stay(before_s=2.5, after_s=5.2, settled_s=0.3)  # the goal is of the seconds 1 to 5
on_demand = partial(by_lazyproc, options=("--no-bulk",))
Take = Callable[[], Mapping[str, float]]


@contextmanager
def _serving(host: Host) -> Iterator[None]:
    server = host.popen([program("link_floor"), "serve", str(FLOOR_PORT)], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    server.stdout.readline()
    yield
    server.wait(10)


def floor(what: str, mib: int, link: Link = WHOLE) -> list[int]:
    """What link_floor.c prints, between fresh hosts."""
    with hosts(link) as pair, _serving(pair.source):
        command = [str(program("link_floor")), what, str(pair.source.address), str(FLOOR_PORT), str(mib)]
        done = pair.destination.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return [int(word) for word in done.stdout.split()]


def taken(rounds: int, units: Mapping[str, str], takes: Sequence[Take]) -> dict[str, Samples]:
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


def remote_fault(rounds: int) -> Result:
    """First visits with no bulk beside a C ping-pong, and with bulk beside without at 1 Gbit."""
    quiet, busy = "fault, 1 Gbit, idle", "fault, 1 Gbit, with bulk"

    def ours(link: Link, name: str) -> dict[str, float]:
        reading = moved(on_demand, Cargo(mib=FAULT_MIB), link, ends_first=True)
        return _quantiles(name, reading)

    def with_bulk() -> dict[str, float]:
        return _quantiles(busy, moved(by_lazyproc, Cargo(mib=LINK_MIB), GIGABIT))

    def plain() -> dict[str, float]:
        p50, p99 = floor("fault", FAULT_MIB)
        return {"fault, C: p50": p50 / 1e3, "fault, C: p99": p99 / 1e3}

    takes: list[Take] = [
        partial(ours, WHOLE, "fault, lazyproc"),
        plain,
        partial(ours, GIGABIT, quiet),
        with_bulk,
    ]
    samples = taken(rounds, {"fault": "us"}, takes)
    goals = [
        Goal.of("p50, lazyproc / C", 1.3, samples["fault, lazyproc: p50"], samples["fault, C: p50"]),
        Goal.of("p99 at 1 Gbit, with bulk / idle", 2, samples[f"{busy}: p99"], samples[f"{quiet}: p99"]),
    ]
    return Result("faults from another host", samples, goals)


def _quantiles(name: str, reading: Reading) -> dict[str, float]:
    return {f"{name}: p50": reading.stall_p50_ms * 1e3, f"{name}: p99": reading.stall_p99_ms * 1e3}


def bulk_rate(rounds: int) -> Result:
    """All the memory of a cargo that hardly runs, from its first visit on, beside C without checksums."""

    def ours() -> dict[str, float]:
        return {"bulk, lazyproc": _rate(moved(by_lazyproc, Cargo("think", BULK_MIB)))}

    def plain() -> dict[str, float]:
        (took_ns,) = floor("bulk", BULK_MIB)
        return {"bulk, C": BULK_MIB * MIB / took_ns * 1e3}

    samples = taken(rounds, {"bulk": "MB/s"}, [ours, plain])
    goal = Goal.of("bulk rate, C / lazyproc", 1 / 0.85, samples["bulk, C"], samples["bulk, lazyproc"])
    return Result("bulk between hosts", samples, [goal])


def _rate(reading: Reading) -> float:
    """MB a second from the first visit until all is there."""
    since_first_visit_ms = reading.resident_ms - reading.blackout_ms
    return BULK_MIB * MIB / since_first_visit_ms / 1e3


def slow_links(rounds: int) -> Result:
    """How near a move comes to what a link can carry, and how its cargo works meanwhile."""
    readings: dict[str, list[Reading]] = defaultdict(list)

    def over(link: Link, mib: int) -> dict[str, float]:
        reading = moved(by_lazyproc, Cargo("zipf", mib), link, STAY)
        readings[link.way].append(reading)
        return _against_link(reading, link, mib)

    takes = [partial(over, link, mib) for link, mib in SLOW]
    samples = taken(rounds, {"time": "x", "wire": "x", "slowdown": "x", "gap": "ms"}, takes)
    limits = {"time": 1.10, "wire": 1.02}
    goals = [
        Goal.of(name, limits[what], found)
        for name, found in samples.items()
        if (what := name.split(",")[0]) in limits
    ]
    goals += [
        Goal.of(name, 2, found) for name, found in samples.items() if name.startswith("slowdown, 1gbit")
    ]
    goals.append(Goal.of("longest gap, 1gbit, ms", 60, samples["gap, 1gbit"]))
    return result_of("links that are the limit", readings, goals, samples)


def _against_link(reading: Reading, link: Link, mib: int) -> dict[str, float]:
    assert link.rate is not None
    board, second, size = reading.board, 1_000_000_000, mib * MIB
    before = board.rate(board.frozen - 2 * second, board.frozen)
    after = board.rate(board.frozen + second, board.frozen + 5 * second)
    return {
        f"time, {link.way}: total / (bytes / link)": reading.resident_ms
        / 1e3
        / (size / BYTES_A_SECOND[link.rate]),
        f"wire, {link.way}: bytes / (pages x {PAGE})": reading.report["bytes_wire"] / size,
        f"slowdown, {link.way}: before / seconds 1-5": before / max(after, 1),
        f"gap, {link.way}": reading.longest_gap_ms,
    }
