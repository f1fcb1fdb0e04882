"""What a daemon tells the command that waits for it, however long it is."""

from __future__ import annotations

import pytest

from lazyproc.errors import CannotBeDone, LazyprocError, Obstacle
from lazyproc.events import Note, ignore
from lazyproc.migrate.apart import MESSAGE_MAX, Client, result, stream


def told(error: BaseException) -> BaseException:
    ours, theirs = stream()
    with ours, theirs:
        client = Client(theirs)
        client.tell(Note("working"))
        client.failed(error)
        with pytest.raises(LazyprocError) as raised:
            result(ours, ignore, lost="nothing")
    return raised.value


def test_a_long_event_comes_as_its_beginning() -> None:
    heard: list[object] = []
    ours, theirs = stream()
    with ours, theirs:
        client = Client(theirs)
        client.tell(Note("x" * 2 * MESSAGE_MAX))
        client.done(5)
        assert result(ours, heard.append, lost="nothing") == 5
    (note,) = heard
    assert isinstance(note, Note)
    assert note.text.startswith("xxx")


def test_an_error_comes_as_it_is() -> None:
    error = CannotBeDone((Obstacle(1, "fd 3", "why", "remedy"),))
    again = told(error)
    assert isinstance(again, CannotBeDone)
    assert again.obstacles == error.obstacles


def test_where_an_error_was_raised_comes_with_it() -> None:
    ours, theirs = stream()
    with ours, theirs:
        try:
            int("no number")
        except ValueError as error:
            Client(theirs).failed(error)
        with pytest.raises(ValueError, match="no number") as raised:
            result(ours, ignore, lost="nothing")
    (note,) = raised.value.__notes__
    assert 'int("no number")' in note


@pytest.mark.parametrize(
    "error",
    [
        LazyprocError("x" * 2 * MESSAGE_MAX),
        CannotBeDone(tuple(Obstacle(1, f"fd {n}", "why" * 100, "remedy") for n in range(4000))),
        ValueError("x" * 2 * MESSAGE_MAX),
    ],
    ids=["long", "many obstacles", "foreign"],
)
def test_what_is_too_long_comes_as_its_beginning(error: Exception) -> None:
    again = told(error)
    assert str(again).startswith(str(error)[:100])
    assert isinstance(again, LazyprocError)
    assert again.exit_code == getattr(error, "exit_code", 1)
