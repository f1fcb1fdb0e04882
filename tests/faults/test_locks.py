"""What becomes of file locks when a move fails between the hand that lets go and the hand that takes."""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from lazyproc.hosts import Host, Pair
from tests.faults.helpers import DESTINATION, SOURCE, helper, journals, sessions
from tests.faults.killed_at import killed_at
from tests.live.lockers import Holder, holders_of, holding, is_free, waiters_of
from tests.live.moving import receiving, run_cli
from tests.live.programs import wait_until
from tests.live.real import Journey, ending, migrating, runs
from tests.live.test_locks import waiting_for
from tests.live.tracees import state_of

LOCKS = """
file = opened('file')
take('flock', file)
take('posix', file)
take('ofd', os.open(_folder + '/other', os.O_RDWR | os.O_CREAT | os.O_CLOEXEC))
"""


FORBID = """
import ctypes
libc = ctypes.CDLL(None)
program = struct.pack('HBBI' * 4, 0x20, 0, 0, 0, 0x15, 0, 1, 72, 6, 0, 0, 0x80000000, 6, 0, 0, 0x7fff0000)
code = ctypes.create_string_buffer(program)
fprog = struct.pack('HxxxxxxQ', 4, ctypes.addressof(code))
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, fprog, 0, 0) == 0
"""  # fcntl(2) is SIGSYS from then on


@pytest.fixture
def holder(pair: Pair) -> Iterator[Holder]:
    with holding(pair.source, pair.shared, LOCKS) as it:
        yield it


def arrives_with_its_locks(journey: Journey, holder: Holder) -> None:
    new, _ = journey.arrive()
    with ending(new):
        holder.answers(new)
        assert holders_of(holder.file).count(new) == 2


def runs_here_with_its_locks(pair: Pair, holder: Holder) -> None:
    holder.answers(holder.pid)
    assert holders_of(holder.file).count(holder.pid) == 2
    assert not is_free(holder.file)
    assert not is_free(holder.folder / "other")
    assert not journals(pair.source, SOURCE)


@contextmanager
def stopped(host: Host, role: str, name: str) -> Iterator[None]:
    """That helper stands at the point that it was sent to; it goes on at the end."""
    pid = helper(host, role, name)
    wait_until(lambda: state_of(pid) == "T", f"the {name} of the {role} stands there")
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("whom", ["one", "all"])
@pytest.mark.parametrize("point", ["BUILT said", "COMMIT read", "COMMIT heard", "committed"])
def test_killed_at_the_destination_it_runs_on_here(point: str, whom: str, pair: Pair, holder: Holder) -> None:
    with (
        receiving(pair.destination, by=killed_at(point, whom)) as receiver,
        migrating(pair.source, receiver, holder.pid) as journey,
    ):
        journey.finish(expected=1)
    runs_here_with_its_locks(pair, holder)


@pytest.mark.parametrize("point", ["IMAGES said", "parked", "locks let go"])
def test_killed_at_the_source_it_runs_on_here(point: str, pair: Pair, holder: Holder) -> None:
    with (
        receiving(pair.destination) as receiver,
        migrating(pair.source, receiver, holder.pid, run_by=killed_at(point)) as journey,
    ):
        journey.finish(expected=1)
    runs_here_with_its_locks(pair, holder)


@pytest.mark.parametrize("here", [(), ("--here", "--force")], ids=["resume", "resume --here"])
def test_all_are_killed_at_the_source_and_one_resume_takes_them_again(
    here: tuple[str, ...], pair: Pair, holder: Holder
) -> None:
    with (
        receiving(pair.destination) as receiver,
        migrating(pair.source, receiver, holder.pid, run_by=killed_at("locks let go", "all")) as journey,
    ):
        journey.finish(expected=4)
        wait_until(lambda: is_free(holder.file), "nobody has them meanwhile")
        (left,) = sessions(pair.source)
        run_cli(pair.source, "resume", left["id"], *here, expected=0 if here else 1)
    runs_here_with_its_locks(pair, holder)


@pytest.mark.parametrize("whom", ["one", "all"])
@pytest.mark.parametrize("how", ["stopped", "filtered"])
def test_what_stands_or_may_not_call_gets_them_again(how: str, whom: str, pair: Pair) -> None:
    code = LOCKS + FORBID if how == "filtered" else LOCKS
    point = killed_at("locks let go", whom)
    with holding(pair.source, pair.shared, code) as holder:
        if how == "stopped":
            os.kill(holder.pid, signal.SIGSTOP)
            wait_until(lambda: state_of(holder.pid) == "T", "it is stopped")
        with (
            receiving(pair.destination) as receiver,
            migrating(pair.source, receiver, holder.pid, run_by=point) as journey,
        ):
            journey.finish(expected=4 if whom == "all" else 1)
            if whom == "all":
                (left,) = sessions(pair.source)
                run_cli(pair.source, "resume", left["id"], expected=1)
        if how == "stopped":
            assert state_of(holder.pid) == "T"
            os.kill(holder.pid, signal.SIGCONT)
        runs_here_with_its_locks(pair, holder)


