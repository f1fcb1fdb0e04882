"""What `make bench` says of medians and of ratios."""

from __future__ import annotations

import pytest

from benchmarks.measure import Goal, Samples, confidence, median_interval


@pytest.mark.parametrize(
    ("count", "interval"), [(1, (0, 0)), (3, (0, 2)), (6, (0, 5)), (10, (1, 8)), (15, (3, 11))]
)
def test_interval_of_the_median(count: int, interval: tuple[int, int]) -> None:
    assert median_interval(range(count)) == interval  # the ranks in the tables of the sign test


@pytest.mark.parametrize("count", [6, 7, 10, 15, 100])
def test_six_samples_are_enough(count: int) -> None:
    assert confidence(count) >= 0.95


@pytest.mark.parametrize(("count", "sure"), [(1, 0.0), (2, 0.5), (3, 0.75), (5, 0.9375)])
def test_fewer_say_how_sure_they_are(count: int, sure: float) -> None:
    assert confidence(count) == sure


def test_a_round_without_anything_has_no_ratio() -> None:
    mine, theirs = Samples("faults", (0.0, 0.0, 3.0)), Samples("faults", (4.0, 0.0, 6.0))
    goal = Goal.of("faults", 1 / 10, mine, theirs)
    assert (goal.ratio, goal.interval) == (0, (0, 0.5))
