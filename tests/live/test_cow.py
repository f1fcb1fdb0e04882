"""Memory shared since a fork: how much more it becomes elsewhere is said beforehand, and it is right there."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from lazyproc.dump.copies import bytes_of_copies
from lazyproc.dump.explain import examine, explain
from lazyproc.events import Event, Note
from lazyproc.hosts import Pair
from lazyproc.migrate.prepare import objections, offer_of
from lazyproc.migrate.room import Room
from lazyproc.model import PAGE
from tests.live.moving import receiving
from tests.live.programs import Program, running
from tests.live.real import ending, move_now

MIB, CHILDREN = 64, 3
COPIES = CHILDREN * MIB  # MiB; less what each has changed, more what the C library's pages come to
ROUGHLY = 2


@pytest.fixture
def program(pair: Pair) -> Iterator[Program]:
    with running("cow_fork", MIB, directory=pair.shared, host=pair.source, exclusive=True) as started:
        started.watch.wait_beats()
        yield started


def test_explain_says_how_much_more_memory_it_takes(program: Program) -> None:
    events: list[Event] = []
    assert explain(program.pid, listener=events.append) == ()
    (note,) = (event for event in events if isinstance(event, Note) and "MiB more memory" in str(event))
    words = str(note).split()
    assert abs(int(words[words.index("MiB") - 1]) - COPIES) <= ROUGHLY
    assert f"pid {program.pid}: the tree needs up to" in str(note)


def test_the_destination_counts_the_copies_and_says_so(program: Program) -> None:
    offer = offer_of(examine(program.pid).smaps)
    assert abs(offer.copies * PAGE - (COPIES << 20)) <= ROUGHLY << 20
    assert offer.pages * PAGE >= (CHILDREN + 1) * MIB << 20
    assert type(offer).of(offer.fields()) == offer
    (obstacle,) = objections(offer, Room(offer.pages * PAGE))
    assert (
        f"MiB, {offer.copies * PAGE >> 20} of them copies of what is shared since a fork, and this host"
        in obstacle.why
    )
    assert list(objections(offer, Room(2 * offer.pages * PAGE))) == []


def test_one_process_shares_with_nobody_in_its_tree(program: Program) -> None:
    """A child is moved without its parent: what they share leaves nothing to be copied."""
    (child, *_) = list(examine(program.pid).smaps)[1:]
    assert bytes_of_copies(list(examine(child).smaps.values())) == 0
    events: list[Event] = []
    explain(child, listener=events.append)
    assert not [event for event in events if "MiB more memory" in str(event)]


def test_every_process_has_its_memory_there(pair: Pair, program: Program) -> None:
    with receiving(pair.destination) as receiver:
        new, _ = move_now(pair.source, receiver, program.pid)
    with ending(new):
        program.watch.wait_beats()
        assert bytes_of_copies(list(examine(new).smaps.values())) < MIB << 20
        os.kill(new, signal.SIGTERM)
        program.watch.wait_ended()
