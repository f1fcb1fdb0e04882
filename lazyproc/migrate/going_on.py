"""The source in place of one that was killed after it had parked what moves, by the journal; and how a session ends
there.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, ExitStack, nullcontext

from lazyproc.errors import LazyprocError, NoSuchProcess
from lazyproc.events import Listener, Over, StateChanged
from lazyproc.facts import asdict
from lazyproc.kernel import netfilter
from lazyproc.kernel.deaf import deaf
from lazyproc.migrate.apart import crew
from lazyproc.migrate.held import Held, held_by
from lazyproc.migrate.journal import RELEASING, SOURCE, Journal, Record
from lazyproc.migrate.link import Chain
from lazyproc.migrate.locks import LockTaken, still_parked
from lazyproc.migrate.lost import source_ended
from lazyproc.migrate.report import MigrateReport
from lazyproc.migrate.serving import Serving, report_of
from lazyproc.migrate.talk import Refused
from lazyproc.pages.frozen import FrozenPages
from lazyproc.pages.server import PageServer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from lazyproc.migrate.releasing import Releaser


def go_on(record: Record, chain: Chain, listener: Listener) -> MigrateReport:
    """In place of a process that was killed after it had parked the tree: the same from there, by the journal.

    Raises LazyprocError when nothing was parked yet: then the tree runs. Raises LostAfterCommit when it has ended.
    """
    journal = Journal(record.session, SOURCE, record.facts)
    journal.facts |= crew()
    held = held_by(record.facts) if "held" in record.facts else None
    if held is not None and "report" in record.facts:  # killed while it ended what is left here
        end_here(journal, held)
        return MigrateReport(**record.facts["report"])
    if held is None or record.called_off or (record.state == "parked" and not held.stands()):
        run_on(journal, held)
        raise LazyprocError(
            f"{record.called_off or 'the process that was moving it was killed'}; it runs here as before",
            where=f"pid {record.facts['root_pid']}",
        )
    journal.note(record.state, listener)
    release = record.facts.get("release") is True
    with deaf(), ExitStack() as stack:
        pages = stack.enter_context(_opened(held, record))
        server = stack.enter_context(PageServer(pages.segments(), releasing=release))
        releaser = stack.enter_context(releaser_of(release, held, server, journal, listener, traced=False))
        if releaser is not None and record.state == RELEASING:
            releaser.take_over()
        serving = Serving(chain, server, held.extents, held.root_pid, listener)
        if record.state == "parked":  # not known yet who has it
            try:
                serving.until_committed()
            except Refused as refused:
                run_on(journal, held, str(refused))
                raise
        frozen_ms = (time.time() - float(record.facts["frozen_at"])) * 1e3
        running = serving.until_running()
        for name in ("frozen_ms", "blackout_ms"):  # of the first time, if it came so far
            journal.facts.setdefault(name, frozen_ms)
        state = RELEASING if record.state == RELEASING else "running"
        journal.note(state, listener, {"remote_pid": running.get("root_pid")})
        drained = serving.until_drained(releaser)
        report = report_of(journal.facts, drained, server, chain)
        if releaser is not None:
            releaser.close()
        journal.note(journal.facts["state"], listener, {"report": asdict(report)})
        serving.release()
        listener(Over(report))
        end_here(journal, held)
        listener(StateChanged("released", time.monotonic()))
    return report


def _opened(held: Held, record: Record) -> FrozenPages:
    """Its pages, where they lie. It may be killed at any moment: raises LostAfterCommit when it may run elsewhere."""
    try:
        return held.open()
    except NoSuchProcess as error:
        if record.state == "parked":
            raise
        raise source_ended(held.ended() or held.root_pid, record.session) from error


def releaser_of(
    wanted: bool, held: Held, server: PageServer, journal: Journal, listener: Listener, *, traced: bool
) -> AbstractContextManager[Releaser | None]:
    if not wanted:
        return nullcontext()
    from lazyproc.migrate.holding import Holding
    from lazyproc.migrate.releasing import Releaser

    if not isinstance(held, Holding):
        return nullcontext()
    return Releaser(held, server, journal, listener, traced=traced)


def run_on(journal: Journal, held: Held | None, why: str = "") -> None:
    """Whatever of it is parked runs on here, and that is the end of the session. Raises Parked, and `why` it should is
    on record, when one of its file locks is somebody else's: without it nothing of it runs.
    """
    if held is not None:
        try:
            held.let_run()
        except LockTaken as taken:
            if why:
                journal.call_off(why)
            raise still_parked(taken, journal.session) from taken
        netfilter.release_session(journal.session)
    journal.remove()


def end_here(journal: Journal, held: Held) -> None:
    """Every page is there, and nothing of it is needed here."""
    held.end()
    netfilter.release_session(journal.session)
    journal.remove()
