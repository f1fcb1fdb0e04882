"""How long bulk rests while a process comes to life, how much a fault brings then, and how, on a computed clock."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PACE = HERE.parents[1] / "lazyproc/uffd/_pace.c"
MICROSECOND, MILLISECOND = 1_000, 1_000_000
SOME = 450  # faults: as many as a guest has before its first sign of life

# From a fault's time and the time of its answer, for each, to how long bulk has rested in ms.
Rested = Callable[[list[tuple[int, int]]], int]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("pace") / "pace_waking"
    flags = ["-O1", "-std=gnu11", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(["gcc", *flags, "-o", program, HERE / "pace_waking.c", PACE], check=True)
    return program


@pytest.fixture(scope="module")
def rested(program: Path) -> Rested:
    def run(faults: list[tuple[int, int]]) -> int:
        """It is looked every ms for a second."""
        looks = [(at * MILLISECOND, f"rests {at * MILLISECOND}") for at in range(1000)]
        waits = [(answered, f"fault {asked} {answered}") for asked, answered in faults]
        lines = chain(["wakes 0"], (line for _, line in sorted(chain(waits, looks))))
        done = subprocess.run([program], input="\n".join(lines), check=True, capture_output=True, text=True)
        return done.stdout.split().index("0")

    return run


def busy(count: int, delay_ns: int, between_ns: int) -> list[tuple[int, int]]:
    """Faults of one thread, which waits `delay_ns` for each page and works for `between_ns` before the next."""
    each = delay_ns + between_ns
    return [(n * each, n * each + delay_ns) for n in range(count)]


@pytest.mark.parametrize(
    ("delay_us", "work_us"), [(20, 40), (33, 40), (330, 50)], ids=["no limit", "1gbit", "100mbit"]
)
def test_bulk_rests_until_a_guest_has_come_to_life(rested: Rested, delay_us: int, work_us: int) -> None:
    faults = busy(SOME, delay_us * MICROSECOND, work_us * MICROSECOND)
    alive_ms = faults[-1][1] / MILLISECOND
    assert alive_ms - 1 <= rested(faults) <= alive_ms + 11


def test_a_program_that_waits_for_page_after_page_has_bulk_soon(rested: Rested) -> None:
    faults = busy(10_000, 20 * MICROSECOND, 5 * MICROSECOND)
    assert rested(faults) <= faults[512][1] / MILLISECOND + 1


def test_a_program_that_waits_for_nothing_has_bulk_soon(rested: Rested) -> None:
    assert rested([]) == 10


def test_a_program_that_works_longer_than_it_waits_has_bulk_soon(rested: Rested) -> None:
    assert rested(busy(10_000, 20 * MICROSECOND, 980 * MICROSECOND)) < 20


@pytest.mark.parametrize("delay_ms", [1, 10, 100])
def test_over_a_long_way_bulk_hardly_rests(rested: Rested, delay_ms: int) -> None:
    assert rested(busy(1000, delay_ms * MILLISECOND, 0)) < 20


@pytest.mark.parametrize(
    ("alone_us", "more_us", "pages"),
    [(35, 4, 4), (100, 33, 4), (10_000, 33, 4), (360, 330, 1)],
    ids=["no limit", "1gbit", "1gbit, 10 ms", "100mbit"],
)
def test_a_fault_brings_what_follows_where_that_takes_little_longer(
    program: Path, alone_us: int, more_us: int, pages: int
) -> None:
    line = f"waits {alone_us * MICROSECOND} {more_us * MICROSECOND}"
    done = subprocess.run(
        [program], input="\n".join(["wakes 0", *[line] * 64]), check=True, capture_output=True, text=True
    )
    asked = [int(each) for each in done.stdout.split()]
    assert asked == [1] * 8 + [4] * 8 + [pages] * 48


# From lines to what is answered.
Answered = Callable[[list[str]], list[str]]


@pytest.fixture(scope="module")
def answered(program: Path) -> Answered:
    def run(lines: list[str]) -> list[str]:
        done = subprocess.run([program], input="\n".join(lines), check=True, capture_output=True, text=True)
        return done.stdout.split()

    return run


def waits(word: str, at_ms: int, delay_us: int) -> str:
    return f"{word} {at_ms * MILLISECOND} {at_ms * MILLISECOND + delay_us * MICROSECOND}"


@pytest.mark.parametrize(
    ("delay_us", "packs"),
    [(20, "0"), (110, "0"), (240, "0"), (400, "1"), (1_100, "1"), (10_000, "1")],
    ids=["no limit", "1gbit", "a slow machine", "100mbit", "1 ms", "10 ms"],
)
def test_a_page_comes_compressed_where_it_takes_long_anyhow(
    answered: Answered, delay_us: int, packs: str
) -> None:
    asked = answered([*[waits("fault", at, delay_us) for at in range(8)], *["packs"] * 32])
    assert asked == ["0", *[packs] * 15] * 2, "one of sixteen comes as it is"


def test_a_late_processor_is_not_the_link(answered: Answered) -> None:
    lines = [waits("fault", at, 2_000 if at % 2 else 100) for at in range(64)]
    assert answered([*lines, "packs", "packs", "slow"]) == ["0", "0", "0"]


def test_a_token_bucket_that_lets_some_through_does_not_hide_the_link(answered: Answered) -> None:
    lines = [waits("fault", at, 400 if at % 3 else 20) for at in range(64)]
    assert answered([*lines, "packs", "packs", "slow"]) == ["0", "1", "0"]


def test_of_a_link_that_is_slow_bulk_is_told(answered: Answered) -> None:
    assert answered([*[waits("fault", at, 400) for at in range(8)], "slow"]) == ["1"]


def test_what_came_compressed_says_nothing_of_the_link(answered: Answered) -> None:
    slow = [waits("fault", at, 400) for at in range(8)]
    packed = [waits("packed", at, 90) for at in range(8, 16)]
    assert answered([*slow, *packed, "packs", "packs"]) == ["0", "1"]


def test_a_link_that_has_become_a_fast_one_is_noticed(answered: Answered) -> None:
    slow = [waits("fault", at, 400) for at in range(8)]
    fast = [waits("fault", at, 40) for at in range(8, 12)]
    assert answered([*slow, "packs", "packs", *fast, "packs", "packs"]) == ["0", "1", "0", "0"]
