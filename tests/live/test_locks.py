"""File locks go with a move: between hosts that have the same files, and where each has its own."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lazyproc.hosts import Host, Pair
from tests.faults.hostile import listening
from tests.live.lockers import LOCKS, Holder, holders_of, holding, is_free, waiters_of
from tests.live.moving import checkpoint, migrate, receiving, run_cli, tree_of
from tests.live.programs import wait_until
from tests.live.real import ending, migrating, move_now
from tests.live.tracees import state_of


def has_moved(holder: Holder, pid: int) -> None:
    """Runs as `pid`, and nobody else can have its locks, before it lets go of them."""
    holder.answers(pid)
    assert not is_free(holder.file)


@pytest.mark.parametrize("kind", LOCKS)
def test_is_held_there_and_here_no_more(kind: str, pair: Pair) -> None:
    code, shared = LOCKS[kind]
    with (
        holding(pair.source, pair.shared, code) as holder,
        receiving(pair.destination) as receiver,
        migrating(pair.source, receiver, holder.pid, "--max-rate", "8000000") as journey,
    ):
        journey.wait_running()
        assert journey.still_lazy()
        assert len(holders_of(holder.file)) == 1  # the frozen process has let go of it
        new, report = journey.arrive()
        with ending(new):
            if kind != "lease":  # whose end wants somebody who opens the file for writing, and waits
                has_moved(holder, new)
            assert len(holders_of(holder.file)) == 1
            assert "locks" in report["steps_ms"]
            assert "locks" in report["steps_there_ms"]
            assert shared or report["steps_there_ms"]["locks"] > 0
        wait_until(lambda: not holders_of(holder.file), "its end lets go of it")


def test_who_fetches_a_process_gets_its_locks(pair: Pair) -> None:
    with (
        holding(pair.source, pair.shared, LOCKS["posix"][0]) as holder,
        listening(pair.source, "serve", pair.source.vpid(holder.pid), "--insecure") as server,
    ):
        words = ("restore", "--from", server.address, "--insecure", "--detach", "--json")
        done = run_cli(pair.destination, *words)
        new = pair.destination.pid(json.loads(done.stdout)["root_pid"])
        with ending(new):
            has_moved(holder, new)
            assert holders_of(holder.file) == [new]


def test_files_that_each_host_has_for_itself(pair: Pair) -> None:
    """Nothing has to be let go of: the file there is another one."""
    for host in (pair.source, pair.destination):
        (host.outside / "file").touch(0o600)
        (host.outside / "said").touch(0o600)
    code = "take('flock', opened('file')); take('posix', opened('file'))"
    with (
        holding(pair.source, pair.source.scratch, code, pair.source.outside) as holder,
        receiving(pair.destination) as receiver,
    ):
        new, report = move_now(pair.source, receiver, holder.pid)
        with ending(new):
            assert "locks" not in {*report["steps_ms"], *report["steps_there_ms"]}
            there = Holder(holder.process, pair.destination.outside)
            has_moved(there, new)
            assert len(holders_of(there.file)) == 2
            assert is_free(holder.file)


def test_two_processes_that_have_one_open_file(pair: Pair) -> None:
    """The lock is of both, and is taken once."""
    code = "file = opened('file'); take('flock', file); take('ofd', file); os.fork()"
    with holding(pair.source, pair.shared, code) as holder, receiving(pair.destination) as receiver:
        holder.wait_said("holds", 2)
        new, _ = move_now(pair.source, receiver, holder.pid)
        with ending(new):
            assert len(tree_of(new)) == 2
            has_moved(holder, new)
            assert len(holders_of(holder.file)) == 2
            for pid in tree_of(new).values():
                os.kill(pid, signal.SIGUSR2)
            wait_until(lambda: is_free(holder.file), "the end of both lets go of it")


def test_a_lock_that_a_child_has_taken_through_a_file_of_its_parent(pair: Pair) -> None:
    """It is the child's, and nobody can take it for the child."""
    code = "file = opened('file'); child = os.fork(); child or take('posix', file)"
    with holding(pair.source, pair.shared, code) as holder, receiving(pair.destination) as receiver:
        holder.wait_said("holds", 2)
        (child,) = holders_of(holder.file)
        assert child != holder.pid
        new, _ = move_now(pair.source, receiver, holder.pid)
        with ending(new):
            has_moved(holder, new)
            (child,) = holders_of(holder.file)
            assert child in tree_of(new).values()
            assert child != new


def test_images_of_a_process_that_runs_on_are_not_restored_beside_it(pair: Pair) -> None:
    """Nobody is going to let go of its locks: the restore says whose they are."""
    with holding(pair.source, pair.shared, LOCKS["posix"][0]) as holder:
        checkpoint(pair.source, holder.pid, pair.shared / "images", "--leave-running")
        refused = run_cli(pair.destination, "restore", "-D", pair.shared / "images", expected=1)
        assert f"({holder.file}): its file lock cannot be had: somebody else has it" in refused.stderr
        has_moved(holder, holder.pid)


