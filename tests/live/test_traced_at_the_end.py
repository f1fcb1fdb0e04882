"""A debugger has the process when its last page comes: lazyproc waits for it to let go, and takes then what it has
there.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lazyproc.events import Event, Note
from lazyproc.hosts import Host, Pair
from lazyproc.restore.run import restore
from tests.faults.helpers import DESTINATION, helper, sessions
from tests.live.arrivals import END_S, leave
from tests.live.moving import receiving, registered
from tests.live.programs import running, wait_until
from tests.live.real import check_clean, ending, migrating

SEIZE = """
import sys
from lazyproc.kernel.tracee import Tracee
tracee = Tracee(int(sys.stdin.readline()))
tracee.seize()
print(flush=True)
sys.stdin.read()
"""
RATE = 1 << 20  # bytes a second: there is time to attach before the last page
PACE_US = 100_000  # between 64 visits
CREW = ("keeper", "pager", "guard")


@dataclass(frozen=True, slots=True)
class Debugger:
    """Somebody else who traces a process, from `attach` until `close`."""

    process: subprocess.Popen[Any]

    @property
    def pid(self) -> int:
        return self.process.pid

    def attach(self, pid: int) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(b"%d\n" % pid)
        self.process.stdin.flush()
        assert self.process.stdout.readline() == b"\n"

    def close(self) -> None:
        self.process.communicate()


@contextmanager
def debugger(host: Host | None = None) -> Iterator[Debugger]:
    """On `host`, to be seen by who works there."""
    popen = host.popen if host is not None else subprocess.Popen
    path = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    process = popen([sys.executable, "-c", SEIZE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=path)
    with process, closing(Debugger(process)) as it:
        yield it


def test_a_restore_waits(tmp_path: Path) -> None:
    left = leave("memory_random", 4, 1, PACE_US, directory=tmp_path)
    notes: list[str] = []

    def listener(event: Event) -> None:
        if isinstance(event, Note):
            notes.append(event.text)

    options: dict[str, Any] = {"pidns": "auto", "policy": "sequential", "listener": listener}
    with debugger() as other, restore(left.images, lazy=True, bulk=False, **options) as restored:
        try:
            other.attach(restored.root_pid)
            assert restored.pager is not None
            restored.pager.start_bulk()
            assert restored.pager.wait(END_S)
            assert not restored.wait_drained(0)
            assert not restored.wait_drained(0.6)
            assert [note for note in notes if f"is traced by pid {other.pid}" in note] == notes
            assert len(notes) == 1
            left.watch.wait_beats()
            other.close()
            assert restored.wait_drained(END_S)
            check_clean(restored.root_pid)
            left.watch.wait_beats()
        finally:
            restored.forward(signal.SIGKILL)
            os.waitpid(restored.tree.nursery_pid, 0)


def test_a_migration_waits_and_none_of_its_helpers_ends(pair: Pair) -> None:
    host = pair.destination
    with (
        debugger(host) as other,
        running(
            "memory_random", 2, 1, PACE_US, directory=pair.shared, host=pair.source, exclusive=True
        ) as program,
        receiving(host) as receiver,
    ):
        program.watch.wait_beats()
        with migrating(pair.source, receiver, program.pid, "--max-rate", str(RATE)) as journey:
            journey.wait_running()
            crew = [helper(host, DESTINATION, name) for name in CREW]
            root = host.pid(sessions(host)[0]["root_pid"])
            with ending(root):
                other.attach(host.vpid(root))
                wait_until(lambda: "is traced by" in sessions(host)[0]["reason"], "it says who keeps it out")
                program.watch.wait_beats()
                assert [helper(host, DESTINATION, name) for name in CREW] == crew
                assert journey.still_lazy()
                other.close()
                assert journey.arrive()[0] == root
                assert registered(root) == []
                program.watch.wait_beats()
