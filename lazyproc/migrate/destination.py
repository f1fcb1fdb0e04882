"""The destination's side of a migration, in order: prepare, build, commit, run, drain."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from lazyproc.errors import ConnectionLost, LazyprocError, ProtocolError
from lazyproc.events import Listener, Note, StateChanged
from lazyproc.images.convert import from_images
from lazyproc.images.files import unpack
from lazyproc.migrate.journal import Journal
from lazyproc.migrate.prepare import Offer, available_memory, objections
from lazyproc.migrate.talk import checked, expect
from lazyproc.model import Extent, MemoryObject, ObjectKind
from lazyproc.pages.bundle import NAME, BundledPages
from lazyproc.pages.peer import Trust
from lazyproc.pages.remote import RemotePages
from lazyproc.pages.transport import Channel, Listener as Door
from lazyproc.pages.transport import Session, listen
from lazyproc.restore.lazy import finish, pager_of
from lazyproc.restore.run import Pidns, new_pidns
from lazyproc.restore.tree import BuiltTree, built_tree
from lazyproc.uffd.pager import Counters, Pager
from lazyproc.uffd.policy import POLICIES
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
    Prepare,
    Prepared,
    Released,
    Role,
    Running,
)

PREPARE_S = 60.0
FREEZE_S = 60.0
POLL_S = 0.02
DOOR_S = 0.2


@dataclass(frozen=True, slots=True)
class Terms:
    """On which terms trees are taken in."""

    pidns: Pidns
    overcommit: bool


@dataclass(slots=True)
class Arrival:
    """One migration on its way in; a thread of its own does all its work (ptrace calls have one tracer thread)."""

    session: Session
    control: Channel
    terms: Terms
    listener: Listener
    pages: queue.Queue[Channel] = field(default_factory=queue.Queue)
    committed: bool = False

    def run(self) -> None:
        """Never raises: what goes wrong before the commit is told to the source, and noted."""
        try:
            self._arrive()
        except LazyprocError as error:
            self.listener(Note(f"session {self.session.id}: {error}"))
            if not self.committed:
                self._abort(str(error))
        finally:
            self.control.close()

    def _abort(self, reason: str) -> None:
        try:
            self.control.send(Abort({"reason": reason}))
        except (ConnectionLost, ProtocolError):
            return  # the source has given up itself

    def _arrive(self) -> None:
        order = self._prepare()
        urgent, bulk = self._page_channels()
        with urgent, bulk:
            images = unpack(expect(self.control, Images, FREEZE_S).data)
            source = BundledPages(images.pop(NAME, b""), RemotePages(urgent, {}))
            checkpoint = from_images(images)
            lazy = order["mode"] == "postcopy"
            pidns = new_pidns(checkpoint, self.terms.pidns)
            with built_tree(checkpoint, source, self.listener, lazy=lazy, pidns=pidns) as tree:
                pager = pager_of(tree, trace=order.get("trace") is True)
                with pager:
                    self._commit(tree)
                    pager.serve_remote(urgent.detach(), bulk.detach())
                    pager.start(bulk=order.get("bulk") is not False, max_rate=_number(order, "max_rate"))
                    tree.release()
                    self.control.send(Running({"root_pid": tree.root_pid}))
                    self.listener(StateChanged("running", time.monotonic()))
                    ended = self._drain(pager, str(order.get("policy")))
                    self._report(pager.counters(), ended)
                    finish(pager, tree)
            threading.Thread(target=os.waitpid, args=(tree.nursery.pid, 0), daemon=True).start()
        expect(self.control, Released, FREEZE_S)

    def _prepare(self) -> Mapping[str, JsonValue]:
        fields = expect(self.control, Prepare, PREPARE_S).fields
        available = 1 << 62 if self.terms.overcommit else available_memory()
        against = objections(Offer.of(fields), available)
        if fields.get("policy") not in POLICIES or fields.get("mode") not in ("postcopy", "stopcopy"):
            against.append(f"policy {fields.get('policy')!r} or mode {fields.get('mode')!r} is not known here")
        if against:
            raise LazyprocError("; ".join(against))
        self.control.send(Prepared())
        return fields

    def _page_channels(self) -> tuple[Channel, Channel]:
        """The urgent and the bulk connection, which the source opened before it prepared."""
        found: dict[Role, Channel] = {}
        while len(found) < 2:
            try:
                channel = self.pages.get(timeout=PREPARE_S)
            except queue.Empty:
                raise ConnectionLost("the page connections did not come", where=self.control.peer) from None
            assert channel.hello is not None
            found[channel.hello.role] = channel
        return found[Role.URGENT], found[Role.BULK]

    def _commit(self, tree: BuiltTree) -> None:
        """The one durable write that decides: from here on the tree is ours."""
        self.control.send(Built())
        expect(self.control, Commit, FREEZE_S)
        journal = Journal(self.session.id, "destination")
        journal.write("committed", root_pid=tree.root_pid, root_vpid=tree.checkpoint.root.vpid)
        self.committed = True
        self.control.send(Committed())
        self.listener(StateChanged("committed", time.monotonic()))

    def _drain(self, pager: Pager, policy: str) -> bool:
        """Until every page is here; True when the tree came to its own end before."""
        while True:
            event = self.control.receive(POLL_S)
            if event is not None:
                extents = _extents(checked(event, Map, self.control))
                pager.plan(POLICIES[policy](extents))
                pager.apply_map(extents)
            self.listener(pager.counters().as_event())
            if pager.wait(0):
                return not pager.spaces()

    def _report(self, counters: Counters, ended: bool) -> None:
        faults = counters.fault_us._asdict()
        names = ("total", "zero", "eager", "urgent", "bulk", "dropped")
        pages: dict[str, JsonValue] = {f"pages_{name}": getattr(counters, name) for name in names}
        self.control.send(Drained({**pages, "fault_us": faults, "ended": ended}))


def _number(fields: Mapping[str, JsonValue], name: str) -> int:
    value = fields.get(name, 0)
    if not isinstance(value, int):
        raise ProtocolError(f"PREPARE's {name} is no number")
    return value


def _extents(event: Map) -> dict[MemoryObject, tuple[Extent, ...]]:
    found: dict[MemoryObject, list[Extent]] = {}
    for entry in event.entries:
        obj = MemoryObject(ObjectKind(entry.object & 0xFF), entry.object >> 8)
        found.setdefault(obj, []).append(Extent(entry.addr, entry.pages, lazy=True))
    return {obj: tuple(extents) for obj, extents in found.items()}


def receive(
    address: str, terms: Terms, *, once: bool, allow_uids: frozenset[int], insecure: bool, listener: Listener
) -> int:
    """Take in trees at HOST:PORT until interrupted, or until one has come whole (`once`); how many committed.

    Raises UsageError for the address, CannotListen.
    """
    arrivals: dict[str, tuple[Arrival, threading.Thread]] = {}
    with listen(address, Party.DESTINATION, trust=Trust(insecure, allow_uids), report=listener) as door:
        listener(Note(f"listening on port {door.port}"))
        with _finishing(arrivals):
            while not (once and _whole(arrivals)):
                _let_in(door, arrivals, terms, listener)
    return sum(arrival.committed for arrival, _ in arrivals.values())


def _whole(arrivals: Mapping[str, tuple[Arrival, threading.Thread]]) -> bool:
    return any(arrival.committed and not thread.is_alive() for arrival, thread in arrivals.values())


@contextmanager
def _finishing(arrivals: Mapping[str, tuple[Arrival, threading.Thread]]) -> Iterator[None]:
    """An interrupt ends the receiver; trees that have committed get their pages first."""
    try:
        yield
    finally:
        for arrival, thread in arrivals.values():
            if arrival.committed:
                thread.join()


def _let_in(
    door: Door, arrivals: dict[str, tuple[Arrival, threading.Thread]], terms: Terms, listener: Listener
) -> None:
    channel = door.accept(DOOR_S)
    if channel is None or channel.hello is None:
        return
    hello = channel.hello
    known = arrivals.get(hello.session)
    if known is None and hello.role is Role.CONTROL:
        arrival = Arrival(Session(hello.session, hello.token), channel, terms, listener)
        thread = threading.Thread(target=arrival.run, name=f"session {hello.session}", daemon=True)
        arrivals[hello.session] = arrival, thread
        channel.welcome()
        thread.start()
    elif known is not None and known[0].session.owns(hello) and hello.role is not Role.CONTROL:
        channel.welcome()
        known[0].pages.put(channel)
    else:
        channel.refuse("no such session here")