@pytest.mark.parametrize("kind", ["flock", "posix"])
def test_who_waits_inside_gets_it_there(kind: str, pair: Pair) -> None:
    inside = f"os.close(file), take('{kind}', opened('file')), say('got')"
    code = f"file = opened('file'); take('{kind}', file); os.fork() or ({inside})"
    with holding(pair.source, pair.shared, code) as holder, receiving(pair.destination) as receiver:
        wait_until(lambda: len(waiters_of(holder.file)) == 1, "the child waits")
        new, _ = move_now(pair.source, receiver, holder.pid)
        with ending(new):
            wait_until(lambda: len(waiters_of(holder.file)) == 1, "the child waits there")
            has_moved(holder, new)
            assert "got" not in holder.said()
            os.kill(new, signal.SIGUSR2)
            holder.wait_said("got")


@contextmanager
def waiting_for(host: Host, path: Path, kind: str) -> Iterator[int]:
    """Somebody else of the same host, who waits for a lock of that file."""
    call = {"flock": "flock", "posix": "lockf"}[kind]
    code = f"import fcntl; fcntl.{call}(open({str(path)!r}, 'r+'), fcntl.LOCK_EX)"
    process = host.popen([sys.executable, "-c", code])
    try:
        wait_until(lambda: waiters_of(path) == [process.pid], "somebody waits")
        yield host.vpid(process.pid)
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("kind", ["flock", "posix"])
def test_who_waits_outside_is_an_obstacle(kind: str, pair: Pair) -> None:
    """He would get it in the middle of the move."""
    with holding(pair.source, pair.shared, LOCKS[kind][0]) as holder, receiving(pair.destination) as receiver:
        vpid = pair.source.vpid(holder.pid)
        with waiting_for(pair.source, holder.file, kind) as waiter:
            done = migrate(pair.source, receiver, holder.pid, expected=3)
            assert f"pid {waiter} waits for its file lock" in done.stderr
            found = run_cli(pair.source, "explain", vpid, expected=3)
            assert f"end pid {waiter} first" in found.stdout + found.stderr
        has_moved(holder, holder.pid)
        run_cli(pair.source, "explain", vpid)


def test_a_stopped_process_stays_stopped_with_its_locks(pair: Pair) -> None:
    code = "take('posix', opened('file')); take('flock', opened('file'))"
    with holding(pair.source, pair.shared, code) as holder, receiving(pair.destination) as receiver:
        os.kill(holder.pid, signal.SIGSTOP)
        wait_until(lambda: state_of(holder.pid) == "T", "it is stopped")
        with migrating(pair.source, receiver, holder.pid) as journey:
            report = journey.finish()
        new = pair.destination.pid(report["root_pid"])
        with ending(new):
            assert state_of(new) == "T"
            assert len(holders_of(holder.file)) == 2
            os.kill(new, signal.SIGCONT)
            has_moved(holder, new)


def test_filtered_system_calls_are_no_obstacle(pair: Pair) -> None:
    """A thread that may not call fcntl(2) any more has its locks all the same."""
    forbid = (
        "import ctypes; take('posix', opened('file')); libc = ctypes.CDLL(None); "
        "program = struct.pack('HBBI' * 4, 0x20, 0, 0, 0, 0x15, 0, 1, 72, 6, 0, 0, 0x50001, 6, 0, 0, 0x7fff0000); "
        "code = ctypes.create_string_buffer(program); "
        "fprog = struct.pack('HxxxxxxQ', 4, ctypes.addressof(code)); "
        "assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, fprog, 0, 0) == 0"
    )
    with holding(pair.source, pair.shared, forbid) as holder, receiving(pair.destination) as receiver:
        new, report = move_now(pair.source, receiver, holder.pid)
        with ending(new):
            assert "locks" in report["steps_there_ms"]
            has_moved(holder, new)


def test_a_write_lease_is_an_obstacle(pair: Pair) -> None:
    """Nobody else may open it: the kernel would send SIGIO, and wait."""
    code = "take('lease', opened('file'))"
    with holding(pair.source, pair.shared, code) as holder, receiving(pair.destination) as receiver:
        done = migrate(pair.source, receiver, holder.pid, expected=3)
        assert "it holds a lease for writing" in done.stderr
        holder.answers(holder.pid)
        assert holders_of(holder.file) == [holder.pid]


@pytest.mark.parametrize("mode", ["wal", "delete"])
def test_sqlite_in_the_middle_of_a_transaction(mode: str, pair: Pair) -> None:
    code = (
        "import sqlite3; base = sqlite3.connect(_folder + '/base', isolation_level=None); "
        f"base.execute('pragma journal_mode={mode}'); base.execute('create table t (a)'); "
        "base.execute('begin immediate'); base.execute('insert into t values (1)'); hold(); "
        "base.execute('insert into t values (2)'); base.execute('commit'); say('committed')"
    )
    with holding(pair.source, pair.shared, code) as holder, receiving(pair.destination) as receiver:
        other = sqlite3.connect(pair.shared / "base", timeout=0, isolation_level=None)
        new, _ = move_now(pair.source, receiver, holder.pid)
        with ending(new):
            holder.answers(new)
            with pytest.raises(sqlite3.OperationalError, match="locked"):
                other.execute("begin immediate")
            os.kill(new, signal.SIGUSR2)
            holder.wait_said("committed")
            assert other.execute("select a from t order by a").fetchall() == [(1,), (2,)]
            assert other.execute("pragma integrity_check").fetchone() == ("ok",)
            other.execute("insert into t values (3)")
        other.close()
