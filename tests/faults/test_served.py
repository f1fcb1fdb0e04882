"""`serve`, `restore --from`, and `restore --lazy` from a folder: whoever is killed, it waits, and is completed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lazyproc.hosts import Host, Pair
from tests.faults.helpers import DESTINATION, SOURCE, gone, journal, journals, kill, sessions
from tests.faults.hostile import Listener, listening
from tests.live.bad_luck import started, way_to
from tests.live.moving import INSECURE, Receiver, checkpoint, run_cli
from tests.live.programs import Program, running, wait_until
from tests.live.real import check_clean, ending, runs

MIB = "64"
SOME = 4 << 20  # bytes of pages, after which a test stops the flow


@pytest.fixture
def program(pair: Pair) -> Iterator[Program]:
    with running("memory_random", MIB, "2", directory=pair.shared, host=pair.source, exclusive=True) as it:
        it.watch.wait_beats()
        yield it


@dataclass(slots=True)
class Dam:
    """Pages come to `SOME` bytes and no further until it is opened."""

    reached: threading.Event = field(default_factory=threading.Event)
    opened: threading.Event = field(default_factory=threading.Event)
    breaks: bool = False  # the connection, instead
    _bytes: int = 0

    def back(self, number: int, data: bytes) -> bytes:
        if number and not self.opened.is_set():
            self._bytes += len(data)
            if self._bytes > SOME:
                self.reached.set()
                if self.breaks:
                    self.opened.set()
                    raise OSError("cut")
                self.opened.wait()
        return data


@dataclass(slots=True)
class Fetch:
    """`restore --from` on the destination, of what `server` offers, through `dam`."""

    pair: Pair
    process: subprocess.Popen[str]
    server: Listener
    dam: Dam

    def complete(self, program: Program, process: subprocess.Popen[str]) -> None:
        """`process` says the pid when every page is there, and everything is right."""
        out, err = process.communicate(timeout=30)
        assert process.returncode == 0, f"{err}\nserver:\n{self.server.notes()}"
        new = self.pair.destination.pid(json.loads(out)["root_pid"])
        wait_until(lambda: not runs(program.pid), "the source has ended")
        check_clean(new)
        with ending(new):
            program.watch.wait_beats()
            os.kill(new, signal.SIGTERM)
            program.watch.wait_ended()
        for host, role in ((self.pair.source, SOURCE), (self.pair.destination, DESTINATION)):
            wait_until(lambda host=host, role=role: not journals(host, role), "journals are closed")  # type: ignore[misc]


@contextmanager
def fetching(pair: Pair, program: Program, dam: Dam) -> Iterator[Fetch]:
    with listening(pair.source, "serve", pair.source.vpid(program.pid), *INSECURE) as server:
        behind = Receiver(pair.source, server.process, server.log, server.address)
        with way_to(behind, pair.destination, back=dam.back) as target:
            process = started(
                pair.destination, "restore", "--from", target, *INSECURE, "--detach", "--json", "-v"
            )
            try:
                assert dam.reached.wait(20), server.notes()
                yield Fetch(pair, process, server, dam)
            finally:
                dam.opened.set()
                process.kill()
                process.communicate()


def test_a_lost_connection_is_opened_again(pair: Pair, program: Program) -> None:
    with fetching(pair, program, Dam(breaks=True)) as fetch:
        fetch.complete(program, fetch.process)
        assert fetch.server.process.wait(20) == 0


@pytest.mark.parametrize("names", [("server",), ("keeper",)])
def test_who_serves_is_killed(pair: Pair, program: Program, names: tuple[str, ...]) -> None:
    with fetching(pair, program, Dam()) as fetch:
        kill(pair.source, SOURCE, *names)
        fetch.dam.opened.set()
        fetch.complete(program, fetch.process)
        assert fetch.server.process.wait(20) == 0


def test_the_command_that_serves_is_killed(pair: Pair, program: Program) -> None:
    with fetching(pair, program, Dam()) as fetch:
        fetch.server.process.kill()
        fetch.dam.opened.set()
        fetch.complete(program, fetch.process)


def test_all_that_serve_are_killed_and_one_resume_completes_it(pair: Pair, program: Program) -> None:
    with fetching(pair, program, Dam()) as fetch:
        fetch.server.process.kill()
        kill(pair.source, SOURCE, "keeper", "server")
        fetch.dam.opened.set()
        (orphan,) = sessions(pair.source)
        assert orphan["state"] == "orphaned"
        run_cli(pair.source, "resume", orphan["id"])
        fetch.complete(program, fetch.process)


def test_who_fetches_is_killed_and_one_resume_completes_it(pair: Pair, program: Program) -> None:
    with fetching(pair, program, Dam()) as fetch:
        (working,) = sessions(pair.destination)
        assert working["state"] == "running"
        fetch.process.kill()
        fetch.process.wait()
        (orphan,) = sessions(pair.destination)
        assert (orphan["state"], orphan["pages_remaining"] > 0) == ("orphaned", True)
        fetch.dam.opened.set()
        new = pair.destination.pid(journal(pair.destination, DESTINATION)["tree"]["root_pid"])
        run_cli(pair.destination, "resume", orphan["id"])
        wait_until(lambda: not runs(program.pid), "the source has ended")
        check_clean(new)
        with ending(new):
            program.watch.wait_beats()
            os.kill(new, signal.SIGTERM)
            program.watch.wait_ended()
        assert not journals(pair.source, SOURCE)
        assert not journals(pair.destination, DESTINATION)


# --- from a folder -------------------------------------------------------------------------------------------

# Brings only what is touched, and tells when the tree runs.
BY_TOUCH = """
import sys
from pathlib import Path
import lazyproc
from lazyproc.events import ignore
how = {"lazy": True, "bulk": False, "pidns": "auto", "policy": "sequential", "listener": ignore}
with lazyproc.restore(Path(sys.argv[1]), **how) as it:
    print(it.root_pid, flush=True)
    sys.stdin.read()
