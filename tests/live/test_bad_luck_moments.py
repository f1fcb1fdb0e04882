"""What ends at the wrong moment: a command, the receiver, the source of the pages, the process itself.

Before the commit the source runs on and the destination has nothing; after it the tree is there, and never on both.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazyproc.hosts import Pair
from tests.live.bad_luck import (
    COMMAND_S,
    PACED,
    ended,
    lazyproc,
    says,
    started,
    unchanged,
    unharmed,
    way_to,
)
from tests.live.moving import Receiver, receiving
from tests.live.programs import Program, running, wait_until
from tests.live.real import dialled, ending, migrating, move_now, processes_of, runs
from tests.live.real_gate import gate_to
from tests.live.tracees import state_of

pytestmark = pytest.mark.long

SEED = 11
LONGEST_S = 0.4  # of an undisturbed command
GARBAGE = bytes(range(256))


@pytest.fixture
def program(pair: Pair) -> Iterator[Program]:
    with running(*PACED, directory=pair.shared, host=pair.source) as started:
        yield started


# --- at a known moment -------------------------------------------------------------------------------------


MOMENTS = pytest.mark.parametrize("moment", [2, 3], ids=["before the freeze", "while it is frozen"])


@MOMENTS
def test_the_command_is_killed(pair: Pair, program: Program, moment: int) -> None:
    with (
        receiving(pair.destination) as receiver,
        unchanged(pair.source, pair.destination),
        unharmed(program),
        gate_to(receiver, pair.source, closes_at=moment) as gate,
        migrating(pair.source, receiver, program.pid, by=gate.address) as journey,
    ):
        assert gate.reached.wait(COMMAND_S)
        journey.process.kill()
        journey.process.wait()
    program.stop_and_verify()


@MOMENTS
def test_the_receiver_is_killed(pair: Pair, program: Program, moment: int) -> None:
    said = []

    def back(number: int, data: bytes) -> bytes:
        """The two talk in turns on the control connection: 1 WELCOME, 2 PREPARED, 3 BUILT."""
        if number == 0:
            said.append(data)
            if len(said) == moment:
                receiver.process.kill()
                raise ConnectionResetError
        return data

    with (
        unchanged(pair.source, pair.destination),
        unharmed(program),
        receiving(pair.destination, expected=-signal.SIGKILL) as receiver,
        way_to(receiver, pair.source, back=back) as address,
    ):
        done = lazyproc(pair.source, "migrate", pair.source.vpid(program.pid), address, "--insecure")
        says(done, 1, address, "; ")
    program.stop_and_verify()


def test_the_receiver_is_killed_after_the_commit(pair: Pair, program: Program) -> None:
    """The tree has a keeper of its own, who brings the rest."""
    with (
        receiving(pair.destination, expected=-signal.SIGKILL) as receiver,
        migrating(pair.source, receiver, program.pid, "--max-rate", "8000000") as journey,
    ):
        journey.wait_running()
        receiver.process.kill()
        receiver.process.wait()
        ends_there(program, journey.arrive()[0])


def test_pages_become_rubbish_after_the_commit(pair: Pair, program: Program) -> None:
    """The checksum finds it: nobody there reads a wrong byte. The pages come again over another link."""
    carried = [0, 0, 0]
    spoiled: list[int] = []

    def there(number: int, data: bytes) -> bytes:
        carried[number] += len(data)
        if spoiled or not number or carried[number] < 1 << 20:
            return data
        spoiled.append(number)
        return (GARBAGE * 512)[: len(data)]

    with receiving(pair.destination) as receiver, way_to(receiver, pair.source, there=there) as address:
        with migrating(pair.source, receiver, program.pid, by=address) as journey:
            new, report = journey.arrive()
        assert spoiled
        assert report["reconnects"] == 1
        assert "the source is lost" in receiver.notes()
        ends_there(program, new)


def ends_there(program: Program, new: int) -> None:
    with ending(new):
        program.watch.wait_beats()
        os.kill(new, signal.SIGTERM)
        program.watch.wait_ended()


def end_all_but(pair: Pair, idle: dict[int, str]) -> None:
    for pid in processes_of(pair.destination).keys() - idle.keys():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


# --- at any moment -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_migrate_at_any_moment(pair: Pair, number: signal.Signals) -> None:
    moments = random.Random(SEED)
    here = 0
    with receiving(pair.destination) as receiver:
        idle = processes_of(pair.destination)
        longest = undisturbed_s(pair, receiver, idle)
        for _ in range(10):
            with running(*PACED, directory=pair.shared, host=pair.source, exclusive=True) as program:
                program.watch.wait_beats()
                with migrating(pair.source, receiver, program.pid) as journey:
                    time.sleep(moments.uniform(0, longest))
                    journey.process.send_signal(number)
                    code = journey.process.wait(COMMAND_S)
                check_interrupted(code, number, journey.log())
                here += settled(pair, program, code, idle)
    assert here > 0, "no signal came before the hand-over"


def undisturbed_s(pair: Pair, receiver: Receiver, idle: dict[int, str]) -> float:
    """How long the command takes that nobody interrupts."""
    with running(*PACED, directory=pair.shared, host=pair.source, exclusive=True) as program:
        program.watch.wait_beats()
        with migrating(pair.source, receiver, program.pid) as journey:
            started = time.monotonic()
            code = journey.process.wait(COMMAND_S)
            taken = time.monotonic() - started
        assert not settled(pair, program, code, idle)
    return taken


def check_interrupted(code: int, number: signal.Signals, words: str) -> None:
    """Before lazyproc is up, Python says what it says. It ends by SIGINT, whatever we return, when the interrupt has
    come within an exec() of a string: dataclasses do that when they are imported.
    """
    assert code in (0, 1, -number, -signal.SIGINT), words
    assert "Traceback" not in words or "lazyproc: " not in words, words


def settled(pair: Pair, program: Program, code: int, idle: dict[int, str]) -> bool:
    """True when the tree runs here; it is in exactly one place, whole. It is ended."""

    def there() -> bool:
        return processes_of(pair.destination) != idle

    wait_until(lambda: state_of(program.pid) in "TZ" or not there(), "it runs in one place")
    if state_of(program.pid) in "TZ":
        # T: killed after COMMIT, and nobody is left to bring what is missing.
        assert state_of(program.pid) == "Z" or code == -signal.SIGKILL
        if state_of(program.pid) == "Z":
            program.watch.wait_beats()
        end_all_but(pair, idle)
        assert program.watch.read().errors == 0, str(program.watch.read())
        return False
    program.watch.wait_beats()
    program.stop_and_verify()
    return True


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_signal_to_checkpoint_at_any_moment(pair: Pair, number: signal.Signals) -> None:
    """The tree runs on, or it is gone and its images are whole."""
    moments = random.Random(SEED)
    source = pair.source
    for turn in range(8):
        with running(*PACED, directory=pair.shared, host=source, exclusive=True) as program:
            name = f"images-{turn}"
            process = started(source, "checkpoint", source.vpid(program.pid), "-D", source.scratch / name)
            time.sleep(moments.uniform(0, LONGEST_S))
            process.send_signal(number)
            _, words = process.communicate(timeout=COMMAND_S)
            check_interrupted(process.returncode, number, words)
            if process.returncode == 0 or not runs(program.pid):
                assert program.process.wait(COMMAND_S) == -signal.SIGKILL
                lazyproc(source, "show", source.scratch / name).check_returncode()
                continue
            program.watch.wait_beats()
            program.stop_and_verify()
            if number == signal.SIGINT:
                assert not (source.outside / name).exists()


# --- the process itself ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_process_ends_at_any_moment(pair: Pair) -> None:
    moments = random.Random(SEED)
    with receiving(pair.destination) as receiver:
        idle = processes_of(pair.destination)
        for turn in range(10):
            with running(*PACED, directory=pair.shared, host=pair.source) as program:
                pid = pair.source.vpid(program.pid)
                words = ("-D", f"/tmp/images-{turn}") if turn % 2 else (receiver.address, "--insecure")
                process = started(pair.source, "checkpoint" if turn % 2 else "migrate", pid, *words)
                time.sleep(moments.uniform(0.05, LONGEST_S))
                program.process.kill()
                _, error = process.communicate(timeout=COMMAND_S)
                if process.returncode:
                    says(subprocess.CompletedProcess("", process.returncode, "", error), process.returncode)
                    assert process.returncode in (1, 3, 5)
                end_all_but(pair, idle)
                wait_until(lambda: processes_of(pair.destination) == idle, "nothing is left there")


def test_children_that_come_go_and_execute(pair: Pair) -> None:
    """A shell that starts a program again and again is moved whole, or told why not, and runs on."""
    null = subprocess.DEVNULL
    argv = ["sh", "-c", "while :; do /bin/true; done"]
    shell = pair.source.popen(argv, stdin=null, stdout=null, stderr=null)
    try:
        pid = pair.source.vpid(shell.pid)
        for turn in range(6):
            images = Path(f"/tmp/images-{turn}")
            done = lazyproc(pair.source, "checkpoint", pid, "-D", images, "--leave-running")
            if done.returncode:
                says(done, done.returncode, "; ")
                assert done.returncode in (1, 3)
            wait_until(lambda: state_of(shell.pid) in "RS", "the shell runs")
        with receiving(pair.destination) as receiver:
            new, _ = move_now(pair.source, receiver, shell.pid)
            with ending(new):
                wait_until(lambda: state_of(new) in "RS", "the shell runs there")
    finally:
        os.killpg(shell.pid, signal.SIGKILL)
        shell.wait()


def test_packets_come_through_when_the_command_is_killed(pair: Pair) -> None:
    """What held them back while a server was frozen goes with who froze it."""
    null = subprocess.DEVNULL
    argv = [sys.executable, "-m", "http.server", "8000", "--directory", str(pair.source.outside)]
    with (
        receiving(pair.destination) as receiver,
        unchanged(pair.source, pair.destination),
        ended(pair.source.popen(argv, stdin=null, stdout=null, stderr=null)) as server,
    ):
        dialled(pair.destination, str(pair.source.address), 8000).close()
        with (
            gate_to(receiver, pair.source, closes_at=3) as gate,
            migrating(pair.source, receiver, server.pid, by=gate.address) as journey,
        ):
            assert gate.reached.wait(COMMAND_S), journey.log()
            assert "lazyproc_" in tables(pair)
            journey.process.kill()
            journey.process.wait()
            wait_until(lambda: "lazyproc_" not in tables(pair), "packets come through again")
        dialled(pair.destination, str(pair.source.address), 8000).close()


def tables(pair: Pair) -> str:
    return str(pair.source.run(["nft", "list", "tables"], capture_output=True, text=True, check=True).stdout)
