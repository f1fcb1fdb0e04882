"""A guest under TCG, moved by lazyproc beside QEMU's own post-copy, plain and with a connection of its own for faults
(postcopy-preempt). The guest checks every page it visits, and beats every 5 ms on its serial line."""

from __future__ import annotations

import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.engines import timed_migrate
from benchmarks.links import GIGABIT
from benchmarks.measure import Goal, Result, Samples
from benchmarks.receiver import DEADLINE_S, PORT, receiving
from benchmarks.toucher import OURS
from benchmarks.wires import WHOLE, Link, hosts
from lazyproc.hosts import Host, Pair
from lazyproc.qemu.qmp import Qmp
from tests.qemu.guests import Beat, Guest, Serial, Shape, beating, longest_gap, monitor, saved, started

PLAIN, PREEMPT = "QEMU", "QEMU preempt"
RATE = 20_000  # visits a second, of which half write
LARGE = Shape(memory=256, visited=128, rate=RATE)
SMALL = Shape(memory=96, visited=32, rate=RATE)  # for a link that takes 11 s for what LARGE visits
SLOW = Link("100mbit")
WAYS = ((WHOLE, LARGE), (GIGABIT, LARGE), (SLOW, SMALL))
STOP_MS, SLOW_GAP_MS = 20, 500
STOP, GAP, WORK, COPY, TOTAL = "stop to run", "longest gap", "visits", "copy", "total"
FLOOR = "run to first beat, all RAM in place, QEMU"
BEFORE, AFTER = 100, 40  # beats
UNLIMITED = 10**11  # bytes a second; QEMU's own limit is less than the link without one
_STATE = re.compile(r"@(\d+\.\d+):vm_state_notify running ([01]) ")


@dataclass(frozen=True, slots=True)
class Span:
    """By time.monotonic()."""

    begun: float  # its first command, or the start of the QEMU there
    whole: float  # it has said that every page is there


# Does all of a move, the start of the QEMU there included.
Engine = Callable[[Pair, Guest], AbstractContextManager[Span]]


@dataclass(frozen=True, slots=True)
class Reading:
    """One move. When it stops and runs is both QEMUs' own word, the gap and the visits are the guest's beats."""

    stop_to_run_ms: float
    longest_gap_ms: float
    visits_a_second: float  # during the copy
    copy_ms: float  # from the stop until every page is there
    total_ms: float  # from the command, or the start of the QEMU there, until then

    def numbers(self) -> dict[str, tuple[str, float]]:
        return {
            STOP: ("ms", self.stop_to_run_ms),
            GAP: ("ms", self.longest_gap_ms),
            WORK: ("/s", self.visits_a_second),
            COPY: ("ms", self.copy_ms),
            TOTAL: ("ms", self.total_ms),
        }


def _trace(host: Host) -> Path:
    return host.ground.shared / f"{host.name}.trace"


def _traced(host: Host) -> tuple[str, ...]:
    """QEMU writes down when its guest runs and stops, by CLOCK_REALTIME."""
    return ("-msg", "timestamp=on", "-trace", "vm_state_notify", "-D", str(_trace(host)))


def _first(host: Host, state: str) -> float:
    """When the guest first ran ("1") or was stopped ("0") on the host, as time.monotonic() is here."""
    found = [at for at, seen in _STATE.findall(_trace(host).read_text()) if seen == state]
    return float(found[0]) - time.time() + time.monotonic()


@contextmanager
def by_lazyproc(pair: Pair, guest: Guest) -> Iterator[Span]:
    there = pair.destination
    command = guest.shape.command(guest.serial.path, there.scratch / "qmp", *_traced(there))
    with receiving(pair, "--insecure", command=command) as address:
        begun = time.monotonic()
        _, at = timed_migrate(pair.source, "--qemu", guest.inside, address, "--insecure")
        yield Span(begun, at["drained"])


@contextmanager
def by_qemu(pair: Pair, guest: Guest, capabilities: Sequence[str]) -> Iterator[Span]:
    begun, there = time.monotonic(), pair.destination
    more = ("-incoming", "defer", *_traced(there))
    with (
        started(guest.shape, guest.serial, pair.shared, *more, host=there) as arriving,
        monitor(arriving) as theirs,
        Qmp(str(guest.qmp)) as ours,
    ):
        wanted = [{"capability": name, "state": True} for name in ("events", *capabilities)]
        for qmp in (theirs, ours):
            qmp.execute("migrate-set-capabilities", {"capabilities": wanted})
        ours.execute("migrate-set-parameters", {"max-bandwidth": UNLIMITED})
        uri = {"uri": f"tcp:{there.address}:{PORT}"}
        theirs.execute("migrate-incoming", uri)
        ours.execute("migrate", uri)
        _until(ours, "active")
        ours.execute("migrate-start-postcopy")
        _until(ours, "completed")
        _until(theirs, "completed")
        yield Span(begun, time.monotonic())


