"""What every move has at its source, of a tree or of a guest: how the two sides come together, and processes that
outlive the command, each in place of one that was killed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Protocol

from lazyproc import events
from lazyproc.errors import ConnectionLost, LazyprocError, UsageError
from lazyproc.events import Listener, Over
from lazyproc.facts import dataclass
from lazyproc.migrate.apart import Client, Work, apart, crew
from lazyproc.migrate.desk import Desk
from lazyproc.migrate.journal import SOURCE, Journal, Record, find, records
from lazyproc.migrate.link import LAST_PAUSE_S, Chain, Gathering, Link, linked
from lazyproc.migrate.report import MigrateReport
from lazyproc.pages.address import SCHEME
from lazyproc.pages.door import Door, listen
from lazyproc.pages.peer import Trust
from lazyproc.pages.session import Session
from lazyproc.trace import TraceFile
from lazyproc.wire.native import Party

NAME = "lazyproc-source"
BUILD_S = 60.0


def way_to(target: str, trust: Trust) -> Way:
    """To a receiver at HOST:PORT, or behind ssh://. Raises UsageError."""
    session = Session.new()
    if target.startswith(SCHEME):
        _demand_usable(target, trust)

    def first(stack: ExitStack) -> Link:
        return linked(stack.enter_context(_reached(target)), Party.SOURCE, trust, session)

    def again() -> Link:
        peer = str(find(session.id, SOURCE).facts["peer"])
        return linked(peer, Party.SOURCE, trust, session, resume=True)

    return Way(session, first, again, {"peer": target, "token": session.token, **trust.facts()})


def _demand_usable(target: str, trust: Trust) -> None:
    """Raises UsageError for what is no ssh://, and for another proof of who is there."""
    from lazyproc.pages.ssh import Ssh

    Ssh.parse(target)
    if trust != Trust():
        raise UsageError(
            "ssh proves who is there and encrypts", where=target, remedy="leave out --insecure and TLS"
        )


def _reached(target: str) -> AbstractContextManager[str]:
    """Where the receiver can be dialled; with ssh:// one is started, and ends with the context."""
    if not target.startswith(SCHEME):
        return nullcontext(target)
    from lazyproc.pages.ssh import started

    return started(target)


@dataclass(frozen=True, slots=True)
class Way:
    """How the two sides come together: the first link of a session, and each one after a link that was lost."""

    session: Session
    first: Callable[[ExitStack], Link]  # what it opens besides is closed with the stack
    again: Callable[[], Link]
    facts: Mapping[str, object]  # for a journal: who goes on when all are gone finds the other side by them

    def chain(
        self, first: Link | None, retry_for: float | None, client: Client
    ) -> AbstractContextManager[Chain]:
        return closing(Chain(self.session.id, first, self.again, retry_for, client.tell))


class Move(Protocol):
    """What is moved. `look` comes before the other side is called, `hand_over` when it has answered."""

    @property
    def facts(self) -> Mapping[str, object]:
        """For the journal; after `look`."""

    def look(self, listener: Listener) -> None:
        """Raises CannotBeDone."""

    def hand_over(
        self, chain: Chain, journal: Journal, listener: Listener, trace: TraceFile | None
    ) -> MigrateReport:
        """To the last page. Before COMMIT is sent every error leaves it running here."""


def moved(
    move: Move,
    way: Way,
    *,
    listener: Listener,
    retry_for: float | None = None,
    trace: Path | str | None = None,
    let_go: Callable[[], object] = lambda: None,
) -> MigrateReport:
    """The whole move, by processes that outlive this one; see `source.migrate`, and `apart` for `let_go`."""
    session, started = way.session.id, time.time()
    journal = Journal(session, SOURCE)

    def first(client: Client) -> MigrateReport:
        client.stop_without_it()
        with ExitStack() as stack:
            stack.callback(journal.remove_if, "preparing")
            file = stack.enter_context(TraceFile(trace, client.tell)) if trace is not None else None
            move.look(client.tell)
            begun = {**way.facts, **move.facts, "started": started}
            journal.write("preparing", durable=False, **begun, **crew())
            chain = stack.enter_context(way.chain(way.first(stack), retry_for, client))
            journal.write("preparing", durable=False, peer=chain.current.control.peer)
            return move.hand_over(chain, journal, client.tell, file)

    def again() -> Work[MigrateReport]:
        return _going_on(session, lambda _: nullcontext(way), retry_for)

    return _apart(first, again, session, listener, let_go)


def _going_on(
    session: str, way_by: Callable[[Listener], AbstractContextManager[Way]], retry_for: float | None
) -> Work[MigrateReport]:
    """What goes on from the journal."""
    from lazyproc.migrate.going_on import go_on

    def work(client: Client) -> MigrateReport:
        with way_by(client.tell) as way, way.chain(None, retry_for, client) as chain:
            return go_on(find(session, SOURCE), chain, client.tell)

    return work


def _apart(
    first: Work[MigrateReport],
    again: Callable[[], Work[MigrateReport]],
    session: str,
    listener: Listener,
    let_go: Callable[[], object] = lambda: None,
) -> MigrateReport:
    reports: list[MigrateReport] = []

    def tell(event: events.Event) -> None:
        if isinstance(event, Over) and isinstance(event.report, MigrateReport):
            reports.append(event.report)
        else:
            listener(event)

    lost = f"see lazyproc sessions, and lazyproc resume {session}"
    try:
        return apart(first, again, tell, NAME, staff=lambda: Desk(session, SOURCE), lost=lost, let_go=let_go)
    except LazyprocError:  # of a successor, who finds no record
        if reports and not any((each.session, each.role) == (session, SOURCE) for each in records()):
            return reports[-1]  # they were killed when nothing was left to do
        raise


def migrate_on(record: Record, *, retry_for: float | None, listener: Listener) -> MigrateReport:
    """Go on with a migration whose processes at the source are all gone; see `source.migrate`."""
    work = _going_on(record.session, partial(way_of, record), retry_for)
    return _apart(work, lambda: work, record.session, listener)


@contextmanager
def way_of(record: Record, listener: Listener) -> Iterator[Way]:
    """To the other side of a session that nobody works on: it is called, or it calls."""
    facts, session = record.facts, Session(record.session, str(record.facts["token"]))
    trust = Trust.of(facts)
    with ExitStack() as stack:
        if "address" in facts:
            door = stack.enter_context(
                listen(str(facts["address"]), Party.SOURCE, trust=trust, report=listener)
            )
            again = comes_back(door, session)
        else:
            again = partial(linked, str(facts["peer"]), Party.SOURCE, trust, session, resume=True)
        yield Way(session, lambda _: again(), again, facts)


def comes_back(door: Door, session: Session) -> Callable[[], Link]:
    """What waits for the other side of a session to call again. Raises ConnectionLost when it has not for a while."""
    gathering = Gathering(session)

    def wait() -> Link:
        link = gathering.next(door, LAST_PAUSE_S)
        if link is None:
            raise ConnectionLost("nobody has come back yet", where=door.address)
        return link

    return wait
