"""`dump --lazy-pages`: the images of a frozen tree lie in a folder, and its pages are given to CRIU's client, as CRIU's
own dump does: explain, freeze, write, listen, park, give, end.

CRIU's protocol has no word for a hand-over, so the first page that is given is one. Before it nothing is decided, and
whatever goes wrong lets the tree run on; after it the tree may run elsewhere, and never runs here by itself.
"""

from __future__ import annotations

import gc
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

from lazyproc.dump.apart import demand_apart
from lazyproc.dump.checkpoint import CheckpointReport, Written, written
from lazyproc.dump.explain import examine_again
from lazyproc.dump.freeze import FrozenTree
from lazyproc.dump.permits import Permits
from lazyproc.errors import ConnectionLost, LazyprocError, NoSuchProcess, Parked
from lazyproc.events import Listener, Note, StateChanged
from lazyproc.facts import asdict, dataclass
from lazyproc.images.draft import filled
from lazyproc.images.files import Folder
from lazyproc.kernel import proc
from lazyproc.kernel.deaf import deaf, ignore_interrupts
from lazyproc.kernel.netfilter import DUMPED, Hold
from lazyproc.migrate.apart import Client, apart, crew
from lazyproc.migrate.desk import Desk
from lazyproc.migrate.going_on import end_here, run_on
from lazyproc.migrate.holding import Holding, from_facts
from lazyproc.migrate.journal import SOURCE, Journal, find
from lazyproc.migrate.lost import source_ended
from lazyproc.migrate.parking import parked_tree
from lazyproc.model import Checkpoint, Extent, MemoryObject
from lazyproc.pages.criu_server import Given, Shelf, answer
from lazyproc.pages.door import Door, listen
from lazyproc.pages.peer import Trust
from lazyproc.pages.session import Session
from lazyproc.pages.storing import as_criu_marks, without_lazy
from lazyproc.pages.tls import Tls
from lazyproc.steps import Steps
from lazyproc.wire.criu import ENOUGH
from lazyproc.wire.native import Party

NAME = "lazyproc-dump"
LISTENING = "listening"
WRITING = "writing"  # in the record: the folder had no images, those that it has are ours
GIVEN = "given"  # in the record: the next thing is a page on its way
DOOR_S = 0.2
LOOK_S = 1.0  # how often a frozen tree is looked after


@dataclass(frozen=True, slots=True)
class LazyDump:
    """What the user asked for; see `checkpoint`, and `serve` for the last three."""

    pid: int
    directory: Path
    tcp_close: bool
    keep_connections: bool
    permits: Permits
    timeout_ms: int
    address: str
    insecure: bool
    tls: Tls | None = None


def dump_lazily(
    order: LazyDump, *, last: Callable[[], object], alone: Callable[[], object], listener: Listener
) -> CheckpointReport:
    """The tree is written but for its lazy pages, which one client gets. Returns when that has all of them and has said
    so; then the tree has ended here. The state `listening` tells that clients may come.

    The work is done in processes that outlive this one, `last` too (see `checkpoint`); `alone` closes there what is to
    end with this one. Raises what `checkpoint` and `listen` raise with the tree running as before and no image left;
    Parked when the client has ended without all the pages: the tree is in `sessions` then.
    """
    demand_apart(order.pid)
    session = Session.new().id

    def first(client: Client) -> CheckpointReport:
        client.stop_without_it()
        journal = Journal(session, SOURCE, {"dumped": str(order.directory.absolute())})
        with ExitStack() as stack:
            stack.callback(journal.remove_if, "preparing")
            begun = {"root_pid": order.pid, "peer": order.address, "started": time.time()}
            journal.write("preparing", durable=False, **begun, **crew())
            return _dump(order, journal, last, client.tell)

    def staff() -> Desk:
        alone()
        return Desk(session, SOURCE)

    lost = f"see lazyproc sessions, and {_remedy(session)}"
    return apart(first, lambda: partial(_again, session), listener, NAME, staff=staff, lost=lost)