def _until(qmp: Qmp, wanted: str) -> None:
    while (status := qmp.event("MIGRATION", timeout=DEADLINE_S)["data"]["status"]) != wanted:
        if status in ("failed", "postcopy-paused"):
            raise RuntimeError(f"QEMU's own migration: {status} instead of {wanted}")


ENGINES: Mapping[str, Engine] = {
    OURS: by_lazyproc,
    PLAIN: partial(by_qemu, capabilities=("postcopy-ram",)),
    PREEMPT: partial(by_qemu, capabilities=("postcopy-ram", "postcopy-preempt")),
}


def moved(engine: Engine, link: Link, shape: Shape, file: Path) -> Reading:
    """The guest saved in the file is moved once, between fresh hosts. No beat may be missing and no page wrong."""
    with (
        hosts(link) as pair,
        beating(shape, pair.shared, *_traced(pair.source), host=pair.source, file=file) as guest,
    ):
        guest.serial.wait(BEFORE)
        with engine(pair, guest) as span:
            guest.serial.wait(AFTER)
            beats = guest.serial.check()
        stopped, runs = _first(pair.source, "0"), _first(pair.destination, "1")
    return Reading(
        stop_to_run_ms=(runs - stopped) * 1e3,
        longest_gap_ms=longest_gap(beats, span.begun) * 1e3,
        visits_a_second=(_visits(beats, span.whole) - _visits(beats, stopped)) / (span.whole - stopped),
        copy_ms=(span.whole - stopped) * 1e3,
        total_ms=(span.whole - span.begun) * 1e3,
    )


def _visits(beats: list[Beat], at: float) -> int:
    """How many there had been by then."""
    return max(beat.visits for beat in beats if beat.at <= at)


def first_beat(shape: Shape, file: Path) -> float:
    """ms from the word to run to the first beat of the guest in a fresh QEMU that waits for no page: it translates the
    guest's code anew, which is in every gap."""
    with (
        tempfile.TemporaryDirectory() as folder,
        Serial(Path(folder) / "serial") as serial,
        started(shape, serial, Path(folder), "-S", file=file) as guest,
        monitor(guest) as qmp,
    ):
        while qmp.execute("query-status")["status"] == "inmigrate":
            pass
        begun = time.monotonic()
        qmp.execute("cont")
        serial.wait()
        return (serial.beats()[0].at - begun) * 1e3


def run(rounds: int) -> Result:
    values: dict[str, list[float]] = defaultdict(list)
    units: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        files = {shape: saved(shape, Path(folder)) for shape in (LARGE, SMALL)}
        units[FLOOR] = "ms"
        for _ in range(rounds):
            values[FLOOR].append(first_beat(LARGE, files[LARGE]))
            for link, shape in WAYS:
                for who, engine in ENGINES.items():
                    for what, (unit, value) in moved(engine, link, shape, files[shape]).numbers().items():
                        name = f"{what}, {link.way}, {who}"
                        values[name].append(value)
                        units[name] = unit
    samples = {name: Samples(units[name], tuple(found)) for name, found in values.items()}
    goals = [goal for link, _ in WAYS for goal in _goals(samples, link.way)]
    return Result("a guest beside QEMU's own post-copy", samples, goals)


def _goals(samples: Mapping[str, Samples], way: str) -> Iterator[Goal]:
    """Beside what QEMU did best in the same round, one way or the other."""

    def ours(what: str) -> Samples:
        return samples[f"{what}, {way}, {OURS}"]

    def best(what: str, of: Callable[..., float]) -> Samples:
        found = [samples[f"{what}, {way}, {who}"] for who in (PLAIN, PREEMPT)]
        return Samples(found[0].unit, tuple(map(of, *(each.values for each in found))))

    yield Goal.of(f"{GAP}, {way}: lazyproc / QEMU's best", 1 / 5, ours(GAP), best(GAP, min))
    yield Goal.of(f"{WORK}, {way}: QEMU's best / lazyproc", 1 / 5, best(WORK, max), ours(WORK))
    yield Goal.of(f"{TOTAL}, {way}: lazyproc / QEMU's best", 1.1, ours(TOTAL), best(TOTAL, min))
    yield Goal.of(f"{STOP}, {way}, ms", STOP_MS, ours(STOP))
    if way == SLOW.way:
        yield Goal.of(f"{GAP}, {way}, ms", SLOW_GAP_MS, ours(GAP))
