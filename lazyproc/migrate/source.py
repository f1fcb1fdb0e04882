"""The source's side of a migration, in order: prepare, freeze, hand over, commit, serve, release.

Until COMMIT is sent every failure ends with the tree running as if nothing had happened. Once COMMITTED has come
it never runs here again. In between is doubt: the tree stays stopped and the operator is told.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from threading import Event
from typing import Protocol

from lazyproc import events
from lazyproc.dump.before import Before, look_before, observed_sleeps
from lazyproc.dump.explain import examine
from lazyproc.dump.freeze import FrozenTree, frozen_tree
from lazyproc.dump.gather import Dump, dumped
from lazyproc.dump.park import park_tree, parking, unpark_tree
from lazyproc.dump.source import DumpPages, dump_pages
from lazyproc.dump.tcp import hang_up, silence
from lazyproc.dump.walk import tree_of
from lazyproc.errors import (
    CannotBeDone,
    ConnectionLost,
    LazyprocError,
    NoSuchProcess,
    Obstacle,
    Parked,
    UsageError,
)
from lazyproc.events import Listener, Over, StateChanged, ignore
from lazyproc.facts import asdict, dataclass
from lazyproc.kernel import netfilter
from lazyproc.kernel.deaf import deaf, ignore_interrupts
from lazyproc.kernel.fds import AMPLE, make_room
from lazyproc.kernel.netfilter import Hold
from lazyproc.migrate.agreeing import agreed
from lazyproc.migrate.apart import Client, Work, apart
from lazyproc.migrate.description import description
from lazyproc.migrate.desk import Desk
from lazyproc.migrate.held import Held, held_by
from lazyproc.migrate.holding import Holding, holding_of, to_facts
from lazyproc.migrate.journal import RELEASING, SOURCE, Journal, Record, find, records
from lazyproc.migrate.link import LAST_PAUSE_S, Chain, Gathering, Link, linked
from lazyproc.migrate.lost import source_ended
from lazyproc.migrate.releasing import Releaser
from lazyproc.migrate.report import MigrateReport
from lazyproc.migrate.serving import Serving, report_of
from lazyproc.migrate.talk import Refused, expect
from lazyproc.pages.frozen import FrozenPages
from lazyproc.pages.peer import Trust
from lazyproc.pages.server import PageServer
from lazyproc.pages.tls import Tls
from lazyproc.pages.transport import SCHEME, Channel, Door, Session, listen
from lazyproc.steps import Steps
from lazyproc.trace import TraceFile
from lazyproc.wire.native import Built, Commit, Images, Party

NAME = "lazyproc-source"
BUILD_S = 60.0
LOOKS = 3
LOOK_AGAIN_S = 0.02
FRESH_S = 0.5  # what was seen longer ago, before ssh had come through, is looked at again


@dataclass(frozen=True, slots=True)
class Order:
    """What the user asked for."""

    mode: str = "postcopy"  # or stopcopy
    policy: str | None = None  # of uffd.policy; None: sequential, for a guest pivots
    bulk: bool = True
    max_rate: int = 0  # bytes a second, 0 without limit
    tcp_close: bool = False  # TCP connections to others are given up
    release: bool = False  # memory here is freed as it is acknowledged

    def fields(self) -> dict[str, str | int | bool]:
        fields = {name: getattr(self, name) for name in self.__slots__}
        return {**fields, "policy": self.policy or "sequential"}


def migrate(
    pid: int,
    target: str,
    order: Order,
    *,
    insecure: bool,
    tls: Tls | None = None,
    listener: Listener,
    retry_for: float | None = None,
    trace: Path | str | None = None,
) -> MigrateReport:
    """Move the tree under `pid` to the receiver at `target` (HOST:PORT); returns when its memory has followed.

    With ssh://[USER@]HOST[:PORT] it is started there, through ssh(1); ssh://HOST/N names one on 127.0.0.1:N there.
    With `tls` both ends prove who they are, and nobody can listen; see lazyproc.Tls. The faults at the destination are
    written to `trace` (docs/trace.md). The work is done in a process that outlives this one; a lost connection is
    opened again for `retry_for` seconds (None: until it comes).

    Raises CannotBeDone (Unfit: by the other host), Refused, ConnectionLost, the dump's errors and LazyprocError
    (`trace` cannot be written) with the tree running as before; Parked when that is not known, or when it runs there
    and its memory has stopped following.
    """
    if order.release and order.mode != "postcopy":
        raise UsageError(f"nothing is released in mode {order.mode}", remedy="leave out --mode or --release")
    way = way_to(target, Trust(insecure, tls=tls))
    return moved(TreeMove(pid, order), way, listener=listener, retry_for=retry_for, trace=trace)


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


class TreeMove:
    """A process tree, by its root."""

    def __init__(self, pid: int, order: Order) -> None:
        """Raises CannotBeDone."""
        demand_apart(pid)
        self._pid = pid
        self._order = order
        self.facts = {"root_pid": pid, "mode": order.mode, "release": order.release}

    def look(self, listener: Listener) -> None:
        self._before = look(self._pid, listener, tcp_close=self._order.tcp_close)
        self._looked = time.monotonic()

    def hand_over(
        self, chain: Chain, journal: Journal, listener: Listener, trace: TraceFile | None
    ) -> MigrateReport:
        if time.monotonic() - self._looked > FRESH_S:
            self.look(listener)
        order, settle = self._order, ignore_interrupts
        return hand_over(self._pid, chain, self._before, order, journal, listener, trace=trace, settle=settle)


def moved(
    move: Move,
    way: Way,
    *,
    listener: Listener,
    retry_for: float | None = None,
    trace: Path | str | None = None,
    let_go: Callable[[], object] = lambda: None,
) -> MigrateReport:
    """The whole move, by processes that outlive this one; see `migrate`, and `apart` for `let_go`."""
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

    def again(client: Client) -> MigrateReport:
        with way.chain(None, retry_for, client) as chain:
            return go_on(find(session, SOURCE), chain, client.tell)

    return _apart(first, again, session, listener, let_go)


def _apart(
    first: Work[MigrateReport],
    again: Work[MigrateReport],
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
    except Parked:
        if reports and not any((each.session, each.role) == (session, SOURCE) for each in records()):
            return reports[-1]  # they were killed when nothing was left to do
        raise


def demand_apart(pid: int) -> None:
    """Raises CannotBeDone when this very process is in the tree: what does the work is not."""
    if os.getpid() in tree_of(pid):
        raise CannotBeDone(
            (Obstacle(os.getpid(), "process", "is lazyproc itself", "start lazyproc outside of the tree"),)
        )


def migrate_on(record: Record, *, retry_for: float | None, listener: Listener) -> MigrateReport:
    """Go on with a migration whose processes at the source are all gone; see `migrate`."""

    def again(client: Client) -> MigrateReport:
        with way_of(record, client.tell) as way, way.chain(None, retry_for, client) as chain:
            return go_on(find(record.session, SOURCE), chain, client.tell)

    return _apart(again, again, record.session, listener)


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


def look(pid: int, listener: Listener = ignore, *, tcp_close: bool = False) -> Before:
    """What is learned while the tree still runs. Raises CannotBeDone with all obstacles.

    What stands in the way may be over in a moment (a child before its exec, or that ends), so it is looked at again.
    """
    for attempt in range(LOOKS):
        examined = examine(pid, tcp_close=tcp_close, listener=ignore if attempt else listener)
        if not examined.obstacles:
            return look_before(examined, tcp_close=tcp_close)
        time.sleep(LOOK_AGAIN_S)
    raise CannotBeDone(examined.obstacles)


def hand_over(
    pid: int,
    chain: Chain,
    before: Before,
    order: Order,
    journal: Journal,
    listener: Listener,
    *,
    trace: TraceFile | None = None,
    settle: Callable[[], object] = lambda: None,
) -> MigrateReport:
    """The whole of it over connections that stand, see `migrate`. After `settle`, before COMMIT, none may interrupt."""
    control = chain.current.control
    reader = agreed(chain.session, control, before, order.fields(), trace, listener)
    make_room(AMPLE)
    listener(StateChanged("prepared", time.monotonic()))
    with ExitStack() as last, ExitStack() as stack:
        hold = stack.enter_context(Hold(chain.session))
        hold.add(before.flows)
        stack.callback(gc.enable)
        gc.disable()  # a collection takes as long as all the rest
        began, steps = time.time(), Steps()
        tree = stack.enter_context(frozen_tree(pid, asleep=observed_sleeps(pid), steps=steps))
        stack.callback(hold.release)  # before the tree is let go: its sends must not fail
        frozen_at = time.monotonic()
        dump, pages = stack.enter_context(_described(tree, before, hold, order.tcp_close, steps))
        whole = dump.checkpoint if order.mode == "postcopy" else dump.whole()
        control.send(Images(description(whole, pages, steps, reader)))
        steps.done("send")  # from here on the other side builds
        server = stack.enter_context(PageServer(pages.segments(), releasing=order.release))
        lazy = dump.lazy_extents if order.mode == "postcopy" else dict
        serving = Serving(chain, server, lazy, pid, listener, trace)
        serving.answer(chain.current)
        steps.done("serve")
        with parked_tree(tree, dump, hold, journal, began, steps) as (held, commit_sent):
            steps.done("park")
            listener(StateChanged("frozen", frozen_at))  # only now: who hears it takes a processor
            _await_built(control, dump, held, steps)
            settle()
            last.enter_context(deaf())  # until all is put away
            control.send(Commit())
            commit_sent.set()
            await_running(serving, journal, steps, listener)
            hang_up(dump.given_up)
            with _releaser(order.release, held, server, journal, listener, traced=True) as releaser:
                drained = serving.until_drained(releaser)
        report = report_of(journal.facts, drained, server, chain)
        _put_away(report, tree, dump, serving, journal, listener)
    return report


def _await_built(control: Channel, dump: Dump, held: Holding, steps: Steps) -> None:
    """The last moment in which it may be called off. Raises CannotBeDone, and what `expect` raises."""
    expect(control, Built, BUILD_S)
    steps.done("built")
    dump.demand_idle_rings()
    held.demand_there()
    steps.done("check")


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
    there = {"remote_pid": running.get("root_pid"), "steps_there_ms": running.get("steps_ms")}
    journal.note("running", listener, {**there, **figures}, durable=True)


def _put_away(
    report: MigrateReport,
    tree: FrozenTree,
    dump: Dump,
    serving: Serving,
    journal: Journal,
    listener: Listener,
) -> None:
    """Every page is there, and nothing of it is needed here."""
    journal.note(journal.facts["state"], listener, {"report": asdict(report)})
    silence(dump.connections)
    tree.kill()
    dump.remove_segments()
    serving.release()
    listener(Over(report))
    journal.remove()
    listener(StateChanged("released", time.monotonic()))


@contextmanager
def _described(
    tree: FrozenTree, before: Before, hold: Hold, tcp_close: bool, steps: Steps
) -> Iterator[tuple[Dump, DumpPages]]:
    with (
        dumped(tree, seen=before.seen, tcp_close=tcp_close, hold=hold.add, steps=steps) as dump,
        dump_pages(dump) as pages,
    ):
        yield dump, pages


@contextmanager
def parked_tree(
    tree: FrozenTree, dump: Dump, hold: Hold | None, journal: Journal, frozen_at: float, steps: Steps
) -> Iterator[tuple[Holding, Event]]:
    """Inside, no thread of the tree runs on, whatever becomes of us. It goes on here after an error before COMMIT was
    sent (the Event is set), and when the other side says no; after any other error it stays, since it may run there.
    """
    processes = parking(tree)
    held = holding_of(dump, processes)
    # For whoever comes after us. Not yet for a host without power: the tree goes with it, whatever the disk has.
    facts = {"held": to_facts(held), "root_vpid": dump.checkpoint.root.vpid, "frozen_at": frozen_at}
    journal.write("parked", durable=False, **facts)
    steps.done("journal")
    sent = Event()
    try:
        park_tree(tree, processes)
        if hold is not None:
            hold.keep()
        yield held, sent
    except BaseException as error:
        if sent.is_set() and not isinstance(error, Refused):
            if hold is not None:
                hold.forget()
            raise
        unpark_tree(tree, processes)
        journal.remove()
        raise


def _releaser(
    wanted: bool, held: Held, server: PageServer, journal: Journal, listener: Listener, *, traced: bool
) -> AbstractContextManager[Releaser | None]:
    if not wanted or not isinstance(held, Holding):
        return nullcontext()
    return Releaser(held, server, journal, listener, traced=traced)


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
    if held is None or (record.state == "parked" and not held.stands()):
        run_on(journal, held)
        raise LazyprocError(
            "the process that was moving it was killed; it runs here as before",
            where=f"pid {record.facts['root_pid']}",
        )
    journal.note(record.state, listener)
    release = record.facts.get("release") is True
    with deaf(), ExitStack() as stack:
        pages = stack.enter_context(_opened(held, record))
        server = stack.enter_context(PageServer(pages.segments(), releasing=release))
        releaser = stack.enter_context(_releaser(release, held, server, journal, listener, traced=False))
        if releaser is not None and record.state == RELEASING:
            releaser.take_over()
        serving = Serving(chain, server, held.extents, held.root_pid, listener)
        if record.state == "parked":  # not known yet who has it
            try:
                serving.until_committed()
            except Refused:
                run_on(journal, held)
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


def run_on(journal: Journal, held: Held | None) -> None:
    """Whatever of it is parked runs on here, and that is the end of the session."""
    if held is not None:
        held.let_run()
        netfilter.release_session(journal.session)
    journal.remove()


def end_here(journal: Journal, held: Held) -> None:
    """Every page is there, and nothing of it is needed here."""
    held.end()
    netfilter.release_session(journal.session)
    journal.remove()


def crew() -> dict[str, int]:
    """Who works on it, for `sessions` and `abort`."""
    return {"server_pid": os.getpid(), "keeper_pid": os.getppid()}
