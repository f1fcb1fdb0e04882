"""`restore` from a folder on this host. A lazy one is a session: when we are killed, `lazyproc resume` completes it."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

from lazyproc.events import Listener
from lazyproc.kernel import proc
from lazyproc.restore import run
from lazyproc.restore.run import Restored
from lazyproc.restore.tree import Pidns

TYPE_CHECKING = False
if TYPE_CHECKING:
    from lazyproc.migrate.journal import Journal


@contextmanager
def restore(
    directory: Path,
    *,
    lazy: bool,
    pidns: Pidns,
    policy: str,
    listener: Listener,
    bulk: bool = True,
    cgroup: str | None = None,
    trace: Path | str | None = None,
    record: Path | str | None = None,
    stopped: bool = False,
    ready: Callable[[int], object] = lambda pid: None,
    lazy_pages: socket.socket | None = None,
    tcp_close: bool = False,
) -> Iterator[Restored]:
    """See lazyproc.restore.run.restore. Missing pages that are left parked are in `lazyproc sessions`."""
    with run.restore(
        directory,
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
    ) as restored:
        if restored.pager is None:
            yield restored
            return
        with _session(restored, directory, policy, listener):
            yield restored


@contextmanager
def _session(restored: Restored, directory: Path, policy: str, listener: Listener) -> Iterator[None]:
    """On record, until nothing is missing or nobody is left to miss it."""
    # Not before the tree runs: their import would be part of its start.
    from lazyproc.migrate.desk import Desk
    from lazyproc.migrate.journal import DESTINATION, Journal
    from lazyproc.restore.lazytree import to_facts
    from lazyproc.uffd.policy import POLICIES

    session = os.urandom(8).hex()
    images = os.path.abspath(directory)
    facts = {
        "token": os.urandom(16).hex(),  # nobody's: there is no other side
        "peer": images,
        "images": images,
        "address": "",
        "tree": to_facts(restored.tree),
        "wishes": {"mode": "postcopy", "policy": policy if policy in POLICIES else "sequential"},
    }
    with closing(Desk(session, DESTINATION)):
        journal = Journal(session, DESTINATION, facts)
        journal.write("running", durable=False)
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
    from lazyproc.migrate.drain import report_of

    assert restored.pager is not None
    counters, ended = restored.pager.counters(), not restored.pager.spaces()
    journal.note("running", listener, {"whole": report_of(counters, ended=ended)})
