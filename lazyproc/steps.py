"""How long each step of a piece of work took: a clock that is read once a step, so it is always on."""

from __future__ import annotations

import time

from lazyproc.events import Listener, StepDone, ignore


class Steps:
    """Each step begins where the one before it ended, the first one with the object or at `begin`."""

    def __init__(self, listener: Listener = ignore, prefix: str = "", *, began: float | None = None) -> None:
        """`listener` hears of each, by its name behind `prefix`. `began`: CLOCK_MONOTONIC in seconds, now when
        absent.
        """
        self._listener = listener
        self._prefix = prefix
        self._ns: dict[str, int] = {}
        self.begin()
        if began is not None:
            self._first = self._last = int(began * 1e9)

    def begin(self) -> None:
        """What has passed so far is no step."""
        self._first = self._last = time.monotonic_ns()

    def done(self, name: str) -> None:
        """What has passed since the last call was `name`; the times of one name add up."""
        now = time.monotonic_ns()
        self._ns[name] = self._ns.get(name, 0) + now - self._last
        self._listener(StepDone(self._prefix + name, now / 1e9, (now - self._last) / 1e9))
        self._last = now

    @property
    def total_ms(self) -> float:
        """Of all steps that are done."""
        return (self._last - self._first) / 1e6

    def ms(self) -> dict[str, float]:
        """Milliseconds by name, in the order in which the steps came first."""
        return {name: ns / 1e6 for name, ns in self._ns.items()}
