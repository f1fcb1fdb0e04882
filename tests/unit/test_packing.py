"""Where bulk is compressed, on computed links: no clock is involved, so the figures are exact."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PACKING = HERE.parents[1] / "lazyproc/uffd/_packing.c"
MBIT = 125_000  # bytes a second
PROCESSOR = 300_000_000  # bytes a second that it compresses
HALF, WHOLE = 50, 100  # percent that a page takes when it is packed

Simulation = Callable[..., tuple[tuple[float, int], tuple[float, int]]]


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Simulation:
    program = tmp_path_factory.mktemp("packing") / "packing_link"
    flags = ["-O1", "-std=gnu11", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(["gcc", *flags, "-o", program, HERE / "packing_link.c", PACKING], check=True)

    def run(
        rate: int,
        percent: int,
        pack: int = PROCESSOR,
        *,
        seconds: float = 60,
        then: int = 0,
        slow: bool = False,
    ) -> tuple[tuple[float, int], tuple[float, int]]:
        numbers = (rate, percent, pack, seconds, then, int(slow))
        done = subprocess.run([program, *map(str, numbers)], check=True, capture_output=True, text=True)
        first, second = (line.split() for line in done.stdout.splitlines())
        return (float(first[0]), int(first[1])), (float(second[0]), int(second[1]))

    return run


@pytest.mark.parametrize("rate", [10 * MBIT, 100 * MBIT, 1000 * MBIT])
def test_a_link_that_is_the_limit_carries_compressed_pages(simulated: Simulation, rate: int) -> None:
    (first, _), (later, wire) = simulated(rate, HALF)
    assert first > 0.9
    assert later > 0.95
    assert wire == pytest.approx(2048, rel=0.01)


@pytest.mark.parametrize(("slow", "packed"), [(False, 0), (True, 1)])
def test_what_is_not_tried_yet_goes_by_the_faults(simulated: Simulation, slow: bool, packed: int) -> None:
    (first, _), _ = simulated(100 * MBIT, HALF, seconds=0.9, slow=slow)
    assert first == pytest.approx(packed, abs=0.1)


def test_a_long_way_is_no_narrow_one(simulated: Simulation) -> None:
    """Faults take long over both; after the trial only what pages come by counts."""
    (first, _), (later, _) = simulated(10_000 * MBIT, HALF, slow=True)
    assert first < 0.05
    assert later == 0


def test_a_link_that_is_not_the_limit_does_not(simulated: Simulation) -> None:
    assert simulated(10_000 * MBIT, HALF) == ((0, 4096), (0, 4096))


def test_a_processor_that_is_slower_than_the_link_is_found_out(simulated: Simulation) -> None:
    (first, _), (later, _) = simulated(1000 * MBIT, HALF, pack=50_000_000)
    assert first < 0.05
    assert later < 0.05


@pytest.mark.parametrize("rate", [100 * MBIT, 1000 * MBIT])
def test_pages_that_do_not_shrink_are_asked_for_as_they_are(simulated: Simulation, rate: int) -> None:
    (first, _), (later, wire) = simulated(rate, WHOLE)
    assert first < 0.05
    assert later < 0.05
    assert wire == 4096


def test_it_follows_the_link(simulated: Simulation) -> None:
    """Either way within the time for which a decision holds."""
    (before, _), (after, _) = simulated(100 * MBIT, HALF, seconds=120, then=10_000 * MBIT)
    assert before > 0.9
    assert after < 0.3
    (before, _), (after, _) = simulated(10_000 * MBIT, HALF, seconds=120, then=100 * MBIT)
    assert before == 0
    assert after > 0.9
