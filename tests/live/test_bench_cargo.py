"""A cargo of `make bench` that measures its own move."""

from __future__ import annotations

import pytest

from benchmarks.engines import by_lazyproc
from benchmarks.heap import Heap
from benchmarks.toucher import SHOWN, moved
from benchmarks.touching import Cargo, Load

MIB = 8


@pytest.mark.parametrize("load", [Cargo("zipf", MIB), Heap(MIB)], ids=["touch", "heap"])
def test_a_cargo_says_what_its_move_cost(load: Load) -> None:
    reading = moved(by_lazyproc, load, stay=SHOWN)  # in the end it has checked all its memory
    board = reading.board
    assert board.started < board.frozen < board.resumed
    assert 0 < board.stalls <= board.first_visits
    assert sum(reading.spectrum) >= board.stalls  # which was read a moment earlier
    assert reading.resident.values[-1] >= MIB
    at_home = round(-reading.throughput.begin_ms / reading.throughput.step_ms)
    assert sum(reading.throughput.values[:at_home]) > 0
    assert sum(reading.throughput.values[at_home + 1 :]) > 0
