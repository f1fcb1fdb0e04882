"""Signals that come to a tree while it stands still, after its pending signals were read, reach its copy."""

from __future__ import annotations

import ctypes
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from lazyproc.dump.checkpoint import checkpoint
from lazyproc.errors import UsageError
from lazyproc.events import ignore
from lazyproc.images.draft import Draft
from lazyproc.model import Checkpoint
from lazyproc.pages import PageSource, storing
from lazyproc.pages.storing import Stored
from tests.live.held_up import held_up
from tests.live.moving import CLI
from tests.live.programs import Program, running, wait_until
from tests.live.test_between import started
from tests.live.test_cli import killed_at_the_end, listening
from tests.needs import require_root

QUEUED = signal.SIGRTMIN + 1
libc = ctypes.CDLL(None, use_errno=True)


def send_all(program: Program, value: int) -> None:
    """One to each of the three threads of late_signals.c."""
    pid = program.pid
    _, reading, _ = map(int, os.listdir(f"/proc/{pid}/task"))  # in the order in which they were started
    os.kill(pid, signal.SIGUSR1)
    assert libc.tgkill(pid, reading, signal.SIGUSR2) == 0
    assert libc.sigqueue(pid, QUEUED, ctypes.c_void_p(value)) == 0


def heard(program: Program, count: int) -> None:
    """Each thread has been told so often, and says that it was right."""
    wait_until(lambda: min(program.watch.read().beats) >= count, f"{count} signals: {program.watch.read()}")
    assert (status := program.watch.read()).errors == 0, str(status)
    assert status.beats == (count,) * 3


def heard_by_the_copy(program: Program, report: dict[str, Any], count: int) -> None:
    """Which then ends, and well."""
    heard(program, count)
    os.kill(report["root_pid"], signal.SIGTERM)
    program.watch.wait_ended()


def save(program: Program, folder: Path, **more: Any) -> None:
    checkpoint(program.pid, folder / "images", leave_running=False, tcp_close=False, listener=ignore, **more)


def test_between_description_and_commit(tmp_path: Path) -> None:
    require_root()
    ready, go = tmp_path / "ready", tmp_path / "go"
    for fifo in (ready, go):
        os.mkfifo(fifo)
    with (
        running("late_signals", directory=tmp_path, exclusive=True) as program,
        listening("receive", "--once", "--json") as (receiver, target),
    ):
        send_all(program, 1)
        heard(program, 1)
        command = [*held_up(ready, go, "built"), "migrate", str(program.pid), target, "--json"]
        with started(command) as migrate:
            assert ready.read_text() == "ready\n"
            send_all(program, 2)
            go.write_text("")
            report = json.loads(migrate.communicate(timeout=30)[0])
        with killed_at_the_end(report["root_pid"]):
            heard_by_the_copy(program, report, 2)
            assert receiver.wait(20) == 0


def test_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    require_root()
    with running("late_signals", directory=tmp_path) as program:

        def store(draft: Draft, tree: Checkpoint, source: PageSource) -> Stored:
            stored = storing.whole(draft, tree, source)
            send_all(program, 1)
            return stored

        save(program, tmp_path, store=store)
        with started([*CLI, "restore", "-D", str(tmp_path / "images"), "--detach", "--json"]) as restore:
            report = json.loads(restore.communicate(timeout=30)[0])
        with killed_at_the_end(report["root_pid"]):
            heard_by_the_copy(program, report, 1)


def test_it_runs_on_here_and_has_them(tmp_path: Path) -> None:
    """What comes to a tree whose checkpoint fails in the last moment."""
    require_root()
    with running("late_signals", directory=tmp_path) as program:

        def fail() -> None:
            send_all(program, 1)
            raise UsageError("no")

        with pytest.raises(UsageError):
            save(program, tmp_path, last=fail)
        heard(program, 1)
        program.stop_and_verify()