def _dump(
    order: LazyDump, journal: Journal, last: Callable[[], object], listener: Listener
) -> CheckpointReport:
    started, began = time.monotonic(), time.time()
    examine_again(order.pid, tcp_close=order.tcp_close, permits=order.permits, listener=listener)
    with ExitStack() as over, ExitStack() as unfinished:
        draft = unfinished.enter_context(filled(Folder(order.directory), early=True))
        journal.write("preparing", durable=False, **{WRITING: True})
        with written(
            order.pid,
            draft,
            without_lazy,
            hold=Hold(DUMPED + journal.session) if order.keep_connections else None,
            tcp_close=order.tcp_close,
            permits=order.permits,
            timeout_ms=order.timeout_ms,
            listener=listener,
        ) as it:
            last()
            with _clients(order, it, listener) as clients:
                listener(StateChanged(LISTENING, time.monotonic()))
                _await_first(clients, it.tree)
                with parked_tree(it.tree, it.dump, it.hold, journal, began, Steps()) as standing:
                    held = standing.held
                    held.demand_there()
                    ignore_interrupts()
                    over.enter_context(deaf())
                    journal.write("parked", durable=False, **{GIVEN: True})
                    unfinished.close()  # the images are somebody's from here on
                    standing.committing = True
                    _give_all(clients, held, journal, listener)
                    report = it.report(started, time.monotonic())
                    journal.note("parked", listener, {"report": asdict(report)})
                    it.end()
    journal.remove()
    return report


def _await_first(clients: Clients, tree: FrozenTree) -> None:
    """Raises NoSuchProcess when somebody kills what stands still: it is whole or nobody gets it."""
    while not clients.await_first(LOOK_S):
        for task in tree.tasks.values():
            if not (task.zombie or proc.lives(task.pid, task.stat.start_time)):
                raise NoSuchProcess("was killed while it stood still", where=f"pid {task.pid}")


def _give_all(clients: Clients, held: Holding, journal: Journal, listener: Listener) -> None:
    """Raises Parked when the client ends without all the pages, LostAfterCommit when they are gone."""
    gc.enable()  # the tree runs elsewhere
    clients.begin_to_give()
    while not clients.await_end(LOOK_S):
        _demand_there(held, journal)
    if (why := clients.failure()) is not None:
        _demand_there(held, journal)
        journal.note("parked", listener, {"reason": why})
        raise _parked(journal.session, why)


def _demand_there(held: Holding, journal: Journal) -> None:
    if (pid := held.ended()) is not None:
        raise source_ended(pid, journal.session)


def _again(session: str, _: Client) -> CheckpointReport:
    """In place of a process that was killed: its client has gone with it, and none may come after that."""
    record = find(session, SOURCE)
    journal = Journal(session, SOURCE, record.facts)
    held = from_facts(record.facts["held"]) if "held" in record.facts else None
    if held is not None and "report" in record.facts:
        end_here(journal, held)
        return CheckpointReport(**record.facts["report"])
    if held is not None and GIVEN in record.facts:
        _demand_there(held, journal)
        raise _parked(session, "the process that gave its pages was killed")
    run_on(journal, held)
    if WRITING in record.facts:
        images = Folder(Path(record.facts["dumped"]))
        for name in images.images():  # nobody has their pages
            images.remove(name)
    raise LazyprocError(
        "the process that was dumping it was killed; it runs as before",
        where=f"pid {record.facts['root_pid']}",
    )


def _parked(session: str, why: str) -> Parked:
    return Parked(
        f"{why}; its process may run elsewhere, and is parked here",
        where=f"session {session}",
        remedy=f"when it does not, {_remedy(session)}",
    )


def _remedy(session: str) -> str:
    return f"let it run here with lazyproc resume {session} --here --force, or end it with lazyproc abort {session}"


