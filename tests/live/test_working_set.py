"""A restore records what it waited for, and the next one has it before it is touched."""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lazyproc.errors import ImageError, UsageError
from lazyproc.events import ignore
from lazyproc.restore.run import Restored, restore
from lazyproc.restore.workingset import read_working_set
from lazyproc.trace import HEADER_BYTES, RECORD
from lazyproc.uffd.device import Outcome
from lazyproc.uffd.pager import Pager
from tests.live.arrivals import Left, leave
from tests.live.programs import wait_until

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
