"""The same redis, moved fifty times."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from lazyproc.hosts import trio_of_hosts
from tests.faults.to_and_fro import to_and_fro

NAME = "redis"
COUNT = 50


def runs(_seed: int) -> Iterator[tuple[str, Callable[[], dict[str, object]]]]:
    yield NAME, to_and_fro_between_fresh_hosts


def to_and_fro_between_fresh_hosts() -> dict[str, object]:
    with trio_of_hosts() as trio:
        return to_and_fro(trio, COUNT)
