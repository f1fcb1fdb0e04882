"""The destination's keeper of one session: from its first link to the last page, whoever is killed meanwhile.

Three processes with one descriptor table: the keeper, who built the tree; the pager; and a guard, which becomes the
keeper when that is killed. A pager or guard that is killed is replaced. When all are killed at once the tree waits, by
the anchors in its own descriptor tables, for `lazyproc resume`.
"""

from __future__ import annotations

import mmap
import os
import pickle
import signal
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Protocol

from lazyproc.errors import CannotListen, ConnectionLost, LazyprocError, Parked, ProtocolError, UsageError
from lazyproc.events import Event, Listener, Note
from lazyproc.facts import dataclass
from lazyproc.kernel import family
from lazyproc.kernel.deaf import ignore_interrupts
from lazyproc.kernel.ready import readable
from lazyproc.kernel.sys import pidfd_open
from lazyproc.migrate.anchors import anchors
from lazyproc.migrate.apart import MESSAGE_MAX, Client, Messages, result, stream, unplug
from lazyproc.migrate.arrival import Arrival, Terms, Wishes
from lazyproc.migrate.desk import Desk, Request, ask
from lazyproc.migrate.drain import Drain
from lazyproc.migrate.journal import DESTINATION, Journal, Record
from lazyproc.migrate.link import Gathering, Link, Redial
from lazyproc.migrate.supply import Supply, image_pages
from lazyproc.pages.peer import Trust
from lazyproc.pages.transport import Channel, Declined, Door, Session, listen
from lazyproc.restore.ending import end_tree
from lazyproc.restore.lazy import note_removals
from lazyproc.restore.lazytree import from_facts
from lazyproc.uffd.pager import Pager, rebind
from lazyproc.uffd.policy import POLICIES
from lazyproc.wire.native import Hello, Party, Role

NAME = "lazyproc-keeper"
WATCH_S = 0.5
STEP_S = 0.02
RELEASE_S = 60.0  # the tree is complete: how long the source is waited for, to be told so
LIVING = ("running", "drained", "poisoned")
MEMBERS = 100  # helpers that are killed so often are killed on purpose


class Closable(Protocol):
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Place:
    """Where the source can reach this host again, and who is let in there; with `dials` where it is reached from here.
    "" when there is no source, but images.
    """

    address: str
    trust: Trust
    dials: bool = False

    def facts(self) -> dict[str, object]:
        """For the journal."""
        return {"address": self.address, "dials": self.dials, **self.trust.facts()}

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Place:
        return cls(str(facts["address"]), Trust.of(facts), bool(facts.get("dials")))


def keep(link: Link, terms: Terms, place: Place, not_ours: Sequence[Closable]) -> Messages:
    """Start the keeper of a session whose connections stand; what it tells. `not_ours` are closed in it.

    For the caller the link is over.
    """
    ours, theirs = stream()

    def run() -> None:
        ours.close()
        for each in not_ours:
            each.close()
        unplug()
        facts = {"token": link.session.token, "peer": link.control.peer, **place.facts()}
        journal = Journal(link.session.id, DESTINATION, facts)
        Keeper(link.session, journal, place, Client(theirs)).take_in(link, terms)

    with theirs:
        family.daemon(run, NAME)
    return Messages(ours)


def keep_on(record: Record, supply: Supply, listener: Listener) -> Mapping[str, object]:
    """A new keeper for a tree whose helpers are all gone; the report when it is complete. See `sessions.resume`.

    `supply` in place of the source, if it is any. Raises LostAfterCommit when the tree is gone, too; Parked when the
    keeper is gone.
    """
    ours, theirs = stream()
    tree = from_facts(record.facts["tree"])

    def run() -> None:
        ours.close()
        unplug()
        client = Client(theirs)
        try:
            ledger, userfaultfds = anchors(tree.tasks)
            rebind(ledger, userfaultfds)
            facts = {**record.facts, "ledger": ledger, "connections": [], "supply": supply.facts()}
            journal = Journal(record.session, DESTINATION, facts)
            journal.write(record.state, durable=False)
            session = Session(record.session, str(record.facts["token"]))
            keeper = Keeper(session, journal, Place.of(record.facts), client)
        except (LazyprocError, OSError) as error:
            client.failed(error)
            return
        keeper.go_on()

    with ours:
        with theirs:
            family.daemon(run, NAME)
        return _awaited(ours, record, listener)


