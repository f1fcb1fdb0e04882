"""AIO rings: an idle one moves, one with a completion that nobody has fetched is refused, whenever that came."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from lazyproc.dump.explain import explain
from lazyproc.errors import CannotBeDone
from lazyproc.hosts import Pair
from tests.live.aio import FETCH, LEAVE, POLL_MS, ask, unfetched
from tests.live.bad_luck import COMMAND_S, lazyproc, says, unchanged, unharmed
from tests.live.moving import receiving
from tests.live.programs import Program, running, wait_until
from tests.live.real import ending, migrating, move_now
from tests.live.real_gate import gate_to
from tests.live.tracees import freeze_and_let_go

WORDS = (
    "mapping 0x",
    "/[aio]: is an AIO ring with completions that the program has not fetched",
    "io_getevents",
)


@pytest.fixture
def program(pair: Pair) -> Iterator[Program]:
    with running("aio_ring", directory=pair.shared, host=pair.source, exclusive=True) as started:
        yield started


@pytest.fixture
def polling(pair: Pair) -> Iterator[Program]:
    with running("aio_ring", POLL_MS, directory=pair.shared, host=pair.source, exclusive=True) as started:
        yield started


def test_idle_rings_move_and_work(pair: Pair, program: Program) -> None:
    ask(program, LEAVE)
    ask(program, FETCH)
    assert explain(program.pid) == ()
    with receiving(pair.destination) as receiver:
        new, _ = move_now(pair.source, receiver, program.pid)
    with ending(new):
        program.watch.wait_beats()
        os.kill(new, signal.SIGTERM)
        program.watch.wait_ended()


def test_what_was_not_fetched_is_refused_before_the_freeze(pair: Pair, program: Program) -> None:
    source = pair.source
    ask(program, LEAVE)
    assert unfetched(program.pid) == 1
    with unchanged(source), unharmed(program):
        (obstacle,) = explain(program.pid)
        assert all(word in str(obstacle) for word in WORDS), obstacle
        argv = ("checkpoint", source.vpid(program.pid), "-D", source.scratch / "images")
        says(lazyproc(source, *argv), 3, *WORDS)
        assert "frozen" not in lazyproc(source, *argv, "-v").stderr
    ask(program, FETCH)
    done = lazyproc(source, *argv, "-v")
    assert done.returncode == 0, done.stderr
    assert "frozen" in done.stderr


def test_what_was_not_fetched_is_refused_in_the_freeze(program: Program) -> None:
    ask(program, LEAVE)
    with unharmed(program), pytest.raises(CannotBeDone, match="has not fetched"):
        freeze_and_let_go(program.pid)
    ask(program, FETCH)
    program.stop_and_verify()


@pytest.mark.parametrize("moment", [2, 3], ids=["before the freeze", "while it is frozen"])
def test_what_comes_after_explain_is_refused_all_the_same(pair: Pair, polling: Program, moment: int) -> None:
    """A request under way cannot be seen; its completion is, up to the last moment."""
    with (
        receiving(pair.destination) as receiver,
        unchanged(pair.source, pair.destination),
        unharmed(polling),
        gate_to(receiver, pair.source, closes_at=moment) as gate,
    ):
        ask(polling, LEAVE)
        assert unfetched(polling.pid) == 0
        with migrating(pair.source, receiver, polling.pid, by=gate.address) as journey:
            assert gate.reached.wait(COMMAND_S)
            assert unfetched(polling.pid) == 0, "the moment was missed: it came too early"
            wait_until(lambda: unfetched(polling.pid) == 1, "the request is complete")
            gate.opened.set()
            journey.finish(expected=3)
        assert all(word in journey.log() for word in WORDS), journey.log()
        assert "prepared" in journey.log().split()
    ask(polling, FETCH)
    polling.stop_and_verify()
