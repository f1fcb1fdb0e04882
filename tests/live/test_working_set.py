"""A restore records what it waited for, and the next one has it before it is touched."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

import lazyproc
from lazyproc.errors import ImageError, UsageError
from lazyproc.events import ignore
from lazyproc.hosts import Pair
from lazyproc.kernel import proc
from lazyproc.model import PAGE, MemoryObject, ObjectKind
from lazyproc.restore.run import Restored, restore
from lazyproc.restore.workingset import read_working_set
from lazyproc.trace import HEADER_BYTES, RECORD, Clock, TraceFile
from lazyproc.uffd.device import Outcome
from lazyproc.uffd.pager import Pager
from tests.live.arrivals import Left, leave
from tests.live.moving import CLI, Receiver, move, receiving, run_cli
from tests.live.programs import running, wait_until

TOUCHED = 2000  # pages, of 16384


@contextmanager
def restored(
    left: Left, *, policy: str = "sequential", bulk: bool, record: Path | None = None
) -> Iterator[Restored]:
    """Killed at the end."""
    with restore(
        left.images, lazy=True, bulk=bulk, pidns="auto", policy=policy, listener=ignore, record=record
    ) as tree:
        try:
            yield tree
        finally:
            tree.forward(signal.SIGKILL)
            os.waitpid(tree.tree.nursery_pid, 0)


def fetched(tree: Restored) -> int:
    """Pages with content that are there, the map known or not."""
    counters = tree.counters()
    assert counters is not None
    return sum(counters.outcomes[how][Outcome.INSTALLED] for how in ("urgent", "bulk"))


def recording(left: Left, record: Path) -> None:
    """Record a tree that gets only what it waits for."""
    with restored(left, bulk=False, record=record) as tree:
        wait_until(lambda: fetched(tree) >= TOUCHED, "its working set is there")


def test_a_second_restore_waits_for_a_tenth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = leave("memory_random", 64, 1, 20000, directory=tmp_path)  # goes on alike after every restore
    record, again = tmp_path / "record", tmp_path / "again"
    recording(left, record)
    assert stat.S_IMODE(record.stat().st_mode) == 0o600
    memory = left.checkpoint().memory
    first = set(read_working_set(record, memory))
    assert len(first) >= TOUCHED
    with monkeypatch.context() as patched:
        # Without the map the program waits at its first page of zeros, and bulk has only the record to go by.
        patched.setattr(Pager, "apply_map", lambda *_: None)
        with restored(left, policy=f"recorded:{record}", bulk=True, record=again) as tree:
            wait_until(lambda: fetched(tree) == len(first), "the recorded pages are there, and no others")
            patched.undo()
            assert tree.pager is not None
            tree.pager.apply_map(memory)
            assert tree.wait_drained(30)
            counters = tree.counters()
            assert counters is not None
            assert counters.urgent <= len(first) // 10
            left.watch.wait_beats()
    assert len(first.intersection(read_working_set(again, memory))) <= len(first) // 10


def test_records_of_others_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    left = leave("memory_random", 16, 1, 1000, directory=tmp_path)
    other = leave("memory_static", directory=tmp_path / "other")
    record = tmp_path / "record"
    recording(left, record)
    with pytest.raises(ImageError, match="that these images do not have"):
        read_working_set(record, other.checkpoint().memory)
    whole = record.read_bytes()
    record.write_bytes(whole[:HEADER_BYTES] + bytes([0xFF]) * RECORD.size)
    with pytest.raises(ImageError, match="mean nothing"):
        read_working_set(record, left.checkpoint().memory)
    for garbled in (b"", whole[1:], os.urandom(4096)):
        record.write_bytes(garbled)
        with (
            pytest.raises(ImageError, match="is no trace"),
            restored(left, policy=f"recorded:{record}", bulk=True),
        ):
            pass


def test_a_record_that_is_not_there(tmp_path: Path) -> None:
    left = leave("memory_random", 1, directory=tmp_path)
    with (
        pytest.raises(UsageError, match="cannot be read"),
        restored(left, policy=f"recorded:{tmp_path / 'none'}", bulk=True),
    ):
        pass


def test_recorded_pages_are_there_before_the_first_instruction(tmp_path: Path) -> None:
    left = leave("memory_random", 16, 1, 1_000_000, directory=tmp_path)
    record, again = tmp_path / "record", tmp_path / "again"
    with restored(left, bulk=False, record=record) as tree:
        wait_until(lambda: fetched(tree) >= 60, "its first visits are over")
    first = read_working_set(record, left.checkpoint().memory)
    with restored(left, policy=f"recorded:{record}", bulk=True, record=again) as tree:
        assert tree.wait_drained(30)
        left.watch.wait_beats()
    assert not set(first).intersection(read_working_set(again, left.checkpoint().memory))


# --- a receiver -----------------------------------------------------------------------------------------


def test_a_receiver_records_what_the_source_would_trace(pair: Pair) -> None:
    record, trace = pair.shared / "record", pair.shared / "trace"
    with (
        running("memory_random", 32, 2, 200, directory=pair.shared, host=pair.source) as program,
        receiving(pair.destination, "--once", "--record", str(record)) as receiver,
    ):
        moved = move(pair.source, receiver, program.pid, "--trace", str(trace))
        assert receiver.process.wait(20) == 0
        assert stat.S_IMODE(record.stat().st_mode) == 0o600
        faults = list(lazyproc.read_trace(record))
        assert faults == list(lazyproc.read_trace(trace))
        assert len(faults) == moved.report["fault_us"]["count"]
        assert lazyproc.read_trace(record).session == moved.report["session"]
        moved.end(program.watch)


def test_a_receiver_brings_recorded_pages_first(pair: Pair) -> None:
    record = pair.shared / "record"
    with running("memory_random", 16, 1, 1_000_000, directory=pair.shared, host=pair.source) as program:
        largest = max(proc.smaps(proc.read(program.pid, "smaps")), key=lambda each: each.anonymous).entry
        middle = (largest.start + largest.end) // 2
        wanted = [middle + index * 2 * PAGE for index in range(100)]
        _written(record, pair.source.vpid(program.pid), [0, *wanted])
        with receiving(pair.destination, "--policy", f"recorded:{record}") as receiver:
            command = (
                *CLI,
                "migrate",
                pair.source.vpid(program.pid),
                receiver.address,
                "--insecure",
                "--json",
            )
            moving = pair.source.popen(
                [*map(str, command), "--max-rate", str(256 * PAGE)], stdout=subprocess.PIPE, text=True
            )
            pid = _pid_at(receiver)
            content = _not_zero(program.pid, wanted)
            wait_until(lambda: _present(pid, wanted) >= content, "the recorded pages are there")
            others = [addr for addr in range(largest.start, largest.end, PAGE) if addr not in wanted]
            assert len(_present(pid, others)) < len(others) // 4
            os.kill(pid, signal.SIGKILL)
            out, _ = moving.communicate(timeout=60)
            assert moving.returncode == 0
            assert json.loads(out)["pages_bulk"] >= len(content)


def _written(path: Path, vpid: int, addrs: Sequence[int]) -> None:
    """A record of these faults; the first page is none that there is."""
    key = MemoryObject(ObjectKind.TASK, vpid).key
    with TraceFile(path) as file:
        file.begin("", Clock.now())
        for time, addr in enumerate(addrs):
            file.write(RECORD.pack(time, 0, 0, time, addr, key, addr, vpid, vpid, 0, 2), 0)


def _present(pid: int, addrs: Sequence[int]) -> set[int]:
    with open(f"/proc/{pid}/pagemap", "rb") as pagemap:
        entries = {addr: os.pread(pagemap.fileno(), 8, addr // PAGE * 8) for addr in addrs}
    return {addr for addr, entry in entries.items() if entry[7] & 0x80}


def _not_zero(pid: int, addrs: Sequence[int]) -> set[int]:
    with open(f"/proc/{pid}/mem", "rb") as memory:
        return {addr for addr in addrs if any(os.pread(memory.fileno(), PAGE, addr))}


def _pid_at(receiver: Receiver) -> int:
    """Of the tree's root, when it runs there."""

    def pids() -> list[int]:
        done = run_cli(receiver.host, "sessions", "--json")
        return [each["root_pid"] for each in json.loads(done.stdout) if each["state"] == "running"]

    wait_until(lambda: bool(pids()), "it runs there")
    return receiver.host.pid(pids()[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--record", "record"), "a record is of one tree; add --once"),
        (("--policy", "no-such"), "no such policy"),
        (("--policy", "recorded:/no/such/record"), "the record cannot be read"),
        (("--policy", "recorded:/etc/hostname"), "is no trace"),
        (("--once", "--record", "/no/such/record"), "the trace cannot be written"),
    ],
)
def test_what_a_receiver_does_not_take(options: Sequence[str], words: str) -> None:
    done = subprocess.run(
        [*CLI, "receive", "--listen", "127.0.0.1:0", *options], capture_output=True, text=True, timeout=30
    )
    assert done.returncode in (1, 2)
    assert words in done.stderr
