"""The destination's side when it is the one who calls: `restore --from` a `serve` elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lazyproc.events import Listener
from lazyproc.facts import dataclass
from lazyproc.kernel.cgroup import remove
from lazyproc.migrate.destination import Arrival, Arrived, Terms, fetched
from lazyproc.restore.run import Restored
from lazyproc.trace import TraceFile


@dataclass(slots=True, kw_only=True)
class Fetched(Restored):
    """A tree that runs while its pages come from a server elsewhere."""

    arrival: Arrival
    arrived: Arrived

    def wait_drained(self, timeout: float | None = None) -> bool:
        """See Restored. Raises ConnectionLost when the server is gone: what is missing stays missing."""
        return self.arrival.drained(self.arrived, timeout)


@contextmanager
def restore_from(
    target: str, terms: Terms, *, insecure: bool, listener: Listener, trace: Path | str | None = None
) -> Iterator[Fetched]:
    """The tree that `lazyproc serve` offers at `target` (HOST:PORT); it runs when the context is entered.

    Its faults are written to `trace` (docs/trace.md). Raises what `migrate` raises; the tree then runs on at its
    source.
    """
    started = time.monotonic()
    with ExitStack() as stack:
        file = stack.enter_context(TraceFile(trace, listener)) if trace is not None else None
        arrival = stack.enter_context(
            fetched(target, terms, insecure=insecure, listener=listener, trace=file)
        )
        arrived = arrival.begin()
        tree = arrived.tree
        stack.callback(remove, tree.groups)  # in case it ends before us
        vpid = tree.checkpoint.root.vpid
        yield Fetched(
            tree,
            tree.nursery.pid,
            tree.root_pid,
            vpid,
            started,
            arrived.pager,
            arrival=arrival,
            arrived=arrived,
        )
