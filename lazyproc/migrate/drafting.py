"""The records of a commit are written out while the tree is built: a disk takes as long for it as half a restore."""

from __future__ import annotations

from collections.abc import Mapping
from queue import SimpleQueue
from threading import Thread
from typing import Any

from lazyproc.migrate.journal import COMMITTED, Draft, Journal


class Drafting:
    """A thread that writes two drafts, when it is told what is in them. Close it before this process forks.

    It makes no ptrace call: those have one thread.
    """

    def __init__(self, journal: Journal) -> None:
        """Raises LazyprocError."""
        journal.make_room(COMMITTED)
        self._journal = journal
        self._facts: SimpleQueue[Mapping[str, Any] | None] = SimpleQueue()
        self._drafts: SimpleQueue[tuple[Draft, Draft] | Exception] = SimpleQueue()
        self._begun = 0
        self._thread = Thread(target=self._write, daemon=True)
        self._thread.start()

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Again when the tree has to be built anew (PidTaken): what holds is what was said last."""
        self._begun += 1
        self._facts.put(facts)

    def drafts(self) -> tuple[Draft, Draft]:
        """That the tree is ours, and that it runs; after `begin`. Raises LazyprocError when they cannot be written."""
        written = [self._drafts.get() for _ in range(self._begun)]
        self._begun = 0
        if isinstance(written[-1], Exception):
            raise written[-1]
        return written[-1]

    def close(self) -> None:
        self._facts.put(None)
        self._thread.join()

    def _write(self) -> None:
        while (facts := self._facts.get()) is not None:
            try:
                committed = self._journal.draft(COMMITTED, **facts)
                self._drafts.put((committed, self._journal.draft("running", durable=False, **facts)))
            except Exception as error:
                self._drafts.put(error)
