"""What records of sessions mean, and how long they are kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from lazyproc.migrate.journal import DESTINATION, KEPT_S, SOURCE, Journal, forget_old, records


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
