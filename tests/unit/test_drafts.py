"""A record that is written ahead of time, and events that are told later."""

from __future__ import annotations

from pathlib import Path

import pytest

from lazyproc.errors import LazyprocError
from lazyproc.events import Event, Later, Note, StepDone
from lazyproc.migrate.drafting import Drafting
from lazyproc.migrate.journal import DESTINATION, ROOM, Journal, records
from lazyproc.steps import Steps


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Journal:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return Journal("cafe", DESTINATION, {"peer": "there"})


def states() -> list[str]:
    return [record.state for record in records()]


def files(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "lazyproc/sessions").iterdir())


def test_nothing_is_recorded_before_a_draft_is_published(journal: Journal, tmp_path: Path) -> None:
    journal.write("arriving", pages=1)
    journal.make_room("committed")
    committed = journal.draft("committed", tree={"root": 1})
    running = journal.draft("running", durable=False, tree={"root": 1})
    assert states() == ["arriving"]
    assert journal.facts["state"] == "arriving"
    journal.publish(committed)
    assert states() == ["committed"]
    (record,) = records()
    assert record.facts["tree"] == {"root": 1}
    assert record.facts["pages"] == 1
    journal.publish(running)
    assert states() == ["running"]
    assert files(tmp_path) == ["cafe-destination.json"]


def test_what_was_drafted_and_never_published_is_gone_with_the_next_record(
    journal: Journal, tmp_path: Path
) -> None:
    journal.make_room("committed")
    journal.draft("running", durable=False)
    Journal("cafe", DESTINATION).write("aborted")
    assert files(tmp_path) == ["cafe-destination.json"]
    journal.draft("committed")
    journal.remove()
    assert files(tmp_path) == []


def test_a_record_that_is_larger_than_its_room(journal: Journal) -> None:
    journal.make_room("committed")
    journal.publish(journal.draft("committed", huge="x" * 2 * ROOM))
    (record,) = records()
    assert len(record.facts["huge"]) == 2 * ROOM


def test_drafting_says_what_went_wrong(journal: Journal, tmp_path: Path) -> None:
    drafting = Drafting(journal)
    (tmp_path / "lazyproc/sessions/cafe-destination.running").mkdir()
    try:
        drafting.begin({"tree": {}})
        with pytest.raises(LazyprocError, match="the journal cannot be written"):
            drafting.drafts()
    finally:
        drafting.close()


def test_later_keeps_the_order() -> None:
    heard: list[Event] = []
    later = Later(heard.append)
    steps = Steps(later, "restore: ", began=0.0)
    steps.done("decode")
    later(Note("so"))
    steps.done("files")
    steps.done("files")
    assert not heard
    later.tell()
    assert [event.name for event in heard if isinstance(event, StepDone)] == [
        "restore: decode", "restore: files", "restore: files",
    ]  # fmt: skip
    assert heard[1] == Note("so")
    assert sum(steps.ms().values()) == pytest.approx(
        sum(event.seconds * 1e3 for event in heard if isinstance(event, StepDone))
    )
    later.tell()
    assert len(heard) == 4


def test_a_tree_that_was_built_anew_is_the_one_that_is_recorded(journal: Journal) -> None:
    drafting = Drafting(journal)
    try:
        drafting.begin({"tree": {"root": 1}})
        drafting.begin({"tree": {"root": 2}})
        for draft in drafting.drafts():
            journal.publish(draft)
    finally:
        drafting.close()
    (record,) = records()
    assert (record.state, record.facts["tree"]) == ("running", {"root": 2})
