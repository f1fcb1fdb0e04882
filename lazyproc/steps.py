"""How long each step of a piece of work took: a clock that is read once a step, so it is always on."""

from __future__ import annotations

import time


class Steps:
    """The first step begins with the object, each other one where the one before it ended."""

    def __init__(self) -> None:
        self._first = self._last = time.monotonic_ns()
        self._ns: dict[str, int] = {}

    def done(self, name: str) -> None:
        """What has passed since the last call was `name`; the times of one name add up."""
        now = time.monotonic_ns()
        self._ns[name] = self._ns.get(name, 0) + now - self._last
        self._last = now

    @property
    def total_ms(self) -> float:
        """Of all steps that are done."""
        return (self._last - self._first) / 1e6

    def ms(self) -> dict[str, float]:
        """Milliseconds by name, in the order in which the steps came first."""
        return {name: ns / 1e6 for name, ns in self._ns.items()}