# --- who asks ---------------------------------------------------------------------------------------------------


@contextmanager
def _clients(order: LazyDump, it: Written, listener: Listener) -> Iterator[Clients]:
    """Inside, whoever is trusted may ask."""
    clients = Clients(Shelf(it.pages, _lazy(it.whole)), listener)
    trust = Trust(order.insecure, tls=order.tls)
    door = listen(order.address, Party.SOURCE, trust=trust, report=listener, criu=clients.begin)
    with clients.let_in_by(door):
        yield clients


def _lazy(whole: Checkpoint) -> Mapping[MemoryObject, Sequence[Extent]]:
    """As the images have it."""
    marked = as_criu_marks(whole).memory
    return {obj: [extent for extent in extents if extent.lazy] for obj, extents in marked.items()}


class Clients:
    """Anybody may ask, and the first one who gets a page is the only one who gets any: he may run the tree.

    Each has a thread. The one that traces the tree waits in `await_first`, parks it, and says so by `begin_to_give`.
    """

    def __init__(self, shelf: Shelf, listener: Listener) -> None:
        self._shelf = shelf
        self._listener = listener
        self._given = Given(shelf)
        self._choice = threading.Lock()
        self._only: socket.socket | None = None
        self._chosen, self._granted, self._ended = (threading.Event() for _ in range(3))
        self._error: LazyprocError | None = None
        self._enough = False

    @contextmanager
    def let_in_by(self, door: Door) -> Iterator[None]:
        """Until one is chosen; then it is closed."""
        closing = threading.Event()

        def let_in() -> None:
            with door:
                while not (closing.is_set() or self._chosen.is_set()):
                    if (channel := door.accept(DOOR_S)) is not None:
                        with suppress(LazyprocError):
                            channel.refuse("pages are given by CRIU's protocol here")

        thread = threading.Thread(target=let_in, daemon=True)
        thread.start()
        try:
            yield
        finally:
            closing.set()
            thread.join()

    def begin(self, sock: socket.socket, where: str) -> None:
        """A Caller."""
        threading.Thread(target=self._serve, args=(sock, where), daemon=True).start()

    def await_first(self, seconds: float) -> bool:
        """Whether somebody wants a page by then; he waits for it."""
        return self._chosen.wait(seconds)

    def begin_to_give(self) -> None:
        """He gets what he asks for."""
        self._granted.set()

    def await_end(self, seconds: float) -> bool:
        """Whether he has ended by then."""
        return self._ended.wait(seconds)

    def failure(self) -> str | None:
        """Why he has ended without all the pages, if so."""
        if self._enough:
            return None
        missing = f"CRIU's client has closed its connection without {self._given.missing} pages"
        return missing if self._error is None else str(self._error)

    def _serve(self, sock: socket.socket, where: str) -> None:
        error: LazyprocError | None = None
        with sock:
            try:
                closed = answer(sock, where, self._shelf, partial(self._give, sock, where))
                if closed is None:
                    error = ConnectionLost("CRIU's client is gone without a word", where=where)
                elif (closed == ENOUGH or not self._given.missing) and self._choose(sock):
                    self._enough = True  # maybe without a page
            except LazyprocError as caught:
                error = caught
        if self._only is sock:
            self._error = error
            self._ended.set()
        elif error is not None:
            self._listener(Note(f"ended a connection: {error}"))

    def _give(self, sock: socket.socket, where: str, vpid: int, addr: int, count: int) -> None:
        """Told before pages are sent. Raises ConnectionLost when another one gets them."""
        if not self._choose(sock):
            raise ConnectionLost("another client gets the pages, and only one may", where=where)
        self._granted.wait()
        self._given.add(vpid, addr, count)

    def _choose(self, sock: socket.socket) -> bool:
        with self._choice:
            self._only = self._only or sock
            self._chosen.set()
            return self._only is sock
