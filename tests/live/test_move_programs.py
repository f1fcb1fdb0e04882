"""Every self-checking program moves while it runs, lazily, between two hosts, and back; then it verifies itself."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pytest

from lazyproc.errors import HostLacks
from lazyproc.hosts import Pair, pair_of_hosts
from lazyproc.kernel import proc
from lazyproc.wire.native import MAP_PART
from tests.live.moving import Receiver, checkpoint, look_at_tree, migrate, move, receiving, restore, tree_of
from tests.live.programs import SOURCES, UNSUPPORTED, Program, Watch, compile_program, running
from tests.needs import lacking

# Their mappings, descriptors and processes come and go.
RESTLESS = ("fork_lazy", "reserved", "sleeps", "sock_queues", "threads")
# The first changes the protection of its mappings all the time; those of the other are anonymous afterwards.
OTHER_MAPS = ("memory_static", "memory_zero")
# Refused between hosts, or with other pid namespaces: as images they move (test_criu_command.py, test_criu_outside.py).
AS_IMAGES = ("dead_peer", "fd_outside")
WAITING = ("late_signals",)  # beats for the signals that test_late_signals.py sends
PROGRAMS = sorted({path.stem for path in SOURCES.glob("*.c")} - {*AS_IMAGES, *WAITING})


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


def started(stack: ExitStack, name: str, field: Field, *arguments: str) -> Program:
    pair = field.pair
    program = stack.enter_context(
        running(name, *arguments, directory=pair.shared, host=pair.source, exclusive=True)
    )
    if program.process.poll() == UNSUPPORTED:
        pytest.skip(f"this machine lacks what {name} checks")
    program.watch.wait_beats()
    return program


@pytest.mark.parametrize("name", PROGRAMS)
def test_moves_there_and_back(name: str, field: Field) -> None:
    with ExitStack() as stack:
        program = started(stack, name, field)
        checks = {"same_maps": name not in OTHER_MAPS, "whole_tree": name not in RESTLESS}
        there = move(field.pair.source, field.there, program.pid, **checks)
        program.watch.wait_beats()
        back = move(field.pair.destination, field.back, there.pid, **checks)
        program.watch.wait_beats()
        back.end(program.watch)


@pytest.mark.parametrize(
    "name",
    [
        "cow_fork",
        "fork_lazy",
        "halves",
        "memfd_shared",
        "memory_marks",
        "seccomp",
        "sysv_shm",
        "terminals",
        "threads",
        "trap_lazy",
    ],
)
def test_moves_while_its_memory_is_freed_here(name: str, field: Field) -> None:
    with ExitStack() as stack:
        program = started(stack, name, field)
        there = move(
            field.pair.source, field.there, program.pid, "--release", whole_tree=name not in RESTLESS
        )
        program.watch.wait_beats()
        there.end(program.watch)


def test_private_memory_of_the_zero_device_is_lazy(field: Field) -> None:
    with ExitStack() as stack:
        program = started(stack, "memory_zero", field)
        there = move(field.pair.source, field.there, program.pid, same_maps=False)
        assert there.report["pages_urgent"] + there.report["pages_bulk"] >= 512 > there.report["pages_eager"]
        there.end(program.watch)


def test_memory_in_more_runs_than_one_map_names(field: Field) -> None:
    with ExitStack() as stack:
        program = started(stack, "scattered", field, str(MAP_PART + 1000))
        there = move(field.pair.source, field.there, program.pid)
        there.end(program.watch)


def test_huge_pages_are_huge_again(field: Field) -> None:
    with ExitStack() as stack:
        program = started(stack, "memory_marks", field)
        if not _huge_pages(program.pid):
            pytest.skip("this machine has no transparent huge page to spare")
        there = move(field.pair.source, field.there, program.pid)
        assert _huge_pages(there.pid) > 0
        there.end(program.watch)


def _huge_pages(pid: int) -> int:
    return sum(entry.anon_huge for entry in proc.smaps(proc.read(pid, "smaps")))


@pytest.mark.parametrize("name", ["memory_marks", "sysv_shm", "threads", "tree"])
def test_moves_by_stopcopy(name: str, field: Field) -> None:
    with ExitStack() as stack:
        program = started(stack, name, field)
        there = move(
            field.pair.source, field.there, program.pid, "--mode", "stopcopy", whole_tree=name != "threads"
        )
        assert there.report["pages_total"] == there.report["pages_eager"]
        assert there.report["ended"] is False
        program.watch.wait_beats()
        there.end(program.watch)


@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "whole"])
@pytest.mark.parametrize(
    "name", ["aio_ring", "file_locks", "memory_static", "prctls", "signals", "small_state", "tree"]
)
def test_moves_as_images(name: str, lazy: bool, field: Field) -> None:
    with ExitStack() as stack:
        program = started(stack, name, field)
        before = look_at_tree(program.pid)
        images = field.pair.shared / f"{name}.{lazy}"
        checkpoint(field.pair.source, program.pid, images)
        assert program.process.wait(5) != 0
        there = restore(field.pair.destination, images, *(["--lazy"] if lazy else []))
        there.check_like(before, same_maps=name not in OTHER_MAPS)
        program.watch.wait_beats()
        there.end(program.watch)


def test_a_checkpoint_that_leaves_it_running_leaves_it_as_it_was(field: Field) -> None:
    with ExitStack() as stack:
        program = started(stack, "tree", field)
        before = look_at_tree(program.pid)
        checkpoint(field.pair.source, program.pid, field.pair.shared / "left", "--leave-running")
        program.watch.wait_beats()
        assert look_at_tree(program.pid) == before
        program.stop_and_verify()


@pytest.mark.parametrize("pidns", ["host", "new"])
def test_numbers_are_kept_in_either_pid_namespace(pidns: str, field: Field) -> None:
    pair = field.pair
    pair.source.run(["sh", "-c", "echo 20000 > /proc/sys/kernel/ns_last_pid"], check=True)
    with ExitStack() as stack:
        receiver = stack.enter_context(receiving(pair.destination, "--pidns", pidns))
        program = started(stack, "tree", field)
        there = move(pair.source, receiver, program.pid)
        same = there.report["root_pid"] == there.report["root_vpid"]
        assert same == (pidns == "host")
        program.watch.wait_beats()
        there.end(program.watch)


def test_a_taken_number_is_refused_in_the_hosts_pid_namespace(field: Field) -> None:
    pair = field.pair
    with ExitStack() as stack:
        receiver = stack.enter_context(receiving(pair.destination, "--pidns", "host"))
        program = started(stack, "steady", field)
        number = pair.source.vpid(program.pid)
        pair.destination.run(["sh", "-c", f"echo {number - 1} > /proc/sys/kernel/ns_last_pid"], check=True)
        other = stack.enter_context(_sleeper(pair))
        assert pair.destination.vpid(other.pid) == number
        done = migrate(pair.source, receiver, program.pid, expected=3)
        assert f"pid {number}" in done.stderr
        assert "taken" in done.stderr
        _goes_on(program.watch, receiver)


@contextmanager
def _sleeper(pair: Pair) -> Iterator[subprocess.Popen[bytes]]:
    process = pair.destination.popen(["sleep", "60"])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_root_with_number_1_keeps_it(field: Field) -> None:
    pair = field.pair
    watch = Watch.create(pair.shared / "first.status", exclusive=True)
    argv = ["unshare", "--pid", "--fork", "--kill-child", str(compile_program("tree")), str(watch.path)]
    with (pair.shared / "first.log").open("w") as log:
        outer = pair.source.popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        watch.wait_running()
        (pid,) = proc.children_of(outer.pid, outer.pid)
        there = move(pair.source, field.there, pid)
        assert there.report["root_vpid"] == 1
        watch.wait_beats()
        there.end(watch)
    finally:
        outer.kill()
        outer.wait()


@pytest.mark.parametrize("other", [None, "clocks"], ids=["missing", "another build"])
def test_an_executable_that_the_destination_lacks(other: str | None, field: Field) -> None:
    """Said with its path; the process goes on, and the destination is as it was."""
    pair = field.pair
    binary = pair.source.scratch / "cargo"
    shutil.copy(compile_program("steady"), pair.source.outside / "cargo")
    if other:
        shutil.copy(compile_program(other), pair.destination.outside / "cargo")
    with ExitStack() as stack:
        receiver = stack.enter_context(receiving(pair.destination))
        program = stack.enter_context(
            running("steady", directory=pair.shared, host=pair.source, exclusive=True, binary=binary)
        )
        program.watch.wait_beats()
        before = look_at_tree(program.pid)
        done = migrate(pair.source, receiver, program.pid, expected=3)
        assert str(binary) in done.stderr
        assert ("another build" if other else "not on this host") in done.stderr
        _goes_on(program.watch, receiver)
        assert look_at_tree(program.pid) == before
        program.stop_and_verify()


def _goes_on(watch: Watch, receiver: Receiver) -> None:
    """Unharmed, and nothing half-built is left where it was to go."""
    watch.wait_beats()
    assert len(tree_of(receiver.process.pid)) == 1