def supply_to(record: Record, supply: Supply, listener: Listener) -> Mapping[str, object]:
    """The keeper of a session goes on with `supply` in place of the source; the report when its memory is complete.

    Raises UsageError when there is none any more, Parked when `supply` lacks pages.
    """
    ours, theirs = stream()
    with ours:
        with theirs:
            answer = ask(record.session, DESTINATION, {"do": "supply", **supply.facts()}, theirs.fileno())
        if answer is None or "error" in answer:
            raise UsageError("its keeper does not answer", where=record.session, remedy="try again")
        return _awaited(ours, record, listener)


def _awaited(stream: socket.socket, record: Record, listener: Listener) -> Mapping[str, object]:
    lost = f"see lazyproc sessions, and lazyproc resume {record.session}"
    report: Mapping[str, object] = result(stream, listener, lost=lost)
    return report


class Member:
    """A process of the crew, whoever its parent is."""

    def __init__(self, pid: int, pidfd: int = -1) -> None:
        """`pidfd` when another process of the crew has it open already."""
        self.pid = pid
        self.pidfd = pidfd_open(pid) if pidfd < 0 else pidfd

    def alive(self) -> bool:
        return not readable([self.pidfd], 0)

    def end(self) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        self.forget()

    def forget(self) -> None:
        with suppress(ChildProcessError):
            os.waitpid(self.pid, os.WNOHANG)
        os.close(self.pidfd)


