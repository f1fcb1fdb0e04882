"""Typed events of long work. Everything a person sees (progress, JSON, plots, traces) is folded from these."""

from __future__ import annotations

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
    """The migration entered a state: prepared, frozen, listening, built, committed, running, drained, released."""

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


class Later:
    """A listener for a stretch of work in which no time may be lost: it keeps what it hears until `tell`."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._kept: list[Event] = []

    def __call__(self, event: Event) -> None:
        self._kept.append(event)

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
