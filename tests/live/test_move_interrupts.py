"""Ctrl-C, SIGTERM and SIGHUP to `lazyproc migrate` at every moment of the hand-over, and a second receiver."""

from __future__ import annotations

import os
import signal
import time
from contextlib import ExitStack

import pytest

from lazyproc.hosts import Pair
from tests.live.moving import CLI, receiving
from tests.live.programs import running, wait_until
from tests.live.real import ending, migrating, move_now, processes_of
from tests.live.real_gate import gate_to


@pytest.mark.parametrize(("moment", "frozen"), [(1, False), (2, False), (3, True)])
def test_interrupt_before_the_hand_over(pair: Pair, moment: int, frozen: bool) -> None:
    """The source goes on as if nothing had happened, and nothing of the tree stays at the destination."""
    with ExitStack() as stack:
        program = stack.enter_context(
            running("memory_random", "16", "2", directory=pair.shared, host=pair.source, exclusive=True)
        )
        program.watch.wait_beats()
        receiver = stack.enter_context(receiving(pair.destination))
        idle = processes_of(pair.destination)
        with (
            gate_to(receiver, pair.source, closes_at=moment) as gate,
            migrating(pair.source, receiver, program.pid, by=gate.address) as journey,
        ):
            assert gate.reached.wait(20)
            if frozen:  # which the command says a moment after the last word before the gate
                wait_until(lambda: "frozen" in journey.log().splitlines(), "it says that it is frozen")
            assert ("frozen" in journey.log().splitlines()) is frozen
            journey.process.send_signal(signal.SIGINT)
            assert journey.finish(expected=1)["exit_code"] == 1
        assert "interrupted; the process runs here as before" in journey.log()
        assert "Traceback" not in journey.log()
        program.watch.wait_beats()
        wait_until(lambda: processes_of(pair.destination) == idle, "the half-built tree is gone")
        new, _ = move_now(pair.source, receiver, program.pid)
        stack.enter_context(ending(new))
        program.watch.wait_beats()
        os.kill(new, signal.SIGTERM)
        program.watch.wait_ended()


def test_interrupt_while_the_hand_over_is_in_doubt(pair: Pair) -> None:
    """Only the destination knows who runs the tree: nothing ends the source's side before it has been told."""
    with ExitStack() as stack:
        program = stack.enter_context(
            running("memory_random", "16", "2", directory=pair.shared, host=pair.source, exclusive=True)
        )
        program.watch.wait_beats()
        receiver = stack.enter_context(receiving(pair.destination))
        with (
            gate_to(receiver, pair.source, closes_at=4) as gate,
            migrating(pair.source, receiver, program.pid, by=gate.address) as journey,
        ):
            assert gate.reached.wait(20)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                journey.process.send_signal(number)
            program.watch.wait_beats()
            gate.opened.set()
            new, _ = journey.arrive()
        stack.enter_context(ending(new))
        os.kill(new, signal.SIGTERM)
        program.watch.wait_ended()


def test_interrupt_after_the_hand_over(pair: Pair) -> None:
    """The destination needs the pages that are still here: it is completed, whoever presses what."""
    with ExitStack() as stack:
        program = stack.enter_context(
            running("memory_random", "64", "2", directory=pair.shared, host=pair.source, exclusive=True)
        )
        program.watch.wait_beats()
        receiver = stack.enter_context(receiving(pair.destination))
        with migrating(pair.source, receiver, program.pid, "--max-rate", "40000000") as journey:
            journey.wait_running()
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                journey.process.send_signal(number)
            program.watch.wait_beats()
            assert journey.still_lazy()
            while journey.still_lazy():  # to its last instruction
                journey.process.send_signal(signal.SIGINT)
                time.sleep(0.001)
            new, _ = journey.arrive()
        stack.enter_context(ending(new))
        os.kill(new, signal.SIGTERM)
        program.watch.wait_ended()


def test_a_second_receiver_at_the_same_address(pair: Pair) -> None:
    with receiving(pair.destination) as receiver:
        argv = [*CLI, "receive", "--listen", receiver.address, "--insecure"]
        second = pair.destination.run(argv, capture_output=True, text=True, timeout=20)
    assert second.returncode == 1
    assert receiver.address in second.stderr
    assert "in use" in second.stderr
    assert "Traceback" not in second.stderr
