"""Rounds of interleaved samples, and what is said of them: medians with spread, never a single run."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Self

Runner = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Samples:
    """Readings of one quantity in one unit, in the order they were taken."""

    unit: str
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def interval(self) -> tuple[float, float]:
        """Where the median lies with at least 95 %: between order statistics, whatever the distribution. Of fewer than
        six samples none are that sure: all of their range is given."""
        return median_interval(self.values)

    def fields(self) -> dict[str, object]:
        """For JSON: the summary, and the raw samples."""
        return {
            "unit": self.unit,
            "median": self.median,
            "interval": self.interval,
            "confidence": confidence(len(self.values)),
            "min": min(self.values),
            "max": max(self.values),
            "samples": list(self.values),
        }

    def __str__(self) -> str:
        low, high = self.interval
        spread = f"{min(self.values):.2f} .. {max(self.values):.2f}"
        return f"{self.median:10.2f} {self.unit} ({spread}; median in {low:.2f} .. {high:.2f})"


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The narrowest symmetric pair of order statistics that holds the median with 95 %."""
    ordered = sorted(values)
    rank = _rank(len(ordered))
    return ordered[rank], ordered[-1 - rank]


def confidence(count: int) -> float:
    """How sure `median_interval` is of so many samples; below 0.95 with fewer than six."""
    return 1 - 2 * _tail(count, _rank(count))


def _rank(count: int) -> int:
    """How many samples may be left out at each end."""
    return max((rank for rank in range((count + 1) // 2) if _tail(count, rank) <= 0.025), default=0)


def _tail(count: int, rank: int) -> float:
    """The chance that at most `rank` of so many samples lie below the median."""
    return sum(math.comb(count, below) for below in range(rank + 1)) / 2**count if count > 1 else 0.5


def interleaved(runners: Mapping[str, Runner], rounds: int, unit: str) -> dict[str, Samples]:
    """Every runner once a round, in turn, so that what the machine does else hits all of them alike."""
    values: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(rounds):
        for name, run in runners.items():
            values[name].append(run())
    return {name: Samples(unit, tuple(samples)) for name, samples in values.items()}


def brief(value: float) -> str:
    """Three digits, for people."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def paired(mine: Samples, theirs: Samples) -> Samples:
    """The ratio of each round; of one in which there was nothing there is none."""
    rounds = zip(mine.values, theirs.values, strict=True)
    return Samples("x", tuple(one / other for one, other in rounds if other))


@dataclass(frozen=True, slots=True)
class Goal:
    """A ratio and the most it may be; a missed goal is shown, not hidden. `words` say what it is a ratio of, `interval`
    is where the median of the rounds' own ratios lies."""

    name: str
    ratio: float
    limit: float
    words: str = ""
    interval: tuple[float, float] | None = None

    @classmethod
    def of(cls, name: str, limit: float, mine: Samples, theirs: Samples | None = None) -> Self:
        """The ratio of two medians that were taken in the same rounds; without `theirs` a median that is one."""
        if theirs is None:
            return cls(name, mine.median, limit, "", mine.interval)
        words = f"{brief(mine.median)} / {brief(theirs.median)} {theirs.unit}"
        return cls(name, mine.median / theirs.median, limit, words, paired(mine, theirs).interval)

    @property
    def met(self) -> bool:
        return self.ratio <= self.limit

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.ratio:.3f}, goal at most {self.limit:g}: {'met' if self.met else 'MISSED'}"
        )


@dataclass(frozen=True, slots=True)
class Track:
    """Something that changes in time, in one round: a value for every `step_ms` from `begin_ms` on, 0 being the moment
    in which the cargo stopped at the source."""

    unit: str
    begin_ms: float
    step_ms: float
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Result:
    """What one scene found. `tracks` have one entry a round, `spectra` too: how many durations fell into each of
    check.h's buckets. Their names are WHAT, ENGINE."""

    scene: str
    samples: Mapping[str, Samples]
    goals: Sequence[Goal]
    tracks: Mapping[str, Sequence[Track]] = field(default_factory=dict)
    spectra: Mapping[str, Sequence[tuple[int, ...]]] = field(default_factory=dict)

    def fields(self) -> dict[str, object]:
        return {
            "scene": self.scene,
            "samples": {name: samples.fields() for name, samples in self.samples.items()},
            "goals": [asdict(goal) | {"met": goal.met} for goal in self.goals],
            "tracks": {name: [asdict(track) for track in tracks] for name, tracks in self.tracks.items()},
            "spectra": {name: list(spectra) for name, spectra in self.spectra.items()},
        }


def load() -> tuple[float, float, float]:
    """The load average, to be read beside every figure."""
    return os.getloadavg()