@pytest.mark.parametrize("point", ["COMMIT said", "COMMITTED heard"])
def test_killed_at_the_source_when_it_is_theirs_it_arrives(point: str, pair: Pair, holder: Holder) -> None:
    with (
        receiving(pair.destination) as receiver,
        migrating(pair.source, receiver, holder.pid, run_by=killed_at(point)) as journey,
    ):
        arrives_with_its_locks(journey, holder)


def test_in_doubt_its_copy_has_them_and_force_does_not_let_it_run_twice(pair: Pair, holder: Holder) -> None:
    with (
        receiving(pair.destination) as receiver,
        migrating(pair.source, receiver, holder.pid, run_by=killed_at("COMMIT said", "all")) as journey,
    ):
        journey.finish(expected=4)
        wait_until(lambda: "running" in receiver.notes().splitlines(), "it runs there")
        (left,) = sessions(pair.source)
        refused = run_cli(pair.source, "resume", left["id"], "--here", "--force", expected=4)
        assert "somebody else has it" in refused.stderr
        run_cli(pair.source, "resume", left["id"])
        (new,) = {pid for pid in holders_of(holder.file) if pid > 0}
        with ending(new):
            holder.answers(new)


@pytest.mark.parametrize("here", [(), ("--here",)], ids=["resume", "resume --here"])
def test_a_third_one_takes_it_in_between(here: tuple[str, ...], pair: Pair, holder: Holder) -> None:
    """Nothing runs without its lock: it stays parked, and runs on when the third one is gone."""
    with receiving(pair.destination) as receiver, holder.file.open("r+b") as third:
        with migrating(
            pair.source, receiver, holder.pid, run_by=killed_at("locks let go", "stop")
        ) as journey:
            with stopped(pair.source, SOURCE, "server"):
                fcntl.flock(third, fcntl.LOCK_EX | fcntl.LOCK_NB)
            journey.finish(expected=4)
        (left,) = sessions(pair.source)
        assert "somebody else has it" in receiver.notes()
        assert f"fd 4 ({holder.file}): it stays parked here: its file lock cannot be had" in journey.log()
        assert "was called off" in left["reason"]
        assert f"lazyproc resume {left['id']} --here" in journey.log()
        refused = run_cli(pair.source, "resume", left["id"], *here, expected=4)
        assert "stays parked" in refused.stderr
        fcntl.flock(third, fcntl.LOCK_UN)
        run_cli(pair.source, "resume", left["id"], *here, expected=0 if here else 1)
    runs_here_with_its_locks(pair, holder)


def test_abort_of_what_is_parked_for_want_of_a_lock_is_in_no_doubt(pair: Pair, holder: Holder) -> None:
    with receiving(pair.destination) as receiver, holder.file.open("r+b") as third:
        with migrating(
            pair.source, receiver, holder.pid, run_by=killed_at("locks let go", "stop")
        ) as journey:
            with stopped(pair.source, SOURCE, "server"):
                fcntl.flock(third, fcntl.LOCK_EX | fcntl.LOCK_NB)
            journey.finish(expected=4)
        (left,) = sessions(pair.source)
        done = run_cli(pair.source, "abort", left["id"])
        assert "not known" not in done.stdout + done.stderr
    wait_until(lambda: not runs(holder.pid), "it has ended")
    assert not sessions(pair.source)


def test_a_third_one_only_looks(pair: Pair, holder: Holder) -> None:
    """Who tries whether it is free has it for a moment."""
    with (
        receiving(pair.destination, by=killed_at("COMMIT read", "stop")) as receiver,
        migrating(pair.source, receiver, holder.pid) as journey,
    ):
        with holder.file.open("r+b") as third, stopped(pair.destination, DESTINATION, "keeper"):
            fcntl.flock(third, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.kill(helper(pair.destination, DESTINATION, "keeper"), signal.SIGCONT)
            wait_until(lambda: len(holders_of(holder.folder / "other")) == 1, "it takes the others")
        arrives_with_its_locks(journey, holder)


def test_who_begins_to_wait_in_the_last_moment_gets_nothing(pair: Pair, holder: Holder) -> None:
    with (
        receiving(pair.destination) as receiver,
        migrating(pair.source, receiver, holder.pid, run_by=killed_at("IMAGES said", "stop")) as journey,
        ExitStack() as stack,
    ):
        with stopped(pair.source, SOURCE, "server"):
            waiter = stack.enter_context(waiting_for(pair.source, holder.file, "flock"))
        journey.finish(expected=3)
        assert f"pid {waiter} waits for its file lock" in journey.log()
        assert waiters_of(holder.file)
    runs_here_with_its_locks(pair, holder)