class Keeper:
    """Everything here is known to the guard as well, since that is a fork: it goes on with the same descriptors."""

    def __init__(self, session: Session, journal: Journal, place: Place, client: Client) -> None:
        self._session = session
        self._journal = journal
        self._place = place
        self._client = client
        self._asker: Client | None = None  # who has given a supply and waits for what comes of it
        self._desk = Desk(session.id, DESTINATION)
        self._door: Door | None = None
        self._gathering = Gathering(session)
        self._near, self._far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # keeper, pager
        self._connections: list[socket.socket] = []  # of the newest link; the pager has duplicates of its own
        self._committed = False
        self._look_at = 0.0  # when the pager looks next whether it is alone
        self._resumed = False  # the client is no `receive`
        self._left = MEMBERS
        self._outlived = mmap.mmap(-1, 1)  # shared with the guard: the tree no longer ends with its tracer
        self._keeper = Member(os.getpid())

    # --- the keeper ---

    def take_in(self, link: Link, terms: Terms) -> None:
        """A new session, from PREPARE to the last page."""
        self._connections = link.sockets
        tables = Pager()  # its threads run in the pager; here its tables are filled
        self._pager = self._new_pager()
        self._guard = self._new_guard()
        arrival = Arrival(
            link,
            terms,
            self._journal,
            self._client.tell,
            settle=ignore_interrupts,
            outlived=self._note_outlived,
        )

        def serve() -> None:
            say(self._near, "serve", None)
            say(self._near, "take", [each.fileno() for each in self._connections])

        try:
            self._client.stop_without_it()
            arrival.begin(tables, serve)
        except (LazyprocError, OSError, KeyboardInterrupt) as error:
            self._client.failed(LazyprocError(f"session {self._session.id}: {error}"))
            if not arrival.committed:
                if arrival.described:  # a source in doubt will ask
                    self._journal.note("aborted", self._tell, {"reason": str(error)}, durable=True)
                self._dismiss()
                return
        self._committed = True
        self._watch()

    def _note_outlived(self) -> None:
        self._outlived[0] = 1

    def go_on(self) -> None:
        """A session that was handed over; the ledger and the userfaultfds are in our table again."""
        ignore_interrupts()
        self._committed = self._resumed = True
        self._note_outlived()
        self._pager = self._new_pager()
        self._guard = self._new_guard()
        self._watch()

    def _watch(self) -> None:
        """Until the pager says that it has done everything."""
        self._note_crew()
        while True:
            watched = [self._near.fileno(), self._desk.fileno(), self._pager.pidfd, self._guard.pidfd]
            watched += [self._door.fileno()] if self._door else []
            ready = readable(watched, WATCH_S)
            alive = self._pager.alive()  # what it said before its end is there by now
            if self._heard_the_end():
                break
            if not alive:
                self._replace_pager()
            if not self._guard.alive():
                self._count_killed()
                self._guard.forget()
                self._guard = self._new_guard()
                self._note_crew()
            if self._desk.fileno() in ready and (request := self._desk.next()) is not None:
                self._serve(request)
            self._attend_door()
        self._dismiss()

    def _heard_the_end(self) -> bool:
        """Whether the pager has said that there is nothing left to do. What it says is for the journal."""
        for kind, facts in heard(self._near):
            self._note(facts)
            if kind == "over":
                return True
        return False

    def _note(self, facts: dict[str, Any]) -> None:
        """In the journal, for whoever looks; without `facts` nobody has to know of the session any more."""
        self._journal.reload()
        if not facts:
            self._journal.remove()
        elif self._journal.facts:
            state = str(facts.pop("state", self._journal.facts["state"]))
            self._journal.note(state, self._tell, facts, durable="report" in facts)

    def _replace_pager(self) -> None:
        """What was under way to a dead pager is asked for again, over a new link: the old one is out of step."""
        self._client.tell(Note(f"session {self._session.id}: the pager was killed and is replaced"))
        self._count_killed()
        self._pager.forget()
        self._drop_connections()
        self._pager = self._new_pager()
        self._note_crew()

    def _new_pager(self) -> Member:
        return Member(family.child_sharing_descriptors(self._be_pager, "lazyproc-pager"))

    def _new_guard(self) -> Member:
        return Member(family.child_sharing_descriptors(self._be_guard, "lazyproc-guard"))

    def _count_killed(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise LazyprocError("its helpers are killed again and again", where=f"session {self._session.id}")

    def _note_crew(self) -> None:
        """For `sessions`, and for the guard: descriptors are the same there."""
        self._journal.reload()
        if not self._journal.facts:
            return  # the pager has just done everything, and will say so
        crew = {
            "keeper_pid": os.getpid(),
            "pager_pid": self._pager.pid,
            "pager_pidfd": self._pager.pidfd,
            "guard_pid": self._guard.pid,
            "connections": [each.fileno() for each in self._connections],
        }
        self._journal.note(str(self._journal.facts["state"]), self._tell, crew)

    def _dismiss(self) -> None:
        self._guard.end()
        self._pager.end()

    # --- links ---

    def _serve(self, request: Request) -> None:
        """What another command of this host asks; whatever else is put on the desk changes nothing."""
        if request.fields.get("do") == "supply":
            self._supplied(request)
            return
        try:
            channel = _brought(request)
        except (KeyError, TypeError, ValueError, OSError, ProtocolError) as error:
            request.answer({"error": f"not understood: {error!r:.200}"})
            return
        request.answer({})
        self._take(channel)

    def _attend_door(self) -> None:
        """While `receive` is there it hands connections on; without it we wait for them ourselves."""
        if self._place.dials or not self._place.address:
            return
        if self._door is None and (self._resumed or not self._client.listens()):
            with suppress(CannotListen, UsageError):  # of files for TLS that are being renewed
                self._door = listen(self._place.address, Party.DESTINATION, trust=self._place.trust)
        if self._door is not None and (channel := self._door.accept(0)) is not None:
            self._take(channel)

    def _take(self, channel: Channel) -> None:
        try:
            link = self._gathering.add(channel)
        except (ConnectionLost, ProtocolError):
            return
        if link is not None:
            self._drop_connections()
            self._connections = link.sockets
            self._note_crew()
            say(self._near, "link", [each.fileno() for each in self._connections])

    def _drop_connections(self) -> None:
        """A duplicate that a dead pager has left in our table must not keep them open."""
        for each in self._connections:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self._connections = []

    def _supplied(self, request: Request) -> None:
        """Pages come from elsewhere from now on. A forked child has no anchor, so one of us always lives meanwhile."""
        try:
            asker = Client(request.take_socket())
        except (OSError, ValueError) as error:
            request.answer({"error": f"not understood: {error!r:.200}"})
            return
        request.answer({})
        if self._asker is not None:
            self._asker.close()
        self._asker = asker
        self._journal.reload()
        state, supply = str(self._journal.facts["state"]), Supply.of(request.fields)
        self._journal.note(state, self._tell, {"supply": supply.facts()})
        self._guard.end()
        self._guard = self._new_guard()  # one that knows who asks
        self._pager.end()
        self._drop_connections()
        self._pager = self._new_pager()
        self._note_crew()

    # --- the guard ---

    def _be_guard(self) -> None:
        """Do nothing until the keeper is dead, then be it."""
        begun = self._journal.facts
        readable([self._keeper.pidfd])
        self._journal.reload()
        facts = self._journal.facts
        if self._outlived[0] and not facts:
            return  # it is over: the pager has removed the record
        if facts.get("state") not in LIVING or not self._outlived[0]:
            self._journal.facts = begun | facts
            self._take_back()
            return
        self._committed = True
        self._keeper = Member(os.getpid())
        if "pager_pid" in facts:  # otherwise it is the first one still, whom we know
            self._pager = Member(int(facts["pager_pid"]), int(facts["pager_pidfd"]))
            self._connections = [socket.socket(fileno=fd) for fd in facts["connections"]]
        else:  # and nobody knows what the source has been told
            self._drop_connections()
        self._count_killed()
        self._guard = self._new_guard()
        self._client.tell(Note(f"session {self._session.id}: the keeper was killed and is replaced"))
        self._watch()

    def _take_back(self) -> None:
        """The keeper died before the commit, or before its first word of it, and with it the tree, which has not run.
        It never will, and a source in doubt learns so when it asks.
        """
        if "tree" in self._journal.facts:
            end_tree(from_facts(self._journal.facts["tree"]))
        reason = "the keeper was killed before the tree ran"
        self._journal.note("aborted", self._tell, {"reason": reason}, durable=True)

    # --- the pager ---

    def _be_pager(self) -> None:
        """The first one is there before the tree is, and waits for it."""
        if not self._committed and not self._awaits_the_commit():
            return
        self._journal.reload()
        facts = self._journal.facts
        wishes = Wishes.of(facts["wishes"])
        with ExitStack() as stack:
            pager = stack.enter_context(Pager(ledger=int(facts["ledger"]), trace=wishes.traced))
            lost = facts["state"] == "poisoned"  # it is not over then
            tree, policy = from_facts(facts["tree"]), POLICIES[wishes.policy]
            if self._committed:
                note_removals(pager, tree)
            drain = Drain(pager, tree, policy, self._tell, None if lost else facts.get("report"))
            if wishes.traced:
                drain.record()
            if wishes.release:
                drain.acknowledge()
            alone = self._goes_alone(drain, Supply.of(facts.get("supply") or {}), stack)
            pager.start(bulk=wishes.bulk or alone, max_rate=0 if alone else wishes.max_rate)
            self._drain(drain)

    def _goes_alone(self, drain: Drain, supply: Supply, stack: ExitStack) -> bool:
        """Images that are no longer what they were when they were named leave everything as it was."""
        if not supply:
            return False
        try:
            images = stack.enter_context(image_pages(Path(supply.images))) if supply.images else None
            drain.go_alone(images, poison=supply.poison)
        except (LazyprocError, OSError) as error:
            self._failed(error)
            self._have_noted({"supply": {}})
            return False
        return True

    def _awaits_the_commit(self) -> bool:
        while self._keeper.alive():
            if any(kind == "serve" for kind, _ in heard(self._far, WATCH_S, 1)):
                return True
        return False

    def _drain(self, drain: Drain) -> None:
        """To the end, whoever else is alive by then."""
        until, told, facts = None, False, self._journal.facts
        reason = facts.get("reason", "")
        redial = None
        if self._place.dials and not drain.alone:
            redial = Redial(self._place.address, self._place.trust, self._session, self._tell)
        while not drain.over and (until is None or drain.stays or time.monotonic() < until):
            for kind, fds in heard(self._far, 0 if drain.linked else STEP_S):
                link = self._duplicated(fds)
                drain.take(link) if kind == "take" else drain.attach(link)
            if redial is not None and not drain.linked:
                with suppress(Declined):  # it may know the session again when it is resumed there
                    if (called := redial.link()) is not None:
                        drain.attach(called)
            drain.step(STEP_S if drain.linked else 0)
            if redial is None and not (drain.linked or drain.alone or drain.report) and self._is_alone():
                return
            if drain.report is not None and until is None:
                until = time.monotonic() + RELEASE_S
                state = "poisoned" if drain.stays else "drained"
                self._have_noted({"state": state, "report": drain.report})
                if drain.stays:
                    self._done(drain)
            elif drain.reason != reason:
                reason = drain.reason
                self._have_noted({"reason": reason})
            if not told and (pages := drain.lacking):
                told = True
                self._failed(self._lacking(pages))
        self._done(drain)
        nobody_asks = drain.released or not self._place.address
        facts = {} if nobody_asks else {"state": "drained", "report": drain.report}
        say(self._far, "over", facts)
        while self._is_kept():  # then it dismisses us
            time.sleep(STEP_S)
        self._note(facts)

    def _have_noted(self, facts: dict[str, Any]) -> None:
        """By the keeper: a journal has one writer. By ourselves when he and the guard are dead."""
        if self._is_kept():
            say(self._far, "note", facts)
        else:
            self._note(facts)

    def _is_kept(self) -> bool:
        self._journal.reload()
        for name in ("keeper_pid", "guard_pid"):
            with suppress(OSError):
                fd = pidfd_open(int(self._journal.facts.get(name) or 0))
                dead = readable([fd], 0)
                os.close(fd)
                if not dead:
                    return True
        return False

    def _lacking(self, pages: int) -> Parked:
        """It stays as it was."""
        return Parked(
            f"the images lack {pages} of the missing pages, which are waited for",
            where=f"session {self._session.id}",
            remedy="name other images, wait for the source, or give them up with --poison",
        )

    def _tell(self, event: Event) -> None:
        for each in self._waiting():
            each.tell(event)

    def _failed(self, error: BaseException) -> None:
        for each in self._waiting():
            each.failed(error)

    def _done(self, drain: Drain) -> None:
        for each in self._waiting():
            each.done(drain.report)

    def _waiting(self) -> list[Client]:
        return [self._client, self._asker] if self._asker else [self._client]

    def _is_alone(self) -> bool:
        """Whether nobody is left who could bring us another link. Who stays then only keeps the session from being
        resumed.
        """
        if time.monotonic() < self._look_at:
            return False
        self._look_at = time.monotonic() + WATCH_S
        return not self._is_kept()

    def _duplicated(self, fds: Sequence[int]) -> Link:
        """The connections that the keeper has welcomed."""
        channels = []
        for role, fd in zip((Role.CONTROL, Role.URGENT, Role.BULK), fds, strict=True):
            hello = Hello(role, self._session.id, self._session.token, resume=True)
            sock = socket.socket(fileno=os.dup(fd))
            channels.append(Channel.adopted(sock, Party.DESTINATION, hello, welcomed=True))
        return Link(self._session, *channels)


def _brought(request: Request) -> Channel:
    """A connection whose HELLO who brings it has read. Raises whatever strange fields or descriptors lead to."""
    fields = request.fields
    if fields["do"] != "connect":
        raise ValueError(fields["do"])
    hello = Hello(Role(fields["role"]), fields["session"], fields["token"], resume=True)
    sock = request.take_socket()
    try:
        sock.getpeername()  # a socket that is not connected is never ready to be answered on
        return Channel.adopted(sock, Party.DESTINATION, hello, welcomed=False)
    except BaseException:
        sock.close()
        raise


def say(end: socket.socket, kind: str, value: object) -> None:
    """One message between the keeper and the pager; it waits there for a pager that is still to come."""
    with suppress(OSError):
        end.send(pickle.dumps((kind, value)), socket.MSG_DONTWAIT)


def heard(end: socket.socket, timeout: float = 0, most: int = 64) -> Iterator[tuple[str, Any]]:
    """The messages that are there, or come within `timeout` seconds; not more than `most`."""
    while most and readable([end.fileno()], timeout):
        timeout, most = 0, most - 1
        message: tuple[str, Any] = pickle.loads(end.recv(MESSAGE_MAX))
        yield message
