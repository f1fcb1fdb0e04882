"""What people and scripts read: sizes, tables, the bar, failures."""

from __future__ import annotations

import io
import json
import os

from hypothesis import given
from hypothesis import strategies as st

from lazyproc.errors import CannotBeDone, ImageError, LostAfterCommit, Obstacle
from lazyproc.events import Event, Note, PagesMoved, StateChanged, StepDone
from lazyproc.show.failures import exit_code, failure_fields, failure_text
from lazyproc.show.progress import Progress, bar, event_text
from lazyproc.show.text import UNITS, numbers, plural, printable, size, table

OBSTACLE = Obstacle(7, "fd 3", "is a pidfd", "close it")


@given(st.integers(0, 1 << 50))
def test_a_size_is_within_a_hundredth_and_short(count: int) -> None:
    value, unit = size(count).split()
    assert abs(float(value) * 1024 ** UNITS.index(unit) - count) <= max(count / 100, 0.5)
    assert len(value) <= 6


@given(st.sets(st.integers(0, 300)))
def test_runs_of_numbers_say_the_same_numbers(values: set[int]) -> None:
    said: set[int] = set()
    for run in filter(None, numbers(sorted(values)).split(", ")):
        first, _, last = run.partition("-")
        said |= set(range(int(first), int(last or first) + 1))
    assert said == values


def test_a_table_is_aligned_and_has_no_blanks_at_the_end() -> None:
    assert table([("a", "bb", ""), ("ccc", "d", "e")]) == "a    bb\nccc  d   e"
    assert plural(1, "task") == "1 task"
    assert plural(0, "task") == "0 tasks"


def test_what_is_no_text_is_written_out() -> None:
    assert printable("é and 漢 stay") == "é and 漢 stay"
    name = os.fsdecode(b"a\xff\n\x1b[31m\xc2\x85\xe2\x80\xae")
    assert printable(name) == r"a\xff\n\x1b[31m\x85\u202e"
    assert printable("a\nb\tc", keep="\n") == "a\nb\\tc"


def test_failures_say_what_where_and_how_to_mend_it() -> None:
    error = ImageError("missing", where="mm-1.img", remedy="copy it")
    assert failure_text(error) == "mm-1.img: missing; copy it"
    assert failure_fields(error) == {
        "error": "missing",
        "exit_code": 1,
        "where": "mm-1.img",
        "remedy": "copy it",
    }
    assert exit_code(LostAfterCommit("x")) == 5
    assert exit_code(OSError(28, "No space")) == 1
    assert "fault of lazyproc" in failure_text(KeyError("x"))


def test_obstacles_are_listed_with_their_remedies() -> None:
    error = CannotBeDone((OBSTACLE, OBSTACLE))
    assert exit_code(error) == 3
    assert failure_text(error).count("pid 7: fd 3: is a pidfd\n    close it") == 2
    fields = json.loads(json.dumps(failure_fields(error)))
    assert fields["obstacles"] == [{"pid": 7, "where": "fd 3", "why": "is a pidfd", "remedy": "close it"}] * 2


@given(st.integers(0, 1 << 30), st.integers(0, 1 << 30))
def test_the_bar_is_as_full_as_the_pages_say(total: int, installed: int) -> None:
    text = bar(PagesMoved(total, installed, 0, 3, 0, 0))
    inside = text[text.index("[") + 1 : text.index("]")]
    assert len(inside) == 30
    assert (inside == "#" * 30) == (installed >= total)


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _written(stream: io.StringIO, *events: Event, verbose: bool = False) -> str:
    with Progress(stream, verbose=verbose) as progress:
        for event in events:
            progress(event)
    return stream.getvalue()


WHOLE = PagesMoved(10, 10, 0, 0, 10, 0)


def test_the_bar_is_drawn_on_terminals_only_and_ends_with_a_line() -> None:
    assert _written(io.StringIO(), WHOLE) == ""
    text = _written(_Terminal(), WHOLE)
    assert bar(WHOLE) in text
    assert text.endswith("\n")


def test_a_note_stands_above_the_bar() -> None:
    text = _written(_Terminal(), WHOLE, Note("careful"))
    assert text.index("note: careful\n") < text.rindex(bar(WHOLE))


def test_steps_and_states_are_for_the_verbose() -> None:
    events = (StepDone("restore: threads", 1.0, 0.0123), StateChanged("frozen", 2.0))
    assert _written(io.StringIO(), *events) == ""
    assert _written(io.StringIO(), *events, verbose=True) == "restore: threads: 12.3 ms\nfrozen\n"
    assert event_text(WHOLE) == "pages: 10 of 10, 0 urgent, 10 bulk, 0 zero, 0 dropped"
