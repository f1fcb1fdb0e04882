"""Every self-checking program moves while it runs, lazily, between two hosts, and back; afterwards it verifies itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from lazyproc.errors import HostLacks
from lazyproc.hosts import Pair, pair_of_hosts
from tests.live.moving import Receiver, move, receiving
from tests.live.programs import SOURCES, UNSUPPORTED, Program, running
from tests.needs import lacking

ARGUMENTS = {
    "clocks": ("20000",),
    "fork_lazy": ("2",),
    "memory_random": ("8", "2", "100"),
    "sleeps": ("5000",),
    "timers": ("5000",),
}
RESTLESS = ("fork_lazy", "sleeps", "sock_queues", "threads")  # their mappings, descriptors and processes come and go
PROTECTING = ("memory_static",)  # changes the protection of its mappings all the time
PROGRAMS = sorted(path.stem for path in SOURCES.glob("*.c"))


@dataclass(frozen=True, slots=True)
class Field:
    """Two hosts, each with a receiver."""

    pair: Pair
    there: Receiver
    back: Receiver


@pytest.fixture(scope="module")
def field() -> Iterator[Field]:
    with ExitStack() as stack:
        try:
            pair = stack.enter_context(pair_of_hosts())
        except HostLacks as error:
            lacking(error.what, error.remedy)
        there = stack.enter_context(receiving(pair.destination))
        yield Field(pair, there, stack.enter_context(receiving(pair.source)))


def started(stack: ExitStack, name: str, field: Field) -> Program:
    pair = field.pair
    program = stack.enter_context(
        running(name, *ARGUMENTS.get(name, ()), directory=pair.shared, host=pair.source, exclusive=True)
    )
    if program.process.poll() == UNSUPPORTED:
        pytest.skip(f"this machine lacks what {name} checks")
    program.watch.wait_beats()
    return program


@pytest.mark.parametrize("name", PROGRAMS)
def test_moves_there_and_back(name: str, field: Field) -> None:
    with ExitStack() as stack:
        program = started(stack, name, field)
        checks = {"same_maps": name not in PROTECTING, "whole_tree": name not in RESTLESS}
        there = move(field.pair.source, field.there, program.pid, **checks)
        program.watch.wait_beats()
        back = move(field.pair.destination, field.back, there.pid, **checks)
        program.watch.wait_beats()
        back.end(program.watch)
