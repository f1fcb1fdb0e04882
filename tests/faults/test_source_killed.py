"""The process is killed by an operator, or for want of memory: parked at the source, and what had not come over is
lost; or at the destination before it ran there, and it runs on here.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from lazyproc.hosts import Pair
from lazyproc.wire.frame import Type
from tests.faults.campaign import cases
from tests.faults.campaign.moments import Trap, frame_trap
from tests.faults.helpers import DESTINATION, SOURCE, gone, journal, journals, kill, sessions
from tests.faults.test_helpers_killed import waits_for_a_page
from tests.live.bad_luck import unharmed
from tests.live.moving import receiving, run_cli
from tests.live.programs import Program, running, wait_until
from tests.live.real import Journey, migrating, processes_of

SLOW = ("--max-rate", "1000000")  # a minute for 64 MiB


@pytest.fixture
def program(pair: Pair) -> Iterator[Program]:
    with running("memory_random", "64", "2", directory=pair.shared, host=pair.source, exclusive=True) as it:
        it.watch.wait_beats()
        yield it


def is_lost(pair: Pair, program: Program, journey: Journey) -> None:
    """`migrate` says so and ends; the process waits, reads nothing wrong, and the operator there knows why."""
    answer = journey.finish(expected=5)
    assert "has ended, and with it the memory that had not come over yet" in answer["error"]
    assert journey.log().count("reconnecting") < 10
    (left,) = sessions(pair.source)
    run_cli(pair.source, "abort", left["id"])
    info = sessions(pair.destination)[0]
    assert info["state"] == "running"
    assert "source is lost: the parked process has ended" in info["reason"]
    root = pair.destination.pid(info["root_pid"])
    wait_until(lambda: waits_for_a_page(root), "it waits")
    done = run_cli(pair.destination, "abort", info["id"], expected=5)
    assert f"{info['pages_remaining']} of its pages were missing" in done.stdout
    assert gone(root)
    assert program.watch.read().errors == 0


def test_after_the_commit(pair: Pair, program: Program) -> None:
    with (
        receiving(pair.destination) as receiver,
        migrating(pair.source, receiver, program.pid, *SLOW) as journey,
    ):
        journey.wait_running()
        os.kill(program.pid, signal.SIGKILL)
        is_lost(pair, program, journey)


def test_while_its_memory_is_freed(pair: Pair, program: Program) -> None:
    with (
        receiving(pair.destination) as receiver,
        migrating(pair.source, receiver, program.pid, *SLOW, "--release") as journey,
    ):
        wait_until(
            lambda: {each["state"] for each in journals(pair.source, SOURCE)} == {"releasing"}, "it frees"
        )
        os.kill(program.pid, signal.SIGKILL)
        is_lost(pair, program, journey)


def test_before_it_is_known_which_pages_have_content(pair: Pair, program: Program) -> None:
    """Without the map nothing is taken for zero."""

    def kill_it() -> None:
        os.kill(program.pid, signal.SIGKILL)
        wait_until(lambda: gone(program.pid), "it has ended")

    trap = Trap(kill_it)
    with (
        receiving(pair.destination) as receiver,
        frame_trap(pair, receiver, cases.AtFrame(Type.RUNNING), trap) as address,
        migrating(pair.source, receiver, program.pid, *SLOW, by=address) as journey,
    ):
        is_lost(pair, program, journey)
        assert trap.error is None


def test_with_the_one_who_serves_it(pair: Pair, program: Program) -> None:
    """Whoever takes over finds nothing to serve."""
    with (
        receiving(pair.destination) as receiver,
        migrating(pair.source, receiver, program.pid, *SLOW) as journey,
    ):
        journey.wait_running()
        root = pair.destination.pid(journal(pair.destination, DESTINATION)["tree"]["root_pid"])
        os.kill(program.pid, signal.SIGKILL)
        kill(pair.source, SOURCE, "server")
        answer = journey.finish(expected=5)
        assert "has ended, and with it the memory" in answer["error"]
        (record,) = journals(pair.source, SOURCE)
        run_cli(pair.source, "resume", record["id"], expected=5)
        run_cli(pair.source, "abort", record["id"])
        run_cli(pair.destination, "abort", record["id"], expected=5)
        assert gone(root)
        assert program.watch.read().errors == 0


@pytest.mark.parametrize(
    "cargo", [("memory_random", "64", "2"), ("cow_fork", "16")], ids=["the root", "a child"]
)
def test_at_the_destination_before_the_commit(pair: Pair, cargo: tuple[str, ...]) -> None:
    killed: list[int] = []

    def kill_it() -> None:
        built = [pid for pid, comm in processes_of(pair.destination).items() if comm == cargo[0]]
        killed.append(max(built))
        os.kill(killed[0], signal.SIGKILL)
        wait_until(lambda: gone(killed[0]), "it has ended")

    trap = Trap(kill_it)
    with running(*cargo, directory=pair.shared, host=pair.source, exclusive=True) as program:
        with (
            unharmed(program),
            receiving(pair.destination) as receiver,
            frame_trap(pair, receiver, cases.AtFrame(Type.COMMIT), trap) as address,
            migrating(pair.source, receiver, program.pid, by=address) as journey,
        ):
            assert "was killed before it ran" in journey.finish(expected=1)["error"]
            assert trap.error is None
            assert not journals(pair.source, SOURCE)
        program.stop_and_verify()
