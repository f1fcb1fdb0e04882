"""A tenth of the strangers of `make soak`, at each listener. The seed is printed; LAZYPROC_SEED sets it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from lazyproc.errors import ConnectionLost
from lazyproc.hosts import Pair
from lazyproc.migrate.destination import MAX_ARRIVING
from lazyproc.migrate.link import Link, linked
from lazyproc.pages.peer import Trust
from lazyproc.pages.session import Session
from lazyproc.wire.native import Party
from tests.faults.hostile import LISTENERS, Siege, destination_script, fetched, finish, listening
from tests.faults.strangers import prepared_session, resets
from tests.live.bad_luck import PACED, unchanged, unharmed
from tests.live.moving import receiving
from tests.live.programs import Program, running, wait_until
from tests.live.real import move_now, network_of

COUNT, LIMIT_S = 1000, 60.0


@pytest.mark.long
@pytest.mark.parametrize("listener", LISTENERS)
def test_strangers_change_nothing(pair: Pair, listener: str) -> None:
    seed = int(os.environ.get("LAZYPROC_SEED") or time.time())
    print(f"LAZYPROC_SEED={seed}")
    print(LISTENERS[listener](pair, Siege(COUNT, seed, LIMIT_S)))


@pytest.fixture
def program(pair: Pair) -> Iterator[Program]:
    with running(*PACED, directory=pair.shared, host=pair.source) as it:
        yield it


def test_who_is_gone_before_he_is_answered_does_not_end_serve(pair: Pair, program: Program) -> None:
    with listening(pair.source, "serve", pair.source.vpid(program.pid), "--insecure") as it:
        crowd = Siege(50, 1, LIMIT_S).crowd(it.dial_from(pair.destination), destination_script())
        crowd.come(50, (resets,), LIMIT_S)
        link(pair, it.address, Party.DESTINATION).close()
        assert it.process.poll() is None
        assert any("the connection broke" in line for line in it.notes()), it.notes()
    program.watch.wait_beats()


def test_who_has_a_tree_frozen_and_leaves(pair: Pair, program: Program) -> None:
    """He was let in and said PREPARED: so it is frozen, and runs on when he is gone."""
    with listening(pair.source, "serve", pair.source.vpid(program.pid), "--insecure") as it:
        crowd = Siege(15, 1, LIMIT_S).crowd(it.dial_from(pair.destination), destination_script())
        with unharmed(program):
            crowd.come(15, (prepared_session,), LIMIT_S)
        wait_until(lambda: it.notes().count("frozen") == 5, "each has been served")
        program.watch.wait_beats()
        fetched(pair, it, program.watch, "--insecure")


def test_only_so_many_are_on_their_way_in(pair: Pair, program: Program) -> None:
    """Each costs the receiver processes: who comes in addition is told so, and there is room when others have left."""
    with receiving(pair.destination) as receiver:
        with unchanged(pair.destination):
            links = [link(pair, receiver.address, Party.SOURCE) for _ in range(MAX_ARRIVING)]
            with pytest.raises(ConnectionLost, match=f"{MAX_ARRIVING} trees are on their way in here"):
                link(pair, receiver.address, Party.SOURCE)
            for each in links:
                each.close()
        new, _ = move_now(pair.source, receiver, program.pid)
        finish(new, program.watch)


def link(pair: Pair, address: str, side: Party) -> Link:
    """Three connections that are let in, by who says nothing more."""
    with network_of(pair.source if side is Party.SOURCE else pair.destination):
        return linked(address, side, Trust(insecure=True), Session.new())
