"""`abort` ends what is left of a session: all of that as it is by then, and nobody else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from lazyproc.hosts import Host, Pair
from lazyproc.wire.frame import Type
from tests.faults.campaign import cases
from tests.faults.campaign.moments import Trap, frame_trap
from tests.faults.helpers import DESTINATION, SOURCE, gone, journal, journals, kill, sessions
from tests.live.bad_luck import unharmed
from tests.live.moving import receiving, run_cli
from tests.live.programs import Program, running, wait_until
from tests.live.real import migrating, processes_of, runs

SLOW = ("--max-rate", "1000000")
# It has read the record, and does nothing before it is told to.
LATE = """
import sys
from lazyproc.migrate import sessions

def late(*session):
    record = find(*session)
    print("read", flush=True)
    sys.stdin.readline()
    return record

find, sessions.find = sessions.find, late
sessions.abort(sys.argv[1])
"""


@pytest.fixture
def program(pair: Pair) -> Iterator[Program]:
    with running("memory_random", "64", "2", "2000", directory=pair.shared, host=pair.source) as it:
        it.watch.wait_beats()
        yield it


def test_a_number_that_is_somebody_elses_by_now_is_let_alone(pair: Pair, program: Program) -> None:
    """Keeper and guard are killed, the pager works on, and a new process has the guard's number."""
    with (
        receiving(pair.destination) as receiver,
        migrating(pair.source, receiver, program.pid, *SLOW) as journey,
    ):
        journey.wait_running()
        record = journal(pair.destination, DESTINATION)
        _, guard = kill(pair.destination, DESTINATION, "keeper", "guard")
        wait_until(lambda: not os.path.exists(f"/proc/{guard}"), "its number is free")
        begin = f"echo {record['guard_pid'] - 1} > /proc/sys/kernel/ns_last_pid; sleep 1000 & echo $!; wait"
        shell = pair.destination.popen(["sh", "-c", begin], stdout=subprocess.PIPE, text=True)
        assert shell.stdout
        assert int(shell.stdout.readline()) == record["guard_pid"]
        stranger = pair.destination.pid(record["guard_pid"])
        run_cli(pair.destination, "abort", record["id"], expected=5)
        wait_until(lambda: "lazyproc-pager" not in processes_of(pair.destination).values(), "all have ended")
        assert not gone(stranger)
        run_cli(pair.source, "abort", record["id"])
        shell.stdout.close()


@pytest.mark.parametrize("role", [SOURCE, DESTINATION])
def test_what_was_handed_over_after_it_has_looked_is_ended(pair: Pair, program: Program, role: str) -> None:
    """Otherwise it stays, in no session: parked here, or without its memory there."""
    host = pair.source if role == SOURCE else pair.destination
    begun: list[subprocess.Popen[str]] = []
    trap = Trap(lambda: begun.append(late_abort(host, role)))
    with (
        receiving(pair.destination) as receiver,
        frame_trap(pair, receiver, cases.AtFrame(Type.PREPARED), trap) as address,
        migrating(pair.source, receiver, program.pid, *SLOW, by=address) as journey,
    ):
        journey.wait_running()
        assert trap.error is None
        record = journal(pair.destination, DESTINATION)
        root = pair.destination.pid(record["tree"]["root_pid"])
        (abort,) = begun
        abort.communicate(timeout=20)
        assert gone(program.pid if role == SOURCE else root)
        assert not journals(host, role)
        other = pair.destination if role == SOURCE else pair.source
        run_cli(other, "abort", record["id"], expected=5 if role == SOURCE else 0)


def late_abort(host: Host, role: str) -> subprocess.Popen[str]:
    argv = [sys.executable, "-c", LATE, journal(host, role)["id"]]
    pipe = subprocess.PIPE
    process: subprocess.Popen[str] = host.popen(argv, stdin=pipe, stdout=pipe, text=True)
    assert process.stdout
    assert process.stdout.readline() == "read\n"
    return process


def test_what_is_on_its_way_in_does_not_come(pair: Pair, program: Program) -> None:
    def abort() -> None:
        run_cli(pair.destination, "abort", journal(pair.destination, DESTINATION)["id"])

    trap = Trap(abort)
    with (
        unharmed(program),
        receiving(pair.destination) as receiver,
        frame_trap(pair, receiver, cases.AtFrame(Type.PREPARED), trap) as address,
        migrating(pair.source, receiver, program.pid, *SLOW, by=address) as journey,
    ):
        journey.finish(expected=1)
        assert trap.error is None
        (left,) = sessions(pair.destination)
        assert left["state"] == "aborted"
        assert left["reason"] == "it was ended there before it ran"
        assert runs(program.pid)
    os.kill(program.pid, 9)
