"""The destination's side when it is the one who calls: `restore --from` a `serve` elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from lazyproc.errors import ConnectionLost
from lazyproc.events import Listener
from lazyproc.facts import dataclass
from lazyproc.kernel.cgroup import remove
from lazyproc.migrate.arrival import Arrival, Terms, Wishes
from lazyproc.migrate.drain import Drain
from lazyproc.migrate.journal import DESTINATION, Journal
from lazyproc.migrate.link import linked
from lazyproc.pages.peer import Trust
from lazyproc.pages.tls import Tls
from lazyproc.pages.transport import Session
from lazyproc.restore.run import Restored
from lazyproc.trace import TraceFile
from lazyproc.uffd.pager import Pager
from lazyproc.uffd.policy import POLICIES
from lazyproc.uffd.recorder import Recorder
from lazyproc.wire.native import Party

STEP_S = 0.02


@dataclass(slots=True, kw_only=True)
class Fetched(Restored):
    """A tree that runs while its pages come from a server elsewhere."""

    drain: Drain
    journal: Journal

    def wait_drained(self, timeout: float | None = None) -> bool:
        """See Restored. Raises ConnectionLost when the server is gone: who touches a missing page waits."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self.drain.released:
            if not self.drain.linked:
                raise self._lost()
            if deadline is not None and time.monotonic() >= deadline:
                return False
            self.drain.step(STEP_S)
        self.journal.remove()
        return True

    def _lost(self) -> ConnectionLost:
        assert self.pager is not None
        missing = self.pager.counters().remaining
        return ConnectionLost(
            f"the server is lost; up to {missing} pages are missing, and who touches one of them waits",
            where=f"pid {self.root_pid}",
            remedy="end the process with kill -9: its memory cannot be completed any more",
        )


@contextmanager
def restore_from(
    target: str,
    terms: Terms,
    *,
    insecure: bool,
    tls: Tls | None = None,
    listener: Listener,
    trace: Path | str | None = None,
) -> Iterator[Fetched]:
    """The tree that `lazyproc serve` offers at `target` (HOST:PORT); it runs when the context is entered.

    Its faults are written to `trace` (docs/trace.md). Raises what `migrate` raises; the tree then runs on at its
    source.
    """
    started = time.monotonic()
    session = Session.new()
    journal = Journal(session.id, DESTINATION)
    trust = Trust(insecure, tls=tls)
    with ExitStack() as stack:
        file = stack.enter_context(TraceFile(trace, listener)) if trace is not None else None
        link = stack.enter_context(closing(linked(target, Party.DESTINATION, trust, session)))
        pager = stack.enter_context(Pager(trace=file is not None))

        def serve() -> None:
            wishes = Wishes.of(journal.facts["wishes"])
            pager.start(bulk=wishes.bulk, max_rate=wishes.max_rate)

        arrival = Arrival(link, terms, journal, listener, trace=file)
        tree = arrival.begin(pager, serve)
        stack.callback(remove, tree.groups)  # in case it ends before us
        policy = POLICIES[str(journal.facts["wishes"]["policy"])]
        drain = Drain(pager, tree, policy, listener)
        drain.take(link)
        if file is not None:
            stack.callback(Recorder(pager, file.write).close)
        yield Fetched(tree, started, pager, drain=drain, journal=journal)
