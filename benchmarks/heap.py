"""A Python heap of many small objects, moved by lazyproc and by CRIU while it is walked (heap_cargo.py)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.engines import by_lazy_criu, by_lazyproc
from benchmarks.measure import Result
from benchmarks.programs import script
from benchmarks.toucher import LAZY, OURS, SHOWN, moved, result_of, samples_of, taken
from benchmarks.touching import resident_kib


@dataclass(frozen=True, slots=True)
class Heap:
    """What heap_cargo.py is to do."""

    mib: int = 64

    @property
    def binary(self) -> Path:
        return script("heap_cargo")

    def arguments(self) -> tuple[object, ...]:
        return (self.mib,)

    def whole_kib(self, pid: int) -> int:
        """What is only zeros does not come; it is less than 1 %."""
        return resident_kib(pid) * 99 // 100


def run(rounds: int) -> Result:
    engines = {OURS: by_lazyproc, LAZY: by_lazy_criu}
    readings = taken(
        rounds, {name: partial(moved, engine, Heap(), stay=SHOWN) for name, engine in engines.items()}
    )
    return result_of("a Python heap", readings, (), samples_of(readings))
