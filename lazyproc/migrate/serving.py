"""The source after COMMIT: who has the tree is settled, its pages are served until every one is there, and it is ended.

A lost link is opened again; the tree stays parked meanwhile, and every page can be asked for again.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NoReturn

from lazyproc.errors import (
    ConnectionLost,
    LazyprocError,
    LostAfterCommit,
    NoSuchProcess,
    Parked,
    ProtocolError,
)
from lazyproc.events import Listener, Note, PagesMoved, StateChanged
from lazyproc.migrate.journal import Journal
from lazyproc.migrate.link import Chain, Link
from lazyproc.migrate.lost import asked_again, source_ended
from lazyproc.migrate.report import MigrateReport
from lazyproc.migrate.talk import Pulse, Refused, checked, expect
from lazyproc.model import Extent, MemoryObject
from lazyproc.pages.dial import Declined
from lazyproc.pages.remote import maps_of
from lazyproc.pages.server import PageServer
from lazyproc.steps import Steps
from lazyproc.trace import TraceFile
from lazyproc.wire.jsonobject import JsonValue
from lazyproc.wire.native import Abort, Ack, Committed, Drained, Pong, Released, Running, Trace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from lazyproc.migrate.releasing import Releaser

POLL_S = 0.1
COMMIT_S, RUN_S = 60.0, 60.0

# Of a side that has committed: it never says ABORT (docs/protocol.md), so that is no answer but a link out of step.
LOST = (ConnectionLost, ProtocolError, Refused)
Extents = Mapping[MemoryObject, tuple[Extent, ...]]


class Serving:
    """What goes on between COMMIT and RELEASED, over one link after another."""

    def __init__(
        self,
        chain: Chain,
        server: PageServer,
        extents: Callable[[], Extents],
        pid: int,
        listener: Listener,
        trace: TraceFile | None = None,
    ) -> None:
        self._chain = chain
        self._server = server
        self._extents = extents
        self._pid = pid
        self._listener = listener
        self._trace = trace
        self._releaser: Releaser | None = None
        self._map: Extents | None = None

    def until_committed(self) -> None:
        """Only the other side knows who runs the tree, until it has said so.

        Raises Refused when it has not committed and never will; Parked when it does not know the session, or cannot be
        reached: then the tree stays parked.
        """
        while True:
            try:
                expect(self._chain.current.control, Committed, COMMIT_S)
                return
            except (ConnectionLost, ProtocolError) as lost:
                self._doubted(lost)

    def until_running(self) -> Mapping[str, JsonValue]:
        """The fields of RUNNING; the tree runs there. Raises Parked, as `until_drained`."""
        while True:
            try:
                fields = expect(self._chain.current.control, Running, RUN_S).fields
                self._listener(StateChanged("running", time.monotonic()))
                return fields
            except LOST as lost:
                self._relinked(lost)

    def until_drained(self, releaser: Releaser | None) -> Mapping[str, JsonValue]:
        """The fields of DRAINED: every page is there. `releaser` frees what the other side acknowledges.

        Raises Parked when the link is lost for good, LostAfterCommit.
        """
        self._releaser = releaser
        while True:
            try:
                return self._serve(self._chain.current)
            except LOST as lost:
                beyond = self._beyond_repair()
                self._relinked(lost)
                self.until_running()
                if beyond is not None:
                    self._give_up(beyond)

    def release(self) -> None:
        """The source's side is over."""
        with suppress(ConnectionLost):  # it has every page and does without this word
            self._chain.current.control.send(Released())

    def answer(self, link: Link) -> None:
        """Requests that come over this link are answered by the C threads from now on."""
        self._server.new_link()
        self._server.serve(link.urgent.detach(), "urgent")
        self._server.serve(link.bulk.detach(), "bulk")

    def _doubted(self, lost: LazyprocError) -> None:
        try:
            link = self._chain.relink(lost)
        except (ConnectionLost, ProtocolError) as error:
            session = self._chain.session
            raise Parked(
                f"it is not known whether it runs on the other host ({error.what}); it stays parked here",
                where=f"pid {self._pid}",
                remedy=f"ask again with lazyproc resume {session}, or, if it does not run there, let it run here with "
                f"lazyproc resume {session} --here --force",
            ) from error
        self.answer(link)

    def _relinked(self, lost: LazyprocError) -> None:
        """A link whose other end has said once more that it has the tree."""
        while True:
            try:
                link = self._chain.relink(lost)
                expect(link.control, Committed, COMMIT_S)
                self.answer(link)
                return
            except LOST as error:
                if error is lost or isinstance(error, Declined):
                    raise self._parked(error) from error
                lost = error

    def _parked(self, error: LazyprocError) -> Parked:
        counters = self._server.counters().values()
        sent = sum(each.pages + each.zero for each in counters)
        session = self._chain.session
        return Parked(
            f"it runs on the other host, which cannot be reached after {sent} pages ({error.what}); "
            "its memory stays parked here",
            where=f"pid {self._pid}",
            remedy=f"let it follow with lazyproc resume {session}; if it was ended there, end it here with "
            f"lazyproc abort {session}",
        )

    def _serve(self, link: Link) -> Mapping[str, JsonValue]:
        """The fields of DRAINED over this link."""
        if self._map is None:
            self._map = self._found()
        for part in maps_of(self._map, link.control.peer_revision):
            link.control.send(part)
        pulse = Pulse(link.control)
        while True:
            event = link.control.receive(POLL_S)
            pulse.check()
            if isinstance(event, Trace):
                if self._trace is not None:
                    self._trace.write(event.records, event.lost)
            elif isinstance(event, Ack) and self._releaser is not None:
                self._release(self._releaser, event)
            elif event is not None and not isinstance(event, Pong):
                fields = checked(event, Drained, link.control).fields
                self._listener(StateChanged("drained", time.monotonic()))
                return fields
            if (beyond := self._beyond_repair()) is not None:
                self._give_up(beyond)
            self._listener(self._progress(self._map))

    def _release(self, releaser: Releaser, ack: Ack) -> None:
        try:
            releaser.release(ack.entries)
        except NoSuchProcess:
            self._give_up(source_ended(self._pid, self._chain.session))

    def _found(self) -> Extents:
        """Which pages have content."""
        try:
            return self._extents()
        except NoSuchProcess:
            self._give_up(source_ended(self._pid, self._chain.session))

    def _beyond_repair(self) -> LostAfterCommit | None:
        """Why a page that was asked for over the last link can never be given."""
        if (addr := self._server.freed_and_asked_for()) is not None:
            return asked_again(addr)
        if (pid := self._server.source_ended()) is not None:
            return source_ended(pid, self._chain.session)
        return None

    def _give_up(self, lost: LostAfterCommit) -> NoReturn:
        """The destination is told: the tree waits there, and no link will help it."""
        with suppress(ConnectionLost):
            self._chain.current.control.send(Abort({"reason": lost.what}))
        raise lost

    def _progress(self, extents: Extents) -> PagesMoved:
        total = sum(extent.count for runs in extents.values() for extent in runs)
        counters = self._server.counters()
        urgent, bulk = counters["urgent"], counters["bulk"]
        return PagesMoved(
            total, urgent.pages + bulk.pages, urgent.zero + bulk.zero, urgent.pages, bulk.pages, 0
        )


