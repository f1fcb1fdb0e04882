"""The self-checking programs with descriptors: they run, and can be stopped anywhere and gathered."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from lazyproc.dump.descriptors import explain_descriptors, gather_descriptors
from lazyproc.dump.registry import TaskRef
from tests.live.descriptors import checkpoint_of, made
from tests.live.programs import running

PROGRAMS = ("fd_events", "fd_files")
STOPS = 20
STREAMS = ("fd 0", "fd 1", "fd 2")  # inherited from the test session: they may be anything


@pytest.mark.parametrize("name", PROGRAMS)
def test_runs_beats_and_ends_well(name: str, tmp_path: Path) -> None:
    with running(name, directory=tmp_path, exclusive=True) as program:
        program.watch.wait_beats(5)
        program.stop_and_verify()


@pytest.mark.parametrize("name", PROGRAMS)
def test_being_gathered_goes_unnoticed(name: str, tmp_path: Path) -> None:
    """Stopped at any moment, all its files can be made again, and it goes on as if nothing had happened."""
    with running(name, directory=tmp_path, exclusive=True) as program:
        pidfd = os.pidfd_open(program.pid)
        task = [TaskRef(program.pid, program.pid, pidfd)]
        for _ in range(STOPS):
            explain_descriptors(task)
            program.watch.wait_beats(1)
            program.process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, program.pid, os.WSTOPPED | os.WNOWAIT)
            gathered = gather_descriptors(task)
            with gathered.sockets:
                obstacles = [o for o in gathered.obstacles if o.where not in STREAMS]
                waiting = [o for o in obstacles if "file events wait" in o.why]
                assert obstacles == waiting
                if not waiting:
                    with made(checkpoint_of(gathered)) as files:
                        assert set(files) >= set(range(3, 10))
            program.process.send_signal(signal.SIGCONT)
        os.close(pidfd)
        program.stop_and_verify()
