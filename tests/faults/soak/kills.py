"""Three hundred kills: of every helper and command, alone and together, at any moment of a migration."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tests.faults.campaign.cases import a_kill
from tests.faults.campaign.tally import tally

NAME = "kills"
COUNT = 300


def runs(seed: int) -> Iterator[tuple[str, Callable[[], dict[str, object]]]]:
    yield NAME, lambda: tally(a_kill(seed, number) for number in range(COUNT))
