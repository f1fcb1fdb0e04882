"""A pid that cannot be moved, and rights that are missing: said in one sentence, and nothing has been touched."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazyproc.hosts import Pair
from tests.live.bad_luck import CHECKPOINT, MIGRATE, NOBODY, PACED, ended, lazyproc, says, unchanged, unharmed
from tests.live.moving import CLI
from tests.live.programs import Program, running
from tests.needs import require_kernel_threads

BOTH = pytest.mark.parametrize("command", [CHECKPOINT, MIGRATE], ids=["checkpoint", "migrate"])


@pytest.fixture
def program(pair: Pair) -> Iterator[Program]:
    with running(*PACED, directory=pair.shared, host=pair.source) as started:
        yield started


def bounded(capability: str) -> tuple[str, ...]:
    return ("setpriv", f"--bounding-set=-{capability}")


@BOTH
def test_no_such_pid(pair: Pair, command: tuple[str, ...]) -> None:
    with unchanged(pair.source):
        says(
            lazyproc(pair.source, command[0], 4_000_000, *command[1:]),
            1,
            "pid 4000000: there is no such process",
            "; check",
        )


@BOTH
@pytest.mark.parametrize("pid", ["0", "-1", "-17", "99999999999", "x", ""])
def test_no_number_of_a_process(pair: Pair, command: tuple[str, ...], pid: str) -> None:
    done = lazyproc(pair.source, command[0], pid, *command[1:])
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(f"argument PID: {pid!r} is not a process number")


@BOTH
def test_a_threads_number(pair: Pair, program: Program, command: tuple[str, ...]) -> None:
    (other,) = (int(tid) for tid in os.listdir(f"/proc/{program.pid}/task") if int(tid) != program.pid)
    process, thread = pair.source.vpid(program.pid), pair.source.vpid(other)
    with unchanged(pair.source), unharmed(program):
        done = lazyproc(pair.source, command[0], thread, *command[1:])
        says(done, 2, f"pid {thread}: is a thread", f"name its process, {process}")


def test_a_kernel_thread(tmp_path: Path) -> None:
    require_kernel_threads()
    done = subprocess.run([*CLI, "checkpoint", "2", "-D", tmp_path / "i"], capture_output=True, text=True)
    says(done, 3, "pid 2: process: is a kernel thread", "name a process")
    assert not (tmp_path / "i").exists()


@BOTH
def test_a_tree_with_lazyproc_in_it(pair: Pair, command: tuple[str, ...]) -> None:
    """The shell's child is the command itself."""
    argv = [*CLI, command[0], '"$$"', *command[1:]]
    with unchanged(pair.source):
        done = pair.source.run(["sh", "-c", f"{' '.join(argv)}; exit $?"], capture_output=True, text=True)
        says(done, 3, "process: is lazyproc itself", "start lazyproc outside of the tree")


@BOTH
def test_the_first_process_as_it_is_seen_from_its_children(pair: Pair, command: tuple[str, ...]) -> None:
    """A signal from there does not end it: `checkpoint` waited without end."""
    with unchanged(pair.source):
        done = lazyproc(pair.source, command[0], 1, *command[1:])
        says(done, 3, "pid 1: process: is the first process here", "by the number that its first process has")


@BOTH
@pytest.mark.parametrize(
    ("by", "uid"), [(NOBODY, 65534), (bounded("sys_ptrace"), 0)], ids=["nobody", "no CAP_SYS_PTRACE"]
)
def test_no_right_to_trace(
    pair: Pair, program: Program, command: tuple[str, ...], by: tuple[str, ...], uid: int
) -> None:
    pid = pair.source.vpid(program.pid)
    with unchanged(pair.source), unharmed(program):
        done = lazyproc(pair.source, command[0], pid, *command[1:], by=by)
        says(done, 1, f"pid {pid}: belongs to uid 0 and may not be traced by uid {uid}", "CAP_SYS_PTRACE")


def test_no_right_to_open_what_ones_own_process_has_mapped(pair: Pair) -> None:
    source, null = pair.source, subprocess.DEVNULL
    with ended(source.popen([*NOBODY, "sleep", "60"], stdin=null, stdout=null, stderr=null)) as own:
        pid = source.vpid(own.pid)
        for command, *more in (("explain",), CHECKPOINT, MIGRATE):
            with unchanged(source):
                done = lazyproc(source, command, pid, *more, by=NOBODY)
                says(done, 3, "/proc/PID/map_files: only root may open", "run as root")
        assert own.poll() is None


def test_no_right_to_choose_a_number(pair: Pair, program: Program) -> None:
    source, images = pair.source, pair.source.scratch / "images"
    done = lazyproc(source, "checkpoint", source.vpid(program.pid), "-D", images)
    assert done.returncode == 0, done.stderr
    program.process.wait()
    source.run(["chown", "-R", "65534", images], check=True)
    with unchanged(source):
        done = lazyproc(source, "restore", "-D", images, "--pidns", "host", by=NOBODY)
        says(done, 1, "only root may choose the number of a process", "run as root")


@pytest.mark.parametrize(
    ("capability", "code", "option"), [("sys_admin", 3, "--detach"), ("sys_ptrace", 1, "--lazy")]
)
def test_no_right_to_restore(pair: Pair, program: Program, capability: str, code: int, option: str) -> None:
    source, images = pair.source, pair.source.scratch / "images"
    left = lazyproc(source, "checkpoint", source.vpid(program.pid), "-D", images, "--leave-running")
    assert left.returncode == 0, left.stderr
    with unchanged(source), unharmed(program):
        done = lazyproc(source, "restore", "-D", images, option, by=bounded(capability))
        says(done, code, f"CAP_{capability.upper()}")
