"""How much the bulk connection has under way, on computed links: no clock is involved, so the figures are exact."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PACE = HERE.parents[1] / "lazyproc/uffd/_pace.c"
MILLISECOND = 1_000_000
GBIT, TEN_GBIT, SLOW = 125_000_000, 1_250_000_000, 12_500_000  # bytes a second


@dataclass(frozen=True, slots=True)
class Half:
    """Of a run. `used` by bulk is a share of the link, delays of faults are in ns, the window is in bytes."""

    used: float
    p99_ns: int
    most_ns: int
    window: int


Simulation = Callable[..., tuple[Half, Half]]


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Simulation:
    program = tmp_path_factory.mktemp("pace") / "pace_link"
    flags = ["-O1", "-std=gnu11", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(["gcc", *flags, "-o", program, HERE / "pace_link.c", PACE], check=True)

    def run(
        rate: int,
        delay_ns: int,
        fault_every_ns: int,
        *,
        seconds: int = 20,
        quiet_s: int = 5,
        then: tuple[int, int] = (0, 0),
        wake_ns: int = 0,
    ) -> tuple[Half, Half]:
        numbers = (rate, delay_ns, fault_every_ns, seconds, quiet_s, *then, wake_ns)
        done = subprocess.run([program, *map(str, numbers)], check=True, capture_output=True, text=True)
        first, second = (line.split() for line in done.stdout.splitlines())
        return (
            Half(float(first[0]), int(first[1]), int(first[2]), int(first[3])),
            Half(float(second[0]), int(second[1]), int(second[2]), int(second[3])),
        )

    return run


def alone_ns(rate: int, delay_ns: int) -> int:
    """What a fault takes on an idle link."""
    return delay_ns + 4096 * 1_000_000_000 // rate


@pytest.mark.parametrize(
    ("rate", "delay_ns", "every_ns", "times"),
    [
        (GBIT, 100_000, MILLISECOND, 4.0),
        (GBIT, 1_000_000, MILLISECOND, 2.5),
        (GBIT, 10_000_000, 5 * MILLISECOND, 2.5),
        (TEN_GBIT, 60_000, MILLISECOND, 5.0),
        (SLOW, 100_000, 3 * MILLISECOND, 4.0),
        (SLOW, 10_000_000, 30 * MILLISECOND, 2.5),
    ],
)
def test_a_fault_finds_the_way_nearly_empty_and_the_link_is_used(
    simulated: Simulation, rate: int, delay_ns: int, every_ns: int, times: float
) -> None:
    _, settled = simulated(rate, delay_ns, every_ns)
    assert settled.p99_ns < times * alone_ns(rate, delay_ns)
    faults = 4096 * 1_000_000_000 / every_ns / rate
    assert settled.used + faults > 0.95


def test_with_nobody_faulting_the_link_is_full_and_the_queue_stays_short(simulated: Simulation) -> None:
    """However long that is: it does not take its own queue for the link."""
    _, late = simulated(GBIT, 100_000, 0, seconds=300)
    assert late.used > 0.99
    assert late.window < 256 << 10


def test_the_first_fault_after_a_long_quiet(simulated: Simulation) -> None:
    first, _ = simulated(GBIT, 100_000, MILLISECOND, quiet_s=300)
    assert first.most_ns < 2 * MILLISECOND


def test_a_link_that_becomes_faster_is_used(simulated: Simulation) -> None:
    _, after = simulated(GBIT, 100_000, MILLISECOND, then=(8 * GBIT, 100_000))
    assert after.used > 0.9


def test_a_link_that_becomes_slower_is_not_flooded_for_long(simulated: Simulation) -> None:
    _, after = simulated(8 * GBIT, 100_000, MILLISECOND, seconds=60, then=(GBIT, 100_000))
    assert after.p99_ns < 20 * alone_ns(GBIT, 100_000)  # of it 4 s of 30 are those of the old rate


def test_a_way_that_becomes_longer_is_used_still(simulated: Simulation) -> None:
    _, after = simulated(GBIT, 100_000, MILLISECOND, seconds=60, then=(GBIT, 10_000_000))
    assert after.used > 0.7


@pytest.mark.parametrize("wake_ns", [200_000, 500_000])
def test_a_sender_that_wakes_up_late_is_no_link(simulated: Simulation, wake_ns: int) -> None:
    """With little under way it falls asleep after each answer: that is soon found out, and the link is used."""
    first, second = simulated(TEN_GBIT, 60_000, MILLISECOND, seconds=2, quiet_s=0, wake_ns=wake_ns)
    assert first.used > 0.7
    assert second.used > 0.98
    assert second.p99_ns < 1.5 * (alone_ns(TEN_GBIT, 60_000) + wake_ns)
