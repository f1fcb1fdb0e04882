"""A parked tree stays where it is without its tracer, whatever signals come, and runs on as if nothing had happened."""

from __future__ import annotations

import errno
import os
import pickle
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from lazyproc.dump.explain import explain
from lazyproc.dump.freeze import FrozenTree, frozen_tree
from lazyproc.dump.gather import dumped
from lazyproc.dump.park import park_tree, parking, unpark_tree
from lazyproc.errors import NoSuchProcess
from lazyproc.kernel import arch_x86_64 as arch
from lazyproc.kernel import park, proc
from lazyproc.kernel import tracee as ptrace
from lazyproc.kernel.park import ParkedProcess
from tests.forked import ending
from tests.live.programs import running, stands_still, wait_until
from tests.live.test_freeze import PLAIN
from tests.live.test_traps_source import EPOLL, in_epoll
from tests.live.tracees import state_of, tracee

# name and arguments: threads, sleeps and timers, seccomp filters, a tree, signals that come all the time
CARGO = [
    ("memory_random", "8", "3"),
    ("threads",),
    ("sleeps",),
    ("timers",),
    ("seccomp",),
    ("tree",),
    ("signals",),
]


def by_a_tracer_that_dies(pid: int, act: Callable[[FrozenTree], object]) -> tuple[ParkedProcess, ...]:
    """What a tracer has parked before it killed itself: `act` is called with the frozen, dumped tree."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with ending(), frozen_tree(pid) as tree, dumped(tree):
            os.write(writing, pickle.dumps(act(tree)))
            os.kill(os.getpid(), signal.SIGKILL)
    os.close(writing)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    with os.fdopen(reading, "rb") as pipe:
        parked: tuple[ParkedProcess, ...] = pickle.load(pipe)
    return parked


def park_all(tree: FrozenTree) -> tuple[ParkedProcess, ...]:
    processes = parking(tree)
    park_tree(tree, processes)
    return processes


def code_of(process: ParkedProcess) -> bytes:
    """What lies where its threads are parked."""
    with ptrace.memory(process.pid) as memory:
        return memory.read(process.at, len(arch.PARK))


@pytest.mark.parametrize("cargo", CARGO, ids=[name for name, *_ in CARGO])
def test_a_parked_tree_survives_its_tracer_and_runs_on(cargo: tuple[str, ...], tmp_path: Path) -> None:
    name, *arguments = cargo
    with running(name, *arguments, directory=tmp_path) as program:
        program.watch.wait_beats()
        processes = by_a_tracer_that_dies(program.pid, park_all)
        wait_until(lambda: proc.status(proc.read(program.pid, "status")).tracer_pid == 0, "no tracer")
        assert stands_still(program)
        for process in processes:
            park.let_run(process)
        program.watch.wait_beats()
        program.stop_and_verify()


@pytest.mark.parametrize("name", ["threads", "seccomp", "tree"])
def test_what_is_parked_is_not_moved_or_dumped_as_if_it_ran(name: str, tmp_path: Path) -> None:
    """The copy would pause for ever: where it goes on is in the journal of the first move."""
    with running(name, directory=tmp_path) as program:
        processes = by_a_tracer_that_dies(program.pid, park_all)
        against = [each for each in explain(program.pid) if "is parked" in each.why]
        assert {each.pid for each in against} == {process.pid for process in processes}
        for process in processes:
            park.let_run(process)
        assert not explain(program.pid)
        program.watch.wait_beats()
        program.stop_and_verify()


@pytest.mark.parametrize("sig", [signal.SIGCONT, signal.SIGTERM, signal.SIGUSR1, signal.SIGSTOP])
def test_no_signal_lets_it_run(sig: signal.Signals, tmp_path: Path) -> None:
    with running("memory_random", "8", "2", directory=tmp_path) as program:
        (process,) = by_a_tracer_that_dies(program.pid, park_all)
        os.kill(program.pid, sig)
        os.kill(program.pid, signal.SIGCONT)
        assert stands_still(program)
        assert park.is_there(process)


def test_a_signal_that_came_meanwhile_is_delivered_when_it_runs(tmp_path: Path) -> None:
    with running("memory_random", "8", "2", directory=tmp_path) as program:
        (process,) = by_a_tracer_that_dies(program.pid, park_all)
        os.kill(program.pid, signal.SIGTERM)  # asks for the last check
        assert stands_still(program)
        park.let_run(process)
        assert program.process.wait(30) == 0
        program.watch.wait_ended()


def test_a_stopped_process_is_parked_and_stays_stopped_when_it_is_let_go(tmp_path: Path) -> None:
    with tracee(PLAIN, tmp_path) as it:
        os.kill(it.pid, signal.SIGSTOP)
        wait_until(lambda: state_of(it.pid) == "T", "it is stopped")
        (process,) = by_a_tracer_that_dies(it.pid, park_all)
        wait_until(lambda: state_of(it.pid) == "T", "it is stopped again")
        park.let_run(process)
        wait_until(lambda: state_of(it.pid) == "T", "and stays so")
        (own,) = process.threads
        os.kill(it.pid, signal.SIGCONT)
        wait_until(lambda: state_of(it.pid) == "S", "it goes on")
        with frozen_tree(it.pid) as tree:
            assert tree.tasks[it.pid].stopped[0].state.registers.sp == own.registers.sp


def test_a_call_that_the_freeze_ended_is_not_made_again_where_it_is_parked(tmp_path: Path) -> None:
    """Who lets go of what is parked leaves its registers alone; when it runs, the signal has ended its call."""
    with tracee(EPOLL, tmp_path, "-1") as it:
        wait_until(lambda: in_epoll(it.pid), "it waits")
        with frozen_tree(it.pid) as tree:
            (process,) = park_all(tree)
            os.kill(it.pid, signal.SIGUSR1)
        assert park.stands(process)
        park.let_run(process)
        assert it.hear().split()[0] == str(-errno.EINTR)


def test_killed_it_is_gone(tmp_path: Path) -> None:
    with running("memory_random", "8", "2", directory=tmp_path) as program:
        (process,) = by_a_tracer_that_dies(program.pid, park_all)
        program.process.kill()
        program.process.wait()
        assert not park.is_there(process)
        with pytest.raises(NoSuchProcess):
            park.let_run(process)


def test_another_process_with_its_number_is_left_alone(tmp_path: Path) -> None:
    with running("memory_random", "8", "2", directory=tmp_path) as program:
        (process,) = by_a_tracer_that_dies(program.pid, park_all)
        before = ParkedProcess(process.pid, process.started - 1, process.at, process.threads)
        for touch in (park.let_run, park.stands):
            with pytest.raises(NoSuchProcess):
                touch(before)
        assert park.stands(process)


def test_who_runs_is_not_given_old_registers(tmp_path: Path) -> None:
    with running("memory_random", "8", "2", directory=tmp_path) as program:
        (process,) = by_a_tracer_that_dies(program.pid, park_all)
        assert park.stands(process)
        assert code_of(process) == arch.PARK
        park.let_run(process)
        assert code_of(process) == bytes(len(arch.PARK))
        program.watch.wait_beats(1)
        assert not park.stands(process)
        assert not park.stands(ParkedProcess(process.pid, process.started, 0, process.threads))
        park.let_run(process)
        program.watch.wait_beats()
        program.stop_and_verify()


def test_taken_back_by_who_parked_it(tmp_path: Path) -> None:
    with running("threads", directory=tmp_path) as program:
        with frozen_tree(program.pid) as tree, dumped(tree):
            processes = parking(tree)
            park_tree(tree, processes)
            unpark_tree(tree, processes)
            assert code_of(processes[0]) == bytes(len(arch.PARK))
        program.watch.wait_beats()
        program.stop_and_verify()


def test_half_parked_it_runs_on_from_the_record(tmp_path: Path) -> None:
    """The record is made before the first register is changed, so a tracer may die anywhere in between. A thread that
    ran may have been interrupted in the code, and its handler returns there.
    """

    def half(tree: FrozenTree) -> tuple[ParkedProcess, ...]:
        processes = parking(tree)
        (task,) = tree.tasks.values()
        first = park.ParkedProcess(task.pid, processes[0].started, processes[0].at, processes[0].threads[:1])
        with ptrace.memory(task.pid) as memory:
            park.park(first, task.threads[:1], [False], memory)
        return processes

    with running("memory_random", "8", "3", directory=tmp_path) as program:
        (process,) = by_a_tracer_that_dies(program.pid, half)
        assert not park.stands(process)
        park.let_run(process)
        assert code_of(process) == arch.PARK
        program.watch.wait_beats()
        program.stop_and_verify()


def test_a_parked_tree_can_be_read_and_parked_again(tmp_path: Path) -> None:
    """The place of a tracer that died is found and used again."""
    with running("memory_random", "8", "2", directory=tmp_path) as program:
        (first,) = by_a_tracer_that_dies(program.pid, park_all)
        park.let_run(first)
        program.watch.wait_beats()
        (second,) = by_a_tracer_that_dies(program.pid, park_all)
        assert second.at == first.at
        park.let_run(second)
        program.watch.wait_beats()
        program.stop_and_verify()
