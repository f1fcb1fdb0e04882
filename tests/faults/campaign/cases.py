"""What is done to which migration, and when: drawn by pure functions, so that a seed and a number say it all."""

from __future__ import annotations

import random
from dataclasses import dataclass

from lazyproc.wire.frame import Type

MIB = 1 << 20
SIZES = (64, 64, 64, 64, 64, 96, 128, 192, 256, 384, 512)  # MiB
PROGRAMS = ("memory_random", "memory_random", "cow_fork", "fork_lazy")
FAMILIES = {"cow_fork": 4}  # processes, each of which brings its pages
LARGEST = {"cow_fork": 128, "fork_lazy": 128}  # MiB: each of a family checks all of it again and again
SECONDS = 1.5  # what nobody waits for takes at least so long, so that there is a moment to draw
SHORTEST_CUT_S, LONGEST_CUT_S = 0.05, 12.0  # 5 s of silence are noticed

COMMAND, SERVER, KEEPER = "migrate", "server", "source's keeper"
RECEIVER, KEEPER_THERE, PAGER, GUARD = "receive", "keeper", "pager", "guard"
AT_SOURCE, CREW = (SERVER, KEEPER), (KEEPER_THERE, PAGER, GUARD)
EVERYBODY = (COMMAND, *AT_SOURCE, RECEIVER, *CREW)
ALL_AT_ONCE = (
    AT_SOURCE,
    (COMMAND, *AT_SOURCE),
    CREW,
    (RECEIVER, *CREW),
    (*AT_SOURCE, *CREW),
    EVERYBODY,
)

POINTS = (
    Type.NEEDS,
    Type.PREPARE,
    Type.PREPARED,
    Type.IMAGES,
    Type.BUILT,
    Type.COMMIT,
    Type.COMMITTED,
    Type.RUNNING,
    Type.MAP,
    Type.DRAINED,
    Type.RELEASED,
)
JOURNALS = (
    ("source", "parked"),
    ("destination", "committed"),
    ("source", "committed"),
    ("destination", "drained"),
)


@dataclass(frozen=True, slots=True)
class AtFrame:
    """While this frame of the control connection is on its way: it has been sent and is not there yet."""

    type: Type

    def __str__(self) -> str:
        return f"{self.type.name} on its way"


@dataclass(frozen=True, slots=True)
class AtJournal:
    """As soon as that side has written that state down."""

    role: str
    state: str

    def __str__(self) -> str:
        return f"{self.state} in the {self.role}'s journal"


@dataclass(frozen=True, slots=True)
class AtBytes:
    """When so many bytes have come to the destination."""

    count: int

    def __str__(self) -> str:
        return f"{self.count >> 20} MiB there"


Moment = AtFrame | AtJournal | AtBytes


@dataclass(frozen=True, slots=True)
class Case:
    seed: int
    number: int
    program: str
    mib: int
    moment: Moment
    victims: tuple[str, ...] = ()  # killed at once
    cut_s: float = 0.0

    def __str__(self) -> str:
        what = f"kill {', '.join(self.victims)}" if self.victims else f"cut for {self.cut_s:.2f} s"
        return f"{what}, {self.moment}: {self.program} of {self.mib} MiB"

    @property
    def arguments(self) -> tuple[int, ...]:
        """With a rest after each 64 visits: three other processes want the processors as well."""
        return (self.mib, 2, 1000) if self.program == "memory_random" else (self.mib,)

    @property
    def max_rate(self) -> int:
        return int(_bytes(self.program, self.mib) / SECONDS)


def _bytes(program: str, mib: int) -> int:
    return mib * MIB * FAMILIES.get(program, 1)


def a_kill(seed: int, number: int) -> Case:
    rng = random.Random(f"kill {seed} {number}")
    program, mib = _program(rng)
    moment = _moment(rng, program, mib)
    victims = _victims(rng)
    if moment == AtFrame(Type.RELEASED):  # the source's side is ending by itself
        victims = tuple(set(victims) - {COMMAND, *AT_SOURCE}) or (rng.choice(CREW),)
    if program == "fork_lazy" and set(CREW) <= set(victims):  # its children have no anchors: not promised
        program = "cow_fork"
    return Case(seed, number, program, mib, moment, tuple(sorted(victims, key=EVERYBODY.index)))


def a_cut(seed: int, number: int) -> Case:
    rng = random.Random(f"cut {seed} {number}")
    program, mib = _program(rng)
    length = SHORTEST_CUT_S * (LONGEST_CUT_S / SHORTEST_CUT_S) ** rng.random()
    return Case(seed, number, program, mib, _moment(rng, program, mib), cut_s=length)


def _program(rng: random.Random) -> tuple[str, int]:
    program = rng.choice(PROGRAMS)
    return program, min(rng.choice(SIZES), LARGEST.get(program, max(SIZES)))


def _moment(rng: random.Random, program: str, mib: int) -> Moment:
    match rng.choice(("frame", "frame", "journal", "bytes", "bytes", "bytes")):
        case "frame":
            return AtFrame(rng.choice(POINTS))
        case "journal":
            return AtJournal(*rng.choice(JOURNALS))
    return AtBytes(int(_bytes(program, mib) * rng.uniform(0.01, 0.8)))


def _victims(rng: random.Random) -> tuple[str, ...]:
    match rng.choice(("one", "one", "several", "all")):
        case "one":
            return (rng.choice(EVERYBODY),)
        case "several":
            return tuple(rng.sample(EVERYBODY, rng.randint(2, 4)))
    return rng.choice(ALL_AT_ONCE)
