"""A tracer killed at any step of its work leaves the tracee sound, at worst with a spare mapping."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lazyproc.kernel import proc
from tests.live.programs import Program, running

HERE = Path(__file__).parent
FEWEST_STEPS = 100  # else the preloaded library saw nothing
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


def check_sound(program: Program, before: set[tuple[int, int, str]]) -> None:
    program.watch.wait_beats(1)
    assert proc.status(proc.read(program.pid, "status")).tracer_pid == 0
    spare = mappings(program.pid) - before
    assert {perms for _, _, perms in spare} <= SPARE
    assert len(spare) <= len(SPARE)


@pytest.mark.parametrize("trap", ["handled", "ignored", "blocked"])
def test_a_tracer_killed_at_any_step_leaves_the_tracee_sound(trap: str, dying: Path, tmp_path: Path) -> None:
    with running("steady", trap, directory=tmp_path) as program:
        argv = [sys.executable, str(HERE / "dying_tracer.py"), str(program.pid)]
        environment = {**os.environ, "LD_PRELOAD": str(dying), "PYTHONPATH": os.pathsep.join(sys.path)}
        deaths = 0
        before = mappings(program.pid)
        with subprocess.Popen(
            argv, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as tracer:
            assert tracer.stdin is not None
            assert tracer.stdout is not None
            for line in tracer.stdout:
                check_sound(program, before)
                before = mappings(program.pid)
                if line == "whole\n":
                    break
                deaths += 1
                tracer.stdin.write("\n")
                tracer.stdin.flush()
        assert tracer.returncode == 0
        assert deaths >= FEWEST_STEPS
        program.stop_and_verify()
