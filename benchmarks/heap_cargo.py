"""A Python heap that measures what a move costs it: many small objects, walked in random order and compared with a
checksum of each family of them; some are replaced on the way, so that the heap lives. Garbage collection stays on.

Usage: heap_cargo STATUS BOARD MIB

STATUS is the block of tests/programs/check.h, BOARD the one of touch.c; a visit is the walk through one family. The
standard library alone: it is started as a program of its own.
"""

from __future__ import annotations

import mmap
import os
import random
import signal
import sys
import time
import zlib
from collections.abc import Callable

MEMBERS = 32  # of a family: about 12 KiB
REPLACED = 8  # one object in so many visits
PHASE_WORD, PID_WORD, WORKERS_WORD = 3, 2, 13  # 32 bits each
RUNNING, FINAL, ENDED = 1, 2, 3
ERRORS, BEATS, STALLS, BUCKETS, STALL_MIN_NS = 2, 32, 64, 384, 5000  # 64 bits each
STARTED, FROZEN, RESUMED, LONGEST_GAP, FIRST_VISITS, STALL_COUNT, STALL_SUM, VISITS = range(8)
SLOTS, SLOT_NS = 30_000, 10_000_000
SLOT_WORDS = 16  # 32 bits each: where the slots begin
Member = tuple[int, float, list[int], str]
Family = dict[str, Member]


class Words:
    """A shared file as words of 64 and of 32 bits."""

    def __init__(self, path: str, size: int) -> None:
        with open(path, "r+b" if os.path.exists(path) else "w+b") as file:
            file.truncate(size)
            self._map = mmap.mmap(file.fileno(), size)
        self.long = memoryview(self._map).cast("Q")
        self.short = memoryview(self._map).cast("I")


def member(number: int, generation: int) -> Member:
    return (
        number * 7919 + generation,
        generation / 3,
        [number, generation],
        f"member {number} of {generation}",
    )


def checksum(family: Family) -> int:
    """Every object of the family is read for it."""
    return zlib.crc32(repr(family).encode())


def resident_kib() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon:"))


class Heap:
    def __init__(self, mib: int) -> None:
        self.random = random.Random(1)
        self.families: list[Family] = []
        while len(self.families) % 256 or resident_kib() < mib << 10:
            first = len(self.families) * MEMBERS
            self.families.append({f"{first + i}": member(first + i, 0) for i in range(MEMBERS)})
        self.sums = [checksum(family) for family in self.families]
        self.visited = bytearray(len(self.families))

    def is_right(self, index: int) -> bool:
        return checksum(self.families[index]) == self.sums[index]

    def replace_one(self, index: int, generation: int) -> None:
        family, number = self.families[index], index * MEMBERS + generation % MEMBERS
        family[f"{number}"] = member(number, generation)
        self.sums[index] = checksum(family)


def bucket(ns: int) -> int:
    octave = max(ns, 1024).bit_length() - 1
    return min((octave - 10) * 16 + (ns >> (octave - 4) & 15), BUCKETS - 1)


def record(status: Words, board: Words, took: int) -> None:
    board.long[FIRST_VISITS] += 1
    if took >= STALL_MIN_NS:
        status.long[STALLS + bucket(took)] += 1
        board.long[STALL_COUNT] += 1
        board.long[STALL_SUM] += took


def work(status: Words, board: Words, heap: Heap, enough: Callable[[], bool]) -> None:
    now, home, moved = time.time_ns, os.uname().nodename, False
    last = board.long[STARTED] = now()
    while not enough():
        begun = now()
        if moved:
            board.long[LONGEST_GAP] = max(board.long[LONGEST_GAP], begun - last)
        elif os.uname().nodename != home:
            moved = True
            board.long[FROZEN] = last
            board.long[RESUMED] = begun = now()
            board.long[LONGEST_GAP] = begun - last
        last = begun
        index = heap.random.randrange(len(heap.families))
        status.long[ERRORS] += not heap.is_right(index)
        if moved and not heap.visited[index]:
            heap.visited[index] = 1
            record(status, board, now() - begun)
        if (visits := board.long[VISITS]) % REPLACED == 0:
            heap.replace_one(index, visits)
        board.long[VISITS] = visits + 1
        board.short[SLOT_WORDS + min((begun - board.long[STARTED]) // SLOT_NS, SLOTS - 1)] += 1
        status.long[BEATS] += 1


def reopen_streams() -> None:
    """CRIU does not find descriptors that were opened in another mount namespace than its own."""
    null = os.open("/dev/null", os.O_RDWR)
    for stream in range(3):
        os.dup2(null, stream)
    os.close(null)


def main() -> int:
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: stopped.append(number))
    status, board = Words(sys.argv[1], 4096), Words(sys.argv[2], 4 * (SLOT_WORDS + SLOTS))
    status.short[PID_WORD], status.short[WORKERS_WORD] = os.getpid(), 1
    reopen_streams()
    heap = Heap(int(sys.argv[3]))
    status.short[PHASE_WORD] = RUNNING
    work(status, board, heap, lambda: bool(stopped))
    status.short[PHASE_WORD] = FINAL
    status.long[ERRORS] += sum(not heap.is_right(index) for index in range(len(heap.families)))
    status.short[PHASE_WORD] = ENDED
    return int(status.long[ERRORS] != 0)


if __name__ == "__main__":
    sys.exit(main())
