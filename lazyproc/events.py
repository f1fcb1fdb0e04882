"""Typed events of long work. Everything a person sees (progress, JSON, plots, traces) is folded from these."""

from __future__ import annotations

import time
from collections.abc import Callable

from lazyproc.facts import dataclass, field


@dataclass(frozen=True, slots=True)
class StepDone:
    """One step of a dump, restore or migration ended; `at` is CLOCK_MONOTONIC in seconds, `seconds` its duration."""

    name: str
    at: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Note:
    """Something the user should know and need not act on (a limit that could not be raised, sharing that is lost)."""

    text: str


@dataclass(frozen=True, slots=True)
class PagesMoved:
    """A reading of the pager's counters, in pages."""

    total: int
    installed: int
    zero: int
    urgent: int
    bulk: int
    dropped: int


@dataclass(frozen=True, slots=True)
class StateChanged:
    """The migration entered a state: prepared, frozen, built, committed, running, drained, released."""

    state: str
    at: float


@dataclass(frozen=True, slots=True)
class Over:
    """All is done but for removing the record: `report` is the outcome should nobody be left to say so."""

    report: object


Event = StepDone | Note | PagesMoved | StateChanged | Over
Listener = Callable[[Event], None]


def ignore(_event: Event) -> None:
    """The listener of somebody who does not listen."""


class StepClock:
    """Gives every stretch of a piece of work a name: what has passed since the last one ended belongs to the next."""

    def __init__(self, listener: Listener, prefix: str, began: float | None = None) -> None:
        """`prefix` of their names; `began`: CLOCK_MONOTONIC in seconds, now when absent."""
        self._listener = listener
        self._prefix = prefix
        self._last = time.monotonic() if began is None else began

    def done(self, name: str) -> None:
        now = time.monotonic()
        self._listener(StepDone(self._prefix + name, now, now - self._last))
        self._last = now


class Later:
    """A listener for a stretch of work in which no time may be lost: it keeps what it hears until `tell`."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._kept: list[Event] = []

    def __call__(self, event: Event) -> None:
        self._kept.append(event)

    def steps_ms(self) -> dict[str, float]:
        """How long the steps that are kept took together, by what follows the colon in their names."""
        steps: dict[str, float] = {}
        for event in self._kept:
            if isinstance(event, StepDone):
                name = event.name.rpartition(": ")[2]
                steps[name] = steps.get(name, 0.0) + event.seconds * 1e3
        return steps

    def tell(self) -> None:
        kept, self._kept = self._kept, []
        for event in kept:
            self._listener(event)


@dataclass(slots=True)
class Stats:
    """Events folded into what `--json` prints. Use an instance as the listener."""

    steps: dict[str, float] = field(default_factory=dict)  # seconds per step
    states: dict[str, float] = field(default_factory=dict)  # CLOCK_MONOTONIC per state
    notes: list[str] = field(default_factory=list)
    pages: PagesMoved | None = None

    def __call__(self, event: Event) -> None:
        match event:
            case StepDone(name, _, seconds):
                self.steps[name] = self.steps.get(name, 0.0) + seconds
            case StateChanged(state, at):
                self.states[state] = at
            case Note(text):
                self.notes.append(text)
            case PagesMoved():
                self.pages = event
