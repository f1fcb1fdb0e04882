"""What a complete tree keeps of its memory is taken from it, as soon as nobody else traces it."""

from __future__ import annotations

import time

from lazyproc.errors import PermissionDenied, TraceeError
from lazyproc.events import Listener, Note
from lazyproc.restore.lazy import finish
from lazyproc.restore.lazytree import LazyTree
from lazyproc.uffd.pager import Pager

PAUSE_S = 0.5  # between two attempts: each stops the processes that can be stopped


class Finishing:
    """`finish`, tried until it is done. A process has one tracer (ptrace(2)), and a debugger may have been first."""

    def __init__(self, pager: Pager, tree: LazyTree, listener: Listener) -> None:
        self._pager = pager
        self._tree = tree
        self._listener = listener
        self._due = 0.0  # the next attempt, on the monotonic clock
        self.reason = ""  # why it is not done yet

    def attempt(self) -> bool:
        """Whether it is done; not more often than every PAUSE_S. Raises what `finish` raises else."""
        if time.monotonic() < self._due:
            return False
        try:
            finish(self._pager, self._tree)
        except (PermissionDenied, TraceeError) as error:
            told, self.reason = self.reason, f"every page is there, lazyproc waits to leave the tree: {error}"
            if not told:
                self._listener(Note(self.reason))
            self._due = time.monotonic() + PAUSE_S
            return False
        self.reason = ""
        return True
