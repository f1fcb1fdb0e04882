"""The records of a commit are written out while the tree is built: a disk takes as long for it as half a restore."""

from __future__ import annotations

from collections.abc import Mapping
from queue import SimpleQueue
from threading import Thread
from typing import Any

from lazyproc.migrate.journal import COMMITTED, Draft, Journal


class Drafting:
    """A thread that writes two drafts, once it is told what is in them. Close it before this process forks.

    It makes no ptrace call: those have one thread.
    """

    def __init__(self, journal: Journal) -> None:
        """Raises LazyprocError."""
        journal.make_room(COMMITTED)
        self._journal = journal
        self._facts: SimpleQueue[Mapping[str, Any] | None] = SimpleQueue()
        self._drafts: SimpleQueue[tuple[Draft, Draft] | Exception] = SimpleQueue()
        self._thread = Thread(target=self._write, daemon=True)
        self._thread.start()

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Once."""
        self._facts.put(facts)

    def drafts(self) -> tuple[Draft, Draft]:
        """That the tree is ours, and that it runs; after `begin`. Raises LazyprocError when they cannot be written."""
        drafts = self._drafts.get()
        if isinstance(drafts, Exception):
            raise drafts
        return drafts

    def close(self) -> None:
        self._facts.put(None)
        self._thread.join()

    def _write(self) -> None:
        facts = self._facts.get()
        if facts is None:
            return
        try:
            committed = self._journal.draft(COMMITTED, **facts)
            self._drafts.put((committed, self._journal.draft("running", durable=False, **facts)))
        except Exception as error:
            self._drafts.put(error)
