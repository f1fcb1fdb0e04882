"""`restore` from a folder on this host. A lazy one is a session: when we are killed, `lazyproc resume` completes it."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path

from lazyproc.events import Listener, ignore
from lazyproc.facts import dataclass
from lazyproc.kernel import proc
from lazyproc.restore import run
from lazyproc.restore.run import Restored
from lazyproc.restore.tree import NONE_GIVEN, Pidns

TYPE_CHECKING = False
if TYPE_CHECKING:
    from lazyproc.migrate.criu_supply import CriuSupply
    from lazyproc.migrate.journal import Journal
    from lazyproc.pages.storing import Store
    from lazyproc.pages.tls import Tls


@contextmanager
def restore(
    directory: Path | str,
    *,
    lazy: bool = False,
    pidns: Pidns = "auto",
    policy: str = "sequential",
    listener: Listener = ignore,
    bulk: bool = True,
    cgroup: str | None = None,
    trace: Path | str | None = None,
    record: Path | str | None = None,
    stopped: bool = False,
    ready: Callable[[int], object] = lambda pid: None,
    lazy_pages: socket.socket | None = None,
    tcp_close: bool = False,
    page_server: PageServerOfCriu | None = None,
    given: Mapping[str, int] = NONE_GIVEN,
    sibling: bool = False,
    root: str | None = None,
) -> Iterator[Restored]:
    """The tree in the folder `directory` runs when this context is entered, all of it there or, `lazy`, its pages as
    they are touched; what is given tells when they have come. It runs on afterwards.

    What the images call lazy comes from `page_server`; see there. Missing pages that are left are in `lazyproc
    sessions`. lazyproc.restore.run.restore says what everything else means, and what is raised.
    """
    session = os.urandom(8).hex()
    with ExitStack() as stack:
        served = stack.enter_context(page_server.supply(session)) if page_server is not None else None
        restored = stack.enter_context(
            run.restore(
                Path(directory),
                lazy=lazy,
                pidns=pidns,
                policy=policy,
                listener=listener,
                bulk=bulk,
                cgroup=cgroup,
                trace=trace,
                record=record,
                stopped=stopped,
                ready=ready,
                lazy_pages=lazy_pages,
                tcp_close=tcp_close,
                served=served,
                given=given,
                sibling=sibling,
                root=root,
            )
        )
        if restored.pager is None:
            yield restored
            return
        server = page_server.address if page_server is not None else ""
        with _session(session, restored, Path(directory), policy, server, listener):
            yield restored


@dataclass(frozen=True, slots=True)
class PageServerOfCriu:
    """`criu dump --lazy-pages` or `criu page-server --lazy-pages` at `address` (HOST:PORT), of CRIU 4.2 or newer, or
    `older` (4.1 and before), which nothing tells.

    CRIU's server has one client: whatever ends the connection before the tree runs here lets the process there run on,
    and when every page is here the process there is ended.
    """

    address: str
    older: bool = False
    insecure: bool = False
    tls: Tls | None = None

    def sending(self) -> AbstractContextManager[Store]:
        """`checkpoint` stores the pages there: `criu page-server`, 4.2, or `lazyproc serve --receive`. It is dialled at
        once. Raises UsageError for the address, ConnectionLost, PermissionDenied.
        """
        from lazyproc.pages.criu_sender import sending
        from lazyproc.pages.peer import Trust

        return sending(self.address, Trust(self.insecure, tls=self.tls))

    def supply(self, session: str) -> CriuSupply:
        """For a restore that is its session."""
        from lazyproc.migrate.criu_supply import CriuSupply
        from lazyproc.pages.criu_source import CriuServer
        from lazyproc.pages.peer import Trust
        from lazyproc.wire.criu import Dialect

        dialect = Dialect.V4_1 if self.older else Dialect.V4_2
        trust = Trust(self.insecure, tls=self.tls)
        return CriuSupply(lambda: CriuServer.dial(self.address, dialect, trust), session)


@contextmanager
def _session(
    session: str, restored: Restored, directory: Path, policy: str, server: str, listener: Listener
) -> Iterator[None]:
    """On record, until nothing is missing or nobody is left to miss it."""
    # Not before the tree runs: their import would be part of its start.
    from lazyproc.migrate.desk import Desk
    from lazyproc.migrate.journal import DESTINATION, Journal
    from lazyproc.restore.lazytree import to_facts
    from lazyproc.uffd.policy import POLICIES

    images = os.path.abspath(directory)
    facts = {
        "token": os.urandom(16).hex(),  # nobody's: there is no other side
        "peer": server or images,
        "images": images,
        "server": server,
        "address": "",
        "tree": to_facts(restored.tree),
        "wishes": {"mode": "postcopy", "policy": policy if policy in POLICIES else "sequential"},
    }
    with closing(Desk(session, DESTINATION)):
        journal = Journal(session, DESTINATION, facts)
        journal.note("running", listener)  # it runs already, and needs us with or without a record
        restored.settle = partial(_note_whole, restored, journal, listener)
        try:
            yield
        finally:
            if restored.drained or not any(
                proc.lives(task.pid, task.started) for task in restored.tree.tasks
            ):
                journal.remove()


def _note_whole(restored: Restored, journal: Journal, listener: Listener) -> None:
    """For `resume`, when we are killed while the tree gives back what it keeps of its memory."""
    from lazyproc.migrate.drain import has_ended, report_of

    assert restored.pager is not None
    counters, ended = restored.pager.counters(), has_ended(restored.pager, restored.tree)
    journal.note("running", listener, {"whole": report_of(counters, ended=ended)})
