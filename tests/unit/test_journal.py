"""What records of sessions mean, and how long they are kept."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import lazyproc
from lazyproc.errors import HostLacks, LazyprocError, UsageError
from lazyproc.events import Event
from lazyproc.migrate.journal import DESTINATION, KEPT_S, SOURCE, Journal, folder, forget_old, records
from tests.needs import require, require_root

NOBODY_KNOWN = 54321  # in no database of users


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


@pytest.mark.parametrize(
    ("role", "state", "kept"),
    [
        (SOURCE, "committed", True),  # its tree is parked, and its memory is needed
        (SOURCE, "parked", True),
        (DESTINATION, "committed", False),
        (DESTINATION, "arriving", False),
        (DESTINATION, "aborted", False),
        (DESTINATION, "running", True),
    ],
)
def test_only_what_was_kept_for_another_host_is_forgotten(
    role: str, state: str, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    Journal("0123456789abcdef", role).write(state)
    (record,) = records()
    monkeypatch.setattr("time.time", lambda: record.since + KEPT_S + 1)
    forget_old()
    assert bool(list(records())) is kept


@pytest.mark.parametrize(("state", "unborn"), [("committed", True), ("arriving", True), ("running", False)])
def test_a_tree_has_not_run_where_it_was_only_committed(state: str, unborn: bool) -> None:
    for role in (SOURCE, DESTINATION):
        Journal("0123456789abcdef", role).write(state)
    assert {record.role: record.unborn for record in records()} == {SOURCE: False, DESTINATION: unborn}


def test_a_commit_of_before_a_restart_says_nothing() -> None:
    journal = Journal("0123456789abcdef", DESTINATION)
    journal.write("committed", boot_id="another")
    (record,) = records()
    assert not record.unborn


@contextmanager
def _as_user(uid: int) -> Iterator[None]:
    os.setresuid(uid, uid, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


def test_who_has_no_home_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    require_root()
    monkeypatch.delenv("HOME", raising=False)
    with _as_user(NOBODY_KNOWN):
        assert folder() == Path(os.environ["XDG_STATE_HOME"], "lazyproc/sessions")
        monkeypatch.delenv("XDG_STATE_HOME")
        with pytest.raises(HostLacks, match=f"uid {NOBODY_KNOWN}: .* set HOME or XDG_STATE_HOME"):
            folder()


def test_sessions_are_the_same_from_every_working_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_STATE_HOME")
    without = folder()
    monkeypatch.setenv("XDG_STATE_HOME", "state")
    assert folder() == without


@pytest.mark.parametrize("role", [SOURCE, DESTINATION])
@pytest.mark.parametrize("more", [{"poison": True}, {"directory": Path("images")}])
def test_what_is_for_one_side_does_not_go_with_what_is_for_the_other(role: str, more: dict[str, Any]) -> None:
    Journal("0123456789abcdef", role).write("running")
    with pytest.raises(UsageError, match="--here is for the source of a session, --from and --poison"):
        lazyproc.resume("0123456789abcdef", here=True, **more)


def test_a_shorter_record_leaves_nothing_of_a_longer_one() -> None:
    """Files are written over, so that none has to grow where a tree stands still."""
    journal = Journal("0123456789abcdef", DESTINATION)
    journal.draft("running", note="long" * 1000)
    journal.publish(journal.draft("running", note="short"))
    (record,) = records()
    assert record.facts["note"] == "short"


def test_a_record_goes_with_all_that_was_drafted(tmp_path: Path) -> None:
    journal = Journal("0123456789abcdef", DESTINATION)
    journal.write("arriving")
    for state in ("committed", "running"):
        journal.make_room(state)
        journal.draft(state)
    assert [record.state for record in records()] == ["arriving"]
    journal.remove()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_record_is_removed_only_while_it_has_come_no_further() -> None:
    journal = Journal("0123456789abcdef", SOURCE)
    journal.write("parked")
    journal.remove_if("preparing")
    assert [record.state for record in records()] == ["parked"]
    journal.remove_if("parked")
    assert list(records()) == []


def test_a_folder_that_takes_no_record_is_told_and_the_words_are_kept(tmp_path: Path) -> None:
    journal, heard = Journal("0123456789abcdef", SOURCE), list[Event]()
    (tmp_path / "lazyproc").write_text("no folder")
    with pytest.raises(LazyprocError, match="the journal cannot be written"):
        journal.write("parked")
    journal.note("committed", heard.append, {"peer": "here"})
    assert (journal.facts["state"], journal.facts["peer"]) == ("committed", "here")
    assert len(heard) == 1


@pytest.mark.parametrize(
    ("durable", "order"),
    [(True, ["fdatasync", "rename", "fsync"]), (False, ["rename"])],
    ids=["durable", "not"],
)
def test_what_is_durable_is_on_the_disk_before_it_has_its_name_and_so_is_that(
    durable: bool, order: list[str], tmp_path: Path
) -> None:
    code = f"from lazyproc.migrate.journal import *; Journal('5e', DESTINATION).write('s', durable={durable})"
    calls = tmp_path / "calls"
    watched = [str(require("strace")), "-o", str(calls), "-e", "trace=fdatasync,fsync,rename"]
    subprocess.run([*watched, sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
    assert re.findall(r"^(\w+)\(", calls.read_text(), re.MULTILINE) == order
