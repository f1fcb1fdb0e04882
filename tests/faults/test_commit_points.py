"""Whoever is killed at a named point of the hand-over: it goes on at one side, and by itself."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from lazyproc.hosts import Host, Pair
from lazyproc.kernel import proc
from tests.faults.helpers import DESTINATION, SOURCE, gone, journals, sessions
from tests.faults.killed_at import killed_at
from tests.live.bad_luck import unharmed
from tests.live.moving import receiving, run_cli
from tests.live.programs import Program, running, wait_until
from tests.live.real import Journey, ending, migrating, processes_of, runs

pytestmark = pytest.mark.long

MIB = "64"


@pytest.fixture
def program(pair: Pair) -> Iterator[Program]:
    with running("memory_random", MIB, "2", directory=pair.shared, host=pair.source, exclusive=True) as it:
        it.watch.wait_beats()
        yield it


@pytest.mark.parametrize(
    ("point", "here"),
    [
        ("IMAGES said", True),
        ("parked", True),
        ("BUILT said", False),
        ("COMMIT heard", False),
        ("committed", False),
    ],
)
def test_it_runs_on_here(pair: Pair, program: Program, point: str, here: bool) -> None:
    with unharmed(program):
        with (
            receiving(pair.destination, by=() if here else killed_at(point)) as receiver,
            migrating(pair.source, receiver, program.pid, run_by=killed_at(point) if here else ()) as journey,
        ):
            journey.finish(expected=1)
        assert not journals(pair.source, SOURCE)
        assert "running" not in receiver.notes().splitlines()
    program.stop_and_verify()


@pytest.mark.parametrize("point", ["BUILT said", "COMMIT heard", "committed"])
def test_all_are_killed_at_the_destination_and_it_runs_on_here(
    pair: Pair, program: Program, point: str
) -> None:
    """Nobody is left who could commit it: who asks there is told so, and `resume` there does not take that away."""
    with unharmed(program):
        with (
            receiving(pair.destination, by=killed_at(point, "all")) as receiver,
            migrating(pair.source, receiver, program.pid) as journey,
        ):
            journey.finish(expected=1)
        assert "all who built the tree there were killed" in journey.log()
        (left,) = sessions(pair.destination)
        assert left["state"] == "aborted"
        assert "only the other side" in run_cli(pair.destination, "resume", left["id"], expected=2).stderr
        assert len(sessions(pair.destination)) == 1
    program.stop_and_verify()


@pytest.mark.parametrize(
    "point",
    ["outlived", "COMMITTED said", "released", "RUNNING said", "whole", "let go", "drained", "DRAINED said"],
)
def test_killed_at_the_destination_it_arrives(pair: Pair, program: Program, point: str) -> None:
    with (
        receiving(pair.destination, by=killed_at(point)) as receiver,
        migrating(pair.source, receiver, program.pid) as journey,
    ):
        arrives(pair, journey, program)
        states = {record["state"] for record in journals(pair.destination, DESTINATION)}
        assert states <= {"drained"}  # of a source that has ended without being heard once more


@pytest.mark.parametrize("point", ["whole", "let go", "drained", "DRAINED said"])
def test_all_are_killed_at_the_destination_when_every_page_is_there(
    pair: Pair, program: Program, point: str
) -> None:
    """One resume there, where it is still needed: what the tree kept for that may be gone already."""
    with (
        receiving(pair.destination, by=killed_at(point, "all")) as receiver,
        migrating(pair.source, receiver, program.pid) as journey,
    ):
        journey.wait_running()
        wait_until(lambda: nobody_works(pair.destination), "all are killed")
        for left in sessions(pair.destination):
            if left["state"] == "orphaned" and "drained" not in left["reason"]:
                run_cli(pair.destination, "resume", left["id"])
        arrives(pair, journey, program)


def nobody_works(host: Host) -> bool:
    return not {"lazyproc-keeper", "lazyproc-pager", "lazyproc-guard"} & set(processes_of(host).values())


@pytest.mark.parametrize("point", ["COMMIT said", "COMMITTED heard", "RUNNING heard", "RELEASED said"])
def test_killed_at_the_source_it_arrives(pair: Pair, program: Program, point: str) -> None:
    with (
        receiving(pair.destination) as receiver,
        migrating(pair.source, receiver, program.pid, run_by=killed_at(point)) as journey,
    ):
        arrives(pair, journey, program)
        wait_until(lambda: not journals(pair.destination, DESTINATION), "the destination's journal is closed")


@pytest.mark.parametrize("whom", ["one", "all"])
def test_killed_at_the_source_when_nothing_is_left_to_do(pair: Pair, program: Program, whom: str) -> None:
    """The command knows the report already, and that no record is left."""
    with (
        receiving(pair.destination) as receiver,
        migrating(pair.source, receiver, program.pid, run_by=killed_at("record removed", whom)) as journey,
    ):
        arrives(pair, journey, program)


def test_all_are_killed_before_it_is_parked_and_a_process_of_it_ends(pair: Pair) -> None:
    """It is on record as parked, and runs: who resumes it finds less of it than there was."""
    with (
        running("cow_fork", "16", directory=pair.shared, host=pair.source, exclusive=True) as program,
        receiving(pair.destination) as receiver,
        migrating(pair.source, receiver, program.pid, run_by=killed_at("parked", "all")) as journey,
    ):
        assert journey.finish(expected=4)["exit_code"] == 4
        child = proc.children_of(program.pid, program.pid)[0]
        os.kill(child, signal.SIGKILL)
        wait_until(lambda: gone(child), "a child has ended")
        (left,) = sessions(pair.source)
        run_cli(pair.source, "resume", left["id"], expected=1)
        assert not journals(pair.source, SOURCE)
        assert runs(program.pid)
        os.kill(program.pid, signal.SIGKILL)


# --- the disk is full ------------------------------------------------------------------------------------------


def small_disk(host: Host) -> None:
    """For its journals; it goes with the host."""
    place = host.scratch / "state/lazyproc/sessions"
    host.run(["mkdir", "-p", place], check=True)
    host.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", place], check=True)


def test_the_disk_is_full_at_the_destination_before_it_runs(pair: Pair, program: Program) -> None:
    small_disk(pair.destination)
    with unharmed(program):
        with (
            receiving(pair.destination, by=killed_at("PREPARED said", "disk")) as receiver,
            migrating(pair.source, receiver, program.pid) as journey,
        ):
            journey.finish(expected=1)
        assert "the journal cannot be written: No space left on device" in journey.log()
        assert not journals(pair.source, SOURCE)
        assert {each["state"] for each in sessions(pair.destination)} <= {"aborted"}
    program.stop_and_verify()


def test_the_disk_is_full_at_the_source_before_it_is_parked(pair: Pair, program: Program) -> None:
    small_disk(pair.source)
    with unharmed(program):
        with (
            receiving(pair.destination) as receiver,
            migrating(pair.source, receiver, program.pid, run_by=killed_at("IMAGES said", "disk")) as journey,
        ):
            journey.finish(expected=1)
        assert "the journal cannot be written: No space left on device" in journey.log()
        assert not sessions(pair.source)
    program.stop_and_verify()


@pytest.mark.parametrize("point", ["COMMIT heard", "committed", "outlived", "RUNNING said", "drained"])
def test_the_disk_is_full_at_the_destination_and_it_arrives(pair: Pair, program: Program, point: str) -> None:
    small_disk(pair.destination)
    with (
        receiving(pair.destination, by=killed_at(point, "disk")) as receiver,
        migrating(pair.source, receiver, program.pid) as journey,
    ):
        arrives(pair, journey, program)
        if point in (
            "outlived",
            "RUNNING said",
        ):  # a record that is replaced before or after makes room for the next
            wait_until(lambda: "No space left on device" in receiver.notes(), "it says so")
        assert not journals(pair.destination, DESTINATION)


@pytest.mark.parametrize("point", ["parked", "COMMIT said", "COMMITTED heard", "RUNNING heard"])
def test_the_disk_is_full_at_the_source_and_it_arrives(pair: Pair, program: Program, point: str) -> None:
    small_disk(pair.source)
    with (
        receiving(pair.destination) as receiver,
        migrating(pair.source, receiver, program.pid, run_by=killed_at(point, "disk")) as journey,
    ):
        arrives(pair, journey, program)
        assert "No space left on device" in journey.log()


def test_the_disk_is_full_at_the_source_before_memory_is_freed_and_it_arrives(
    pair: Pair, program: Program
) -> None:
    """Nothing is freed that is not on record."""
    small_disk(pair.source)
    point = killed_at("RUNNING heard", "disk")
    with (
        receiving(pair.destination) as receiver,
        migrating(pair.source, receiver, program.pid, "--release", run_by=point) as journey,
    ):
        arrives(pair, journey, program)
        assert "its memory is not freed for now" in journey.log()


def test_nothing_more_can_be_written_at_the_destination_and_it_arrives(pair: Pair, program: Program) -> None:
    """From when it runs there on, as where an error of the disk has made its file system read-only."""
    small_disk(pair.destination)
    with (
        receiving(pair.destination) as receiver,
        migrating(pair.source, receiver, program.pid, "--max-rate", "20000000") as journey,
    ):
        journey.wait_running()
        place = pair.destination.scratch / "state/lazyproc/sessions"
        pair.destination.run(["mount", "-o", "remount,ro", place], check=True)
        arrives(pair, journey, program)
        assert "Read-only file system" in receiver.notes()


def arrives(pair: Pair, journey: Journey, program: Program) -> None:
    new, report = journey.arrive()
    assert report["ended"] is False
    with ending(new):
        program.watch.wait_beats()
        os.kill(new, signal.SIGTERM)
        program.watch.wait_ended()
    assert not journals(pair.source, SOURCE)
