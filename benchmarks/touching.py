"""A cargo that measures a move from inside (touch.c, heap.py): started on a host, and what its board says."""

from __future__ import annotations

import os
import signal
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from benchmarks.measure import Track
from benchmarks.programs import program
from lazyproc.hosts import Host
from tests.live.programs import Program, Status, running, stall_floor_ns, wait_until

MIB = 1 << 20
SLOT_NS = 10_000_000
SLOTS_SHOWN = 2000  # of a track: 20 s
HIGH_PID = 7000  # above all that runs on a destination: CRIU restores only to the same pid
_HEAD = struct.Struct("<8Q")
_SLOTS = 30_000
_BEFORE = 30  # slots of a track before the freeze


class Load(Protocol):
    """What a program with a board is told, and how much memory of it there is when all is there."""

    @property
    def binary(self) -> Path: ...

    def arguments(self) -> tuple[object, ...]: ...

    def whole_kib(self, pid: int) -> int: ...


@dataclass(frozen=True, slots=True)
class Cargo:
    """What touch.c is to do; `mode` is one that touch.c takes."""

    mode: str = "random"
    mib: int = 512
    threads: int = 1
    vmas: int = 0

    @property
    def binary(self) -> Path:
        return program("touch")

    def arguments(self) -> tuple[object, ...]:
        return self.mode, self.mib, self.threads, self.vmas

    def whole_kib(self, _pid: int) -> int:
        return self.mib << 10


@dataclass(frozen=True, slots=True)
class Board:
    """touch.c's board: times of day and durations in ns; `slots` are visits in each 10 ms from `started` on."""

    started: int
    frozen: int
    resumed: int
    longest_gap: int
    first_visits: int
    stalls: int
    stalls_sum: int
    visits: int
    slots: tuple[int, ...]

    @classmethod
    def read(cls, path: Path) -> Board:
        block = path.read_bytes()
        slots = struct.unpack_from(f"<{_SLOTS}I", block, _HEAD.size)
        started, frozen, resumed, longest_gap, first_visits, stalls, stalls_sum, visits = _HEAD.unpack_from(
            block
        )
        return cls(started, frozen, resumed, longest_gap, first_visits, stalls, stalls_sum, visits, slots)

    @property
    def blackout_ms(self) -> float:
        return (self.resumed - self.frozen) / 1e6

    def rate(self, begin: int, end: int) -> float:
        """Visits a second between two times of day."""
        first, last = ((at - self.started) // SLOT_NS for at in (begin, end))
        return sum(self.slots[max(first, 0) : last]) / (last - max(first, 0)) * (1e9 / SLOT_NS)

    def throughput(self, until: int) -> Track:
        """Visits around the freeze, up to a time of day."""
        frozen, last = ((at - self.started) // SLOT_NS for at in (self.frozen, until))
        first = max(frozen - _BEFORE, 0)
        begin_ms = (self.started + first * SLOT_NS - self.frozen) / 1e6
        values = self.slots[first : min(last, first + SLOTS_SHOWN)]
        return Track("visits in 10 ms", round(begin_ms, 3), SLOT_NS / 1e6, values)


@dataclass(frozen=True, slots=True)
class Toucher:
    """A cargo that runs on the source, and after its move on the destination."""

    load: Load
    program: Program
    board: Path

    def has_moved(self) -> bool:
        with self.board.open("rb") as file:
            return bool(_HEAD.unpack(file.read(_HEAD.size))[2])

    def finish(self, pid: int) -> tuple[Board, Status]:
        """Ends the cargo, once all its memory is right; AssertionError when it is not."""
        board = Board.read(self.board)
        os.kill(pid, signal.SIGTERM)
        self.program.watch.wait_ended()
        return board, self.program.watch.read()


@contextmanager
def touching(load: Load, directory: Path, host: Host) -> Iterator[Toucher]:
    """The cargo on `host`; `directory` is one that both hosts see."""
    host.run(["sh", "-c", f"echo {HIGH_PID} > /proc/sys/kernel/ns_last_pid"], check=True)
    board = directory / "board"
    arguments = (board, *load.arguments())
    name, binary = load.binary.name, load.binary
    with running(name, *arguments, directory=directory, host=host, binary=binary) as started:
        wait_until(lambda: started.watch.read().beats[0] > 0, "the cargo visits its memory")
        yield Toucher(load, started, board)


def stall_ms(status: Status, part: float) -> float:
    """A quantile of the stalls, to 3 %: the middle of its bucket. 0 when there were none."""
    total, seen = sum(status.stalls), 0
    for bucket, count in enumerate(status.stalls):
        seen += count
        if count and seen >= part * total:
            return (stall_floor_ns(bucket) + stall_floor_ns(bucket + 1)) / 2e6
    return 0.0


def resident_kib(pid: int) -> int:
    """Memory of a process that no file backs, and is there; 0 when the process is not."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), 0)


def pid_in(host: Host, comm: str) -> int:
    """The cargo's pid on a host, for the caller; 0 when it is not there."""
    home = os.stat(f"/proc/{host.init_pid}/ns/net").st_ino
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            if Path(f"/proc/{entry}/comm").read_text().rstrip() == comm and (
                os.stat(f"/proc/{entry}/ns/net").st_ino == home
            ):
                return int(entry)
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended meanwhile
    return 0
