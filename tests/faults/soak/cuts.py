"""A hundred cuts of the link between the hosts, of 50 ms to 12 s, at any moment of a migration."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tests.faults.campaign.cases import a_cut
from tests.faults.campaign.tally import tally

NAME = "cuts"
COUNT = 100


def runs(seed: int) -> Iterator[tuple[str, Callable[[], dict[str, object]]]]:
    yield NAME, lambda: tally(a_cut(seed, number) for number in range(COUNT))
