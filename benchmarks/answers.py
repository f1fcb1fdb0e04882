"""What a client of an open loop (redis_load.c) saw of a move."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from benchmarks.measure import Track
from tests.live.programs import stall_floor_ns

STEP_MS, BEFORE_MS, SHOWN_MS = 10.0, 500, 10_000  # of a track
WINDOW_S = 3  # of the latencies, from the freeze on
_BUCKETS = 384  # check.h


@dataclass(frozen=True, slots=True)
class Answers:
    """What the client saw: when each request was due and when its answer came, in the time of day (ns)."""

    due: tuple[int, ...]
    came: tuple[int, ...]
    begun: int  # the engine's commands
    frozen: int  # a moment in which the server stood still

    @classmethod
    def read(cls, path: Path, begun: int, frozen: int) -> Answers:
        pairs = sorted(struct.iter_unpack("<QQ", path.read_bytes()))
        return cls(tuple(due for due, _ in pairs), tuple(came for _, came in pairs), begun, frozen)

    def silence(self) -> tuple[int, int]:
        """The time without any answer in which the freeze lies: its beginning and its end."""
        before = max(came for came in self.came if came <= self.frozen)
        return before, min(came for came in self.came if came > self.frozen)

    def longest_ms(self) -> float:
        """The longest time without any answer since the engine began."""
        came = sorted(at for at in self.came if at >= self.begun)
        return max(later - earlier for earlier, later in pairwise(came)) / 1e6

    def latencies(self, begin: int, end: int) -> list[int]:
        """Of the requests that were due in between, in ns, sorted."""
        pairs = zip(self.due, self.came, strict=True)
        return sorted(came - due for due, came in pairs if begin <= due < end)


@dataclass(frozen=True, slots=True)
class Reading:
    """One move of redis."""

    answers: Answers
    resident_ms: float  # from the last answer at the source until every page is there

    def numbers(self) -> dict[str, tuple[str, float]]:
        """By name: unit and value."""
        stopped, answered = self.answers.silence()
        before = self.answers.latencies(0, self.answers.begun)
        after = self.answers.latencies(stopped, stopped + WINDOW_S * 10**9)
        return {
            "freeze to first answer": ("ms", (answered - stopped) / 1e6),
            "longest without an answer": ("ms", self.answers.longest_ms()),
            "until all is there": ("ms", self.resident_ms),
            "before, p50": ("us", _quantile(before, 0.5)),
            "before, p99": ("us", _quantile(before, 0.99)),
            f"{WINDOW_S} s from the freeze on, p50": ("us", _quantile(after, 0.5)),
            f"{WINDOW_S} s from the freeze on, p99": ("us", _quantile(after, 0.99)),
            f"{WINDOW_S} s from the freeze on, worst": ("us", after[-1] / 1e3),
        }

    def worst(self) -> Track:
        """The slowest of the requests that were due in each step."""
        stopped, _ = self.answers.silence()
        worst: dict[int, int] = {}
        for due, came in zip(self.answers.due, self.answers.came, strict=True):
            step = (due - stopped) // int(STEP_MS * 1e6)
            worst[step] = max(worst.get(step, 0), came - due)
        shown = range(
            max(min(worst), round(-BEFORE_MS / STEP_MS)), round(min(max(worst), SHOWN_MS / STEP_MS))
        )
        values = tuple(round(worst.get(step, 0) / 1e3) for step in shown)
        return Track("us", shown.start * STEP_MS, STEP_MS, values)

    def spectrum(self) -> tuple[int, ...]:
        """Of the latencies in the seconds from the freeze on."""
        stopped, _ = self.answers.silence()
        counts, bucket = [0] * _BUCKETS, 0
        for latency in self.answers.latencies(stopped, stopped + WINDOW_S * 10**9):
            while bucket < _BUCKETS - 1 and stall_floor_ns(bucket + 1) <= latency:
                bucket += 1
            counts[bucket] += 1
        return tuple(counts)


def _quantile(ordered: Sequence[int], part: float) -> float:
    """In microseconds."""
    return ordered[min(int(part * len(ordered)), len(ordered) - 1)] / 1e3