"""


@contextmanager
def restored_by_touch(host: Host, images: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    argv = [sys.executable, "-c", BY_TOUCH, str(images)]
    process = host.popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process, host.pid(int(process.stdout.readline()))
    finally:
        process.kill()
        process.communicate()


def test_a_lazy_restore_is_killed_and_one_resume_completes_it(pair: Pair, program: Program) -> None:
    images = pair.shared / "images"
    checkpoint(pair.source, program.pid, images)
    with restored_by_touch(pair.source, images) as (process, new), ending(new):
        program.watch.wait_beats()
        wait_until(lambda: bool(journals(pair.source, DESTINATION)), "it is on record")
        (working,) = sessions(pair.source)
        assert (working["state"], working["peer"]) == ("running", str(images))
        process.kill()
        process.wait()
        wait_until(lambda: sessions(pair.source)[0]["state"] == "orphaned", "nobody works on it")
        (orphan,) = sessions(pair.source)
        assert orphan["pages_remaining"] > 0
        run_cli(pair.source, "resume", orphan["id"])
        check_clean(new)
        program.watch.wait_beats()
        os.kill(new, signal.SIGTERM)
        program.watch.wait_ended()
        assert not journals(pair.source, DESTINATION)


def test_a_lazy_restore_whose_tree_ends_first_leaves_no_session(pair: Pair, program: Program) -> None:
    images = pair.shared / "images"
    checkpoint(pair.source, program.pid, images)
    with restored_by_touch(pair.source, images) as (process, new):
        wait_until(lambda: bool(journals(pair.source, DESTINATION)), "it is on record")
        os.kill(new, signal.SIGKILL)
        wait_until(lambda: gone(new), "it has ended")
        process.communicate("")
        assert not journals(pair.source, DESTINATION)
