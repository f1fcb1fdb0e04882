"""A tracer killed at any step of its work leaves the tracee sound, at worst with a spare mapping."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lazyproc.kernel import arch_x86_64 as arch
from lazyproc.kernel import proc
from tests.live.programs import Program, running, wait_until

HERE = Path(__file__).parent
FEWEST_STEPS = 100  # else the preloaded library saw nothing
PAUSE = "34"  # pause(2), as /proc/PID/syscall has it
SPARE = {"r-xp", "rw-p"}  # what a bench is made of


@pytest.fixture(scope="module")
def dying(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("dying") / "dying.so"
    warnings = ("-Wall", "-Wextra", "-Werror")
    command = ["gcc", "-shared", "-fPIC", "-O2", *warnings, "-o", str(library), str(HERE / "dying.c")]
    subprocess.run(command, check=True)
    return library


def mappings(pid: int) -> set[tuple[int, int, str]]:
    return {(m.start, m.end, m.perms) for m in proc.maps(proc.read(pid, "maps"))}


def check_runs(program: Program) -> None:
    program.watch.wait_beats(1)


def check_parked(program: Program) -> None:
    for tid in proc.task_ids(program.pid):
        wait_until(lambda tid=tid: pauses(program.pid, tid), f"thread {tid} pauses")  # type: ignore[misc]


def pauses(pid: int, tid: int) -> bool:
    """In pause(2), with all signals blocked."""
    call = Path(f"/proc/{pid}/task/{tid}/syscall").read_text().split()[0]
    blocked = proc.status(proc.read(pid, f"task/{tid}/status")).sig_blocked
    unblockable = 1 << signal.SIGKILL - 1 | 1 << signal.SIGSTOP - 1
    return call == PAUSE and blocked | unblockable == arch.MASK64


def check_spare(program: Program, before: set[tuple[int, int, str]]) -> None:
    assert proc.status(proc.read(program.pid, "status")).tracer_pid == 0
    spare = mappings(program.pid) - before
    assert {perms for _, _, perms in spare} <= SPARE
    assert len(spare) <= len(SPARE)


def deaths_of_a_tracer(
    work: str, program: Program, dying: Path, check: Callable[[Program], None]
) -> Iterator[int]:
    """One for each step of the work: the tracer is killed right before it, and the tracee is sound."""
    argv = [sys.executable, str(HERE / "dying_tracer.py"), str(program.pid), work]
    environment = {**os.environ, "LD_PRELOAD": str(dying), "PYTHONPATH": os.pathsep.join(sys.path)}
    before = mappings(program.pid)
    with subprocess.Popen(
        argv, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as tracer:
        assert tracer.stdin is not None
        assert tracer.stdout is not None
        for line in tracer.stdout:
            if line == "whole\n":
                break
            check(program)
            check_spare(program, before)
            before = mappings(program.pid)
            yield int(line)
            tracer.stdin.write("\n")
            tracer.stdin.flush()
    assert tracer.returncode == 0


@pytest.mark.parametrize("trap", ["handled", "ignored", "blocked"])
def test_a_tracer_killed_at_any_step_leaves_the_tracee_sound(trap: str, dying: Path, tmp_path: Path) -> None:
    with running("steady", trap, directory=tmp_path) as program:
        assert len(list(deaths_of_a_tracer("dump", program, dying, check_runs))) >= FEWEST_STEPS
        program.stop_and_verify()


def test_killed_while_it_takes_memory_away_it_leaves_the_tracee_parked(dying: Path, tmp_path: Path) -> None:
    """And it can be let run: what the thread was before is still known."""
    with running("steady", directory=tmp_path) as program:
        assert len(list(deaths_of_a_tracer("discard", program, dying, check_parked))) >= FEWEST_STEPS
        program.watch.wait_beats()
        program.stop_and_verify()
