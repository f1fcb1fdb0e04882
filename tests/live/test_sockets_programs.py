"""A self-checking program whose sockets always have something in their queues, stopped and gathered at
any moment.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

from lazyproc.dump.descriptors import explain_descriptors, gather_descriptors
from lazyproc.dump.registry import TaskRef
from lazyproc.dump.tcp import silence
from lazyproc.model import InetSocket, UnixSocket
from tests.live.descriptors import checkpoint_of
from tests.live.programs import running
from tests.live.sockets import made_sockets

STOPS = 20
STREAMS = ("fd 0", "fd 1", "fd 2")  # inherited from the test session: they may be anything
SOCKETS = 16


def test_being_gathered_goes_unnoticed_and_everything_can_be_made_again(tmp_path: Path) -> None:
    with running("sock_queues", directory=tmp_path, exclusive=True) as program:
        pidfd = os.pidfd_open(program.pid)
        task = [TaskRef(program.pid, program.pid, pidfd)]
        try:
            for stop in range(STOPS):
                program.watch.wait_beats(1)
                explain_descriptors(task)
                program.process.send_signal(signal.SIGSTOP)
                os.waitid(os.P_PID, program.pid, os.WSTOPPED | os.WNOWAIT)
                gathered = gather_descriptors(task)
                with gathered.sockets:
                    assert program.watch.read().errors == 0
                    assert [o for o in gathered.obstacles if o.where not in STREAMS] == []
                    checkpoint = checkpoint_of(gathered)
                    kinds = (UnixSocket, InetSocket)
                    assert sum(isinstance(f.resource, kinds) for f in checkpoint.files.values()) >= SOCKETS
                    if stop + 1 < STOPS:
                        program.process.send_signal(signal.SIGCONT)
                        continue
                    silence(gathered.sockets.connections())
                    program.process.kill()
                    program.process.wait()
        finally:
            os.close(pidfd)
    with made_sockets(checkpoint) as found:
        assert len(found) >= SOCKETS


def test_it_ends_well_after_being_gathered(tmp_path: Path) -> None:
    with running("sock_queues", directory=tmp_path, exclusive=True) as program:
        pidfd = os.pidfd_open(program.pid)
        try:
            program.watch.wait_beats(3)
            program.process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, program.pid, os.WSTOPPED | os.WNOWAIT)
            with gather_descriptors([TaskRef(program.pid, program.pid, pidfd)]).sockets:
                pass
            program.process.send_signal(signal.SIGCONT)
        finally:
            os.close(pidfd)
        program.watch.wait_beats(3)
        program.stop_and_verify()
