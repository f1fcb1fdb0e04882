"""Events as they come: lines for notes and steps, and a bar of pages where somebody watches."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self, TextIO

from lazyproc.events import Event, Note, Over, PagesMoved, StateChanged, StepDone
from lazyproc.model import PAGE
from lazyproc.show.text import printable, size

WIDTH = 30  # characters of the bar
REFRESH_S = 0.1


def event_text(event: Event) -> str:
    """One line, for the log and for -v."""
    match event:
        case StepDone(name, _, seconds):
            return f"{name}: {seconds * 1e3:.1f} ms"
        case StateChanged(state, _):
            return state
        case Note(text):
            return f"note: {text}"
        case Over():
            return "over"
        case PagesMoved(total, installed, zero, urgent, bulk, dropped):
            return (
                f"pages: {installed} of {total}, {urgent} urgent, {bulk} bulk, {zero} zero, {dropped} dropped"
            )


def bar(event: PagesMoved) -> str:
    """`[######      ]  54 %  138 MiB of 256 MiB, 312 faults`"""
    done = min(1.0, event.installed / event.total) if event.total else 1.0
    filled = "#" * int(done * WIDTH)
    sizes = f"{size(event.installed * PAGE)} of {size(event.total * PAGE)}"
    return f"[{filled:{WIDTH}}] {done:4.0%}  {sizes}, {event.urgent} urgent"


class Progress:
    """A listener that writes to `stream`. The bar is drawn only on a terminal; steps and states when `verbose`. When
    the stream fails (its reader has gone, its disk is full) that is no reason to end the work, and nothing is said any
    more.
    """

    def __init__(self, stream: TextIO, *, verbose: bool) -> None:
        self._stream = stream
        self._verbose = verbose
        self._drawn_at = 0.0
        self._bar = ""
        self._lost = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._write("\n")
            self._bar = ""

    def __call__(self, event: Event) -> None:
        match event:
            case PagesMoved():
                self._draw(event)
            case Note():
                self._line(event_text(event))
            case _ if self._verbose:
                self._line(event_text(event))

    def _draw(self, event: PagesMoved) -> None:
        now = time.monotonic()
        whole = event.installed >= event.total
        if self._stream.isatty() and (whole or now - self._drawn_at >= REFRESH_S):
            self._drawn_at, self._bar = now, bar(event)
            self._write(f"\r{self._bar}\x1b[K")

    def _line(self, text: str) -> None:
        """Above the bar, which is drawn again below."""
        text = printable(text, keep="\n")
        self._write(f"\r\x1b[K{text}\n{self._bar}" if self._bar else f"{text}\n")

    def _write(self, text: str) -> None:
        if self._lost:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:
            self._lost = True
