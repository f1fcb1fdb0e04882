"""Ten thousand strangers at each listener."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from lazyproc.hosts import pair_of_hosts
from tests.faults.hostile import LISTENERS, Siege

NAME = "hostile"
COUNT, LIMIT_S = 10_000, 600.0


def runs(seed: int) -> Iterator[tuple[str, Callable[[], dict[str, object]]]]:
    for listener in LISTENERS:
        yield listener, partial(besiege, listener, seed)


def besiege(listener: str, seed: int) -> dict[str, object]:
    with pair_of_hosts() as pair:
        return LISTENERS[listener](pair, Siege(COUNT, seed, LIMIT_S))
