"""The destination's side when it is the one who calls: `restore --from` a `serve` elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from lazyproc.errors import Parked
from lazyproc.events import Listener
from lazyproc.facts import dataclass
from lazyproc.kernel.cgroup import remove
from lazyproc.kernel.fds import AMPLE, make_room
from lazyproc.migrate.arrival import Arrival, Terms, Wishes
from lazyproc.migrate.desk import Desk
from lazyproc.migrate.drain import Drain
from lazyproc.migrate.journal import DESTINATION, Journal
from lazyproc.migrate.link import Redial, linked
from lazyproc.migrate.place import Place
from lazyproc.pages.dial import Declined
from lazyproc.pages.peer import Trust
from lazyproc.pages.session import Session
from lazyproc.pages.tls import Tls
from lazyproc.restore.run import Restored
from lazyproc.restore.workingset import policy_of
from lazyproc.trace import TraceFile
from lazyproc.uffd.pager import Pager
from lazyproc.uffd.policy import POLICIES, blocks
from lazyproc.uffd.recorder import Recorder
from lazyproc.wire.native import Party

STEP_S = 0.02


@dataclass(slots=True, kw_only=True)
class Fetched(Restored):
    """A tree that runs while its pages come from a server elsewhere."""

    drain: Drain
    journal: Journal
    redial: Redial

    def wait_drained(self, timeout: float | None = None) -> bool:
        """See Restored. A lost server is called again, without end while pages are missing. Raises Parked when it does
        not know the tree any more: who touches a missing page waits.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self.drain.released:
            if deadline is not None and time.monotonic() >= deadline:
                return False
            if not self.drain.linked:
                self._call_again()
            self.drain.step(STEP_S)
        self.journal.remove()
        return True

    def _call_again(self) -> None:
        try:
            link = self.redial.link()
        except Declined as error:
            if self.drain.report is not None:  # it has been told, and has ended
                self.drain.released = True
                return
            assert self.pager is not None
            missing, session = self.pager.counters().remaining, self.journal.session
            raise Parked(
                f"the server does not have its memory any more ({error.what}); up to {missing} pages are missing, and "
                "who touches one of them waits",
                where=f"pid {self.root_pid}",
                remedy=f"complete it from images with lazyproc resume {session} --from DIR, or end it with lazyproc "
                f"abort {session}",
            ) from error
        if link is not None:
            self.drain.attach(link)


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

    Its faults are written to `trace` (docs/trace.md). Raises what `migrate` raises, and UsageError and ImageError for
    the policy; the tree then runs on at its source. When we are killed it waits for `lazyproc resume`.
    """
    started = time.monotonic()
    ours = policy_of(terms.policy) if terms.policy is not None else None
    session = Session.new()
    trust = Trust(insecure, tls=tls)
    facts = {"token": session.token, "peer": target, **Place(target, trust, dials=True).facts()}
    journal = Journal(session.id, DESTINATION, facts)
    with ExitStack() as stack:
        stack.enter_context(closing(Desk(session.id, DESTINATION)))
        file = stack.enter_context(TraceFile(trace, listener)) if trace is not None else None
        link = stack.enter_context(closing(linked(target, Party.DESTINATION, trust, session)))
        make_room(AMPLE)
        pager = stack.enter_context(Pager(trace=file is not None))

        def serve() -> None:
            wishes = Wishes.of(journal.facts["wishes"])
            pager.plan(blocks(ours.first if ours else ()))
            pager.start(bulk=wishes.bulk, max_rate=wishes.max_rate)

        arrival = Arrival(link, terms, journal, listener, trace=file)
        tree = arrival.begin(pager, serve)
        stack.callback(remove, tree.groups)  # in case it ends before us
        policy = ours or POLICIES[str(journal.facts["wishes"]["policy"])]
        drain = Drain(
            pager,
            tree,
            policy,
            listener,
            settle=lambda report: journal.note("running", listener, {"whole": report}),
        )
        drain.take(link)
        if file is not None:
            stack.callback(Recorder(pager, file.write).close)
        redial = Redial(target, trust, session, listener)
        yield Fetched(tree, started, pager, drain=drain, journal=journal, redial=redial)
