"""The destination's side of a migration, in order: prepare, build, commit, run, drain."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager

from lazyproc.errors import ConnectionLost, LazyprocError, ProtocolError
from lazyproc.events import Listener, Note, StateChanged
from lazyproc.facts import asdict, dataclass, field
from lazyproc.images.convert import from_images
from lazyproc.images.files import unpack
from lazyproc.kernel.cgroup import remove
from lazyproc.kernel.deaf import deaf
from lazyproc.kernel.netfilter import Flow
from lazyproc.migrate.address import announce_all
from lazyproc.migrate.answering import heard, obstacles_here
from lazyproc.migrate.journal import Journal
from lazyproc.migrate.link import Gathering, Link, dialled
from lazyproc.migrate.needs import obstacles_frame
from lazyproc.migrate.talk import Unfit, checked, expect
from lazyproc.pages.bundle import NAME, BundledPages
from lazyproc.pages.peer import Trust
from lazyproc.pages.remote import RemotePages, extents_of
from lazyproc.pages.transport import listen
from lazyproc.restore.lazy import finish, pager_of
from lazyproc.restore.sockets import flows_to_hold
from lazyproc.restore.tree import BuiltTree, Pidns, built_tree
from lazyproc.trace import Clock, TraceFile
from lazyproc.uffd.pager import Counters, Pager, PagerState
from lazyproc.uffd.policy import POLICIES, Policy
from lazyproc.uffd.recorder import Recorder, Sink
from lazyproc.wire.jsonobject import JsonValue
from lazyproc.wire.native import (
    Abort,
    Built,
    Commit,
    Committed,
    Drained,
    Images,
    Map,
    Party,
    Prepared,
    Released,
    Running,
    Trace,
)

PREPARE_S = 60.0
FREEZE_S = 60.0
POLL_S = 0.02
DOOR_S = 0.2


@dataclass(frozen=True, slots=True)
class Terms:
    """On which terms trees are taken in."""

    pidns: Pidns = "auto"
    overcommit: bool = False
    cgroup: str | None = None  # a path as in /proc/PID/cgroup; None: one of its own


@dataclass(slots=True)
class Arrived:
    """A tree that runs, and the pager that brings what is missing."""

    tree: BuiltTree
    pager: Pager
    policy: Policy


@dataclass(slots=True)
class Arrival:
    """One migration on its way in. One thread does all its work: ptrace calls have one tracer thread.

    With `trace` the faults go into that file, and the source does not get them.
    """

    link: Link
    terms: Terms
    listener: Listener
    trace: TraceFile | None = None
    committed: bool = False
    journal: Journal = field(init=False)
    recorder: Recorder | None = field(default=None, init=False)
    report: Mapping[str, JsonValue] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.journal = Journal(self.link.session.id, "destination")

    def run(self) -> None:
        """From PREPARE to the last page. Never raises: what goes wrong before the commit is told to the source."""
        try:
            arrived = self.begin()
            while not self.drained(arrived, POLL_S):
                self.listener(arrived.pager.counters().as_event())
            threading.Thread(target=_outlived, args=(arrived.tree,), daemon=True).start()
        except (LazyprocError, OSError) as error:
            self.listener(Note(f"session {self.link.session.id}: {error}"))
        finally:
            self.close()

    def close(self) -> None:
        if self.recorder is not None:
            self.recorder.close()
        self.link.control.close()

    def begin(self) -> Arrived:
        """Up to the first instruction of the tree here. Until the commit every error is told to the source."""
        try:
            return self._begin()
        except (LazyprocError, OSError) as error:
            if not self.committed:
                self._refuse(error)
            raise

    def _begin(self) -> Arrived:
        order = self._prepare()
        images = unpack(expect(self.link.control, Images, FREEZE_S).data)
        source = BundledPages(images.pop(NAME, b""), RemotePages(self.link.urgent, {}))
        checkpoint = from_images(images)
        lazy = order["mode"] == "postcopy"
        pidns, cgroup = self.terms.pidns, self.terms.cgroup
        with built_tree(checkpoint, source, self.listener, lazy=lazy, pidns=pidns, cgroup=cgroup) as tree:
            sink = self._sink(order)
            pager = pager_of(tree, trace=sink is not None)
            self._commit(tree)
            pager.serve_remote(self.link.urgent.detach(), self.link.bulk.detach())
            pager.start(bulk=order.get("bulk") is not False, max_rate=_number(order, "max_rate"))
            tree.release()
            self.link.control.send(Running({"root_pid": tree.root_pid}))
            if sink is not None:  # not before: RUNNING is what the source waits for
                self.recorder = Recorder(pager, sink)
            self.listener(StateChanged("running", time.monotonic()))
            self._announce(flows_to_hold(checkpoint))
        return Arrived(tree, pager, POLICIES[str(order["policy"])])

    def drained(self, arrived: Arrived, timeout: float | None) -> bool:
        """Whether every page is here, after waiting for `timeout` seconds at most; then nothing of ours is left in
        the tree. Raises ConnectionLost with what is missing: who touches a missing page waits.
        """
        try:
            return self._drained(arrived, timeout)
        except (ConnectionLost, ProtocolError) as error:
            missing = arrived.pager.counters().remaining
            raise ConnectionLost(
                f"{error.what}; up to {missing} pages are missing, and who touches one of them waits",
                where=f"pid {arrived.tree.root_pid}",
                remedy="end the process with kill -9: its memory cannot be completed any more",
            ) from error

    def _drained(self, arrived: Arrived, timeout: float | None) -> bool:
        pager, control = arrived.pager, self.link.control
        deadline = None if timeout is None else time.monotonic() + timeout
        while not pager.wait(0):
            left = POLL_S if deadline is None else min(POLL_S, deadline - time.monotonic())
            if left <= 0:
                return False
            if pager.state is PagerState.LOST:
                raise ConnectionLost(pager.reason)
            event = control.receive(left)
            if event is not None:
                extents = extents_of(checked(event, Map, control))
                pager.plan(arrived.policy(extents))
                pager.apply_map(extents)
        self._say_drained(self._last_counters(pager), ended=not pager.spaces())
        finish(pager, arrived.tree)
        self.journal.remove()
        expect(control, Released, FREEZE_S)
        return True

    def _sink(self, order: Mapping[str, JsonValue]) -> Sink | None:
        if self.trace is not None:
            return self.trace.write
        control = self.link.control
        return (
            (lambda records, lost: control.send(Trace(records, lost))) if order.get("trace") is True else None
        )

    def _last_counters(self, pager: Pager) -> Counters:
        """The counters of the report. The trace that the source has asked for ends with the same fault."""
        if self.recorder is None or self.trace is not None:
            return pager.counters()
        self.recorder.stop()
        counters = pager.counters()
        self.recorder.drain(counters.fault_us.count)
        self.recorder = None
        return counters

    def _announce(self, flows: list[Flow]) -> None:
        try:
            announce_all(flows)
        except OSError as error:
            self.listener(Note(f"the moved addresses could not be announced: {error.strerror}"))

    def _refuse(self, error: LazyprocError | OSError) -> None:
        control = self.link.control
        try:
            if not isinstance(error, Unfit):
                control.send(Abort({"reason": str(error)}))
            elif control.peer_revision:
                control.send(obstacles_frame(error.obstacles))
            else:
                control.send(Abort({"reason": "; ".join(map(str, error.obstacles))}))
        except (ConnectionLost, ProtocolError):
            return  # the source has given up itself

    def _prepare(self) -> Mapping[str, JsonValue]:
        order, wanted = heard(self.link.control, PREPARE_S)
        terms = self.terms
        against = obstacles_here(
            order, wanted, pidns=terms.pidns, overcommit=terms.overcommit, cgroup=terms.cgroup
        )
        if obstacles := tuple(against):
            raise Unfit(obstacles)
        clock = Clock.now()
        if self.trace is not None:
            self.trace.begin(self.link.session.id, clock)
        traced = self.trace is None and order.get("trace") is True
        self.link.control.send(Prepared({"trace": asdict(clock)} if traced else {}))
        return order

    def _commit(self, tree: BuiltTree) -> None:
        """The one durable write that decides: from here on the tree is ours."""
        self.link.control.send(Built())
        expect(self.link.control, Commit, FREEZE_S)
        self.journal.write("committed", root_pid=tree.root_pid, root_vpid=tree.checkpoint.root.vpid)
        self.committed = True
        try:
            self.link.control.send(Committed())
        except (
            ConnectionLost
        ):  # it will not run here, and the source is stopped: the operator has the one there
            self.journal.remove()
            raise
        self.listener(StateChanged("committed", time.monotonic()))

    def _say_drained(self, counters: Counters, *, ended: bool) -> None:
        faults: dict[str, JsonValue] = asdict(counters.fault_us)
        names = ("total", "zero", "eager", "urgent", "bulk", "dropped")
        pages: dict[str, JsonValue] = {f"pages_{name}": getattr(counters, name) for name in names}
        self.report = {**pages, "fault_us": faults, "ended": ended}
        self.link.control.send(Drained(self.report))


def _outlived(tree: BuiltTree) -> None:
    """Until the end of a tree that ends before us; then its cgroup is empty."""
    os.waitpid(tree.nursery.pid, 0)
    remove(tree.groups)


def _number(fields: Mapping[str, JsonValue], name: str) -> int:
    value = fields.get(name, 0)
    if not isinstance(value, int):
        raise ProtocolError(f"PREPARE's {name} is no number")
    return value


def receive(
    address: str, terms: Terms, *, once: bool, allow_uids: frozenset[int], insecure: bool, listener: Listener
) -> int:
    """Take in trees at HOST:PORT until interrupted, or until one has come whole (`once`); how many committed.

    Raises UsageError for the address, CannotListen.
    """
    arrivals: list[tuple[Arrival, threading.Thread]] = []
    gathering = Gathering()
    with listen(address, Party.DESTINATION, trust=Trust(insecure, allow_uids), report=listener) as door:
        listener(Note(f"listening on port {door.port}"))
        with closing(gathering), _finishing(arrivals):
            while not (once and any(a.committed and not thread.is_alive() for a, thread in arrivals)):
                link = gathering.next(door, DOOR_S)
                if link is not None:
                    arrivals[:] = [(a, thread) for a, thread in arrivals if a.committed or thread.is_alive()]
                    arrival = Arrival(link, terms, listener)
                    name = f"session {link.session.id}"
                    arrivals.append((arrival, threading.Thread(target=arrival.run, name=name, daemon=True)))
                    arrivals[-1][1].start()
    return sum(arrival.committed for arrival, _ in arrivals)


@contextmanager
def _finishing(arrivals: Sequence[tuple[Arrival, threading.Thread]]) -> Iterator[None]:
    """An interrupt ends the receiver; trees that have committed get their pages first."""
    try:
        yield
    finally:
        with deaf():
            for arrival, thread in arrivals:
                if arrival.committed:
                    thread.join()


@contextmanager
def fetched(
    target: str, terms: Terms, *, insecure: bool, listener: Listener, trace: TraceFile | None
) -> Iterator[Arrival]:
    """An arrival from whoever serves a tree at `target`; the caller begins and drains it."""
    with (
        dialled(target, Party.DESTINATION, Trust(insecure)) as link,
        closing(Arrival(link, terms, listener, trace)) as arrival,
    ):
        yield arrival