def report_of(
    facts: Mapping[str, Any], drained: Mapping[str, JsonValue], server: PageServer, chain: Chain
) -> MigrateReport:
    """From what the journal has of the hand-over, and what the destination says of the pages."""
    return MigrateReport(
        session=chain.session,
        mode=str(facts["mode"]),
        root_pid=int(facts["remote_pid"]),
        root_vpid=int(facts["root_vpid"]),
        frozen_ms=float(facts["frozen_ms"]),
        blackout_ms=float(facts["blackout_ms"]),
        total_ms=(time.time() - float(facts["started"])) * 1e3,
        rtt_us=chain.current.control.rtt_us,
        bytes_wire=sum(each.bytes_in + each.bytes_out for each in server.counters().values()),
        reconnects=chain.reconnects,
        steps_ms=dict(facts.get("steps_ms", {})),
        fault_us=_faults(drained),
        ended=drained.get("ended") is True,
        steps_there_ms=steps_in(facts.get("steps_there_ms")),
        pages_total=number_in(drained, "pages_total"),
        pages_zero=number_in(drained, "pages_zero"),
        pages_eager=number_in(drained, "pages_eager"),
        pages_urgent=number_in(drained, "pages_urgent"),
        pages_bulk=number_in(drained, "pages_bulk"),
        pages_packed=number_in(drained, "pages_packed"),
        pages_dropped=number_in(drained, "pages_dropped"),
        pages_poisoned=number_in(drained, "pages_poisoned"),
    )


def steps_in(value: object) -> dict[str, float]:
    """Milliseconds by step, as RUNNING has them; empty when the other side says nothing of the kind."""
    steps = value if isinstance(value, dict) else {}
    return {str(name): float(ms) for name, ms in steps.items() if isinstance(ms, int | float)}


def number_in(fields: Mapping[str, object], name: str) -> int:
    value = fields.get(name)
    if not isinstance(value, int):
        raise ProtocolError(f"the receiver gave no {name}")
    return value


def _faults(fields: Mapping[str, object]) -> dict[str, float]:
    faults = fields.get("fault_us")
    if not isinstance(faults, dict):
        raise ProtocolError("the receiver gave no fault_us")
    return {str(name): float(value) for name, value in faults.items()}


def await_running(serving: Serving, journal: Journal, steps: Steps, listener: Listener) -> None:
    """From COMMIT on. Of the record only its last word is for a host without power."""
    serving.until_committed()
    steps.done("committed")
    frozen_ms = steps.total_ms
    journal.note("committed", listener)
    running = serving.until_running()
    steps.done("running")
    gc.enable()
    figures = {"frozen_ms": frozen_ms, "blackout_ms": steps.total_ms, "steps_ms": steps.ms()}
    if stands := running.get("stands"):
        listener(Note(f"the guest is there and does not run: {stands}; see `cont` in its monitor there"))
    there = {"remote_pid": running.get("root_pid"), "steps_there_ms": running.get("steps_ms")}
    journal.note("running", listener, {**there, **figures}, durable=True)
