"""The destination's keeper of one session: from its first link to the last page, whoever is killed meanwhile.

Three processes with one descriptor table: the keeper, who built the tree; the pager; and a guard, which becomes the
keeper when that is killed. A pager or guard that is killed is replaced. When all are killed at once the tree waits, by
the anchors in its own descriptor tables, for `lazyproc resume`.
"""

from __future__ import annotations

import mmap
import os
import socket
from collections.abc import Sequence
from contextlib import suppress

from lazyproc.errors import ConnectionLost, LazyprocError, ProtocolError
from lazyproc.events import Note
from lazyproc.kernel import family
from lazyproc.kernel.deaf import ignore_interrupts
from lazyproc.kernel.fds import AMPLE, make_room
from lazyproc.kernel.ready import readable
from lazyproc.migrate.apart import Client
from lazyproc.migrate.arrival import Arrival, Terms
from lazyproc.migrate.crew import Clients, Member, amend, heard, say
from lazyproc.migrate.desk import Desk, Request
from lazyproc.migrate.doorstep import LET_LISTEN, Doorstep
from lazyproc.migrate.guest_arrival import GuestArrival, stands
from lazyproc.migrate.journal import DESTINATION, Journal
from lazyproc.migrate.link import Gathering, Link
from lazyproc.migrate.paging import Paging, Preferences
from lazyproc.migrate.place import Place
from lazyproc.migrate.reception import hand_on
from lazyproc.migrate.supply import Supply
from lazyproc.pages.channel import Channel
from lazyproc.pages.session import Session
from lazyproc.qemu.qmp import Qmp
from lazyproc.qemu.shell import run_instead
from lazyproc.restore.ending import end_tree
from lazyproc.restore.lazytree import from_facts
from lazyproc.uffd.pager import Pager
from lazyproc.wire.native import REVISION, Hello, Party, Role

NAME = "lazyproc-keeper"
WATCH_S = 0.5
LIVING = ("running", "drained", "poisoned")  # states in which a tree goes on without the keeper
MEMBERS = 100  # helpers that are killed so often are killed on purpose


class Keeper:
    """Everything here is known to the guard as well, since that is a fork: it goes on with the same descriptors."""

    _living: Sequence[str] = LIVING

    def __init__(
        self,
        session: Session,
        journal: Journal,
        place: Place,
        client: Client,
        preferences: Preferences,
    ) -> None:
        self._session = session
        self._journal = journal
        self._place = place
        self._preferences = preferences
        self._clients = Clients(client)
        self._desk = Desk(session.id, DESTINATION)
        self._doorstep = Doorstep(place)
        self._guest: Qmp | None = None  # is told to run, and has not answered yet
        self._gathering = Gathering(session)
        self._near, self._far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # keeper, pager
        self._connections: list[socket.socket] = []  # of the newest link; the pager has duplicates of its own
        self._committed = False
        self._resumed = False  # the client is no `receive`
        self._told = False  # the source knows that it runs here, and a guest was let run
        self._left = MEMBERS
        self._outlived = mmap.mmap(-1, 1)  # shared with the guard: the tree no longer ends with its tracer
        self._keeper = Member(os.getpid())

    # --- the keeper ---

    def take_in(self, link: Link, terms: Terms, outputs: Sequence[int]) -> None:
        """A new session, from PREPARE to the last page. `outputs` are for the QEMU of a guest."""
        make_room(AMPLE)  # while nobody shares our table: later each growth waits for every processor
        self._connections = link.sockets
        tables = Pager()  # its threads run in the pager; here its tables are filled
        self._pager = self._new_pager()
        self._guard = self._new_guard()
        # From the first record on, for `abort`.
        self._journal.facts |= {"keeper_pid": os.getpid(), "guard_pid": self._guard.pid}
        arrival = (GuestArrival if terms.command else Arrival)(
            link,
            terms,
            self._journal,
            self._clients.tell,
            settle=ignore_interrupts,
            outlived=self._note_outlived,
        )
        if isinstance(arrival, GuestArrival):
            arrival.outputs, arrival.noted = outputs, self._note_crew
            arrival.runs = lambda: say(self._near, "run", None)

        def serve() -> None:
            say(self._near, "serve", None)
            say(self._near, "take", (link.control.peer_revision, self._numbers()))

        try:
            self._clients.first.stop_without_it()
            arrival.begin(tables, serve)
        except (LazyprocError, OSError, KeyboardInterrupt) as error:
            self._clients.failed(LazyprocError(f"session {self._session.id}: {error}"))
            if not arrival.committed:
                if arrival.described:  # a source in doubt will ask
                    self._journal.note("aborted", self._clients.tell, {"reason": str(error)}, durable=True)
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
        self._note_crew()
        say(self._near, "serve", None)
        self._watch()

    def _watch(self) -> None:
        """Until the pager says that it has done everything."""
        self._told = True
        self._note_crew()
        while True:
            watched = [self._near.fileno(), self._desk.fileno(), self._pager.pidfd, self._guard.pidfd]
            ready = readable([*watched, *self._others()], self._patience())
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
            if not self._attend(ready):
                break
        self._dismiss()

    def _others(self) -> list[int]:
        """What else is watched."""
        return [each.fileno() for each in (self._doorstep.door, self._guest) if each]

    def _patience(self) -> float:
        """Seconds until the next look at what nobody tells."""
        return WATCH_S

    def _attend(self, ready: set[int]) -> bool:
        """See to it. False: there is nothing left to keep."""
        channel = self._doorstep.next(lambda: self._resumed or not self._clients.first.listens())
        if channel is not None:
            self._let_in(channel)
        if self._guest is not None and self._guest.fileno() in ready:
            self._attend_guest(self._guest)
        return True

    def _attend_guest(self, guest: Qmp) -> None:
        """Whether it runs."""
        try:
            guest.answer(timeout=0)
        except TimeoutError:
            return  # it was an event
        except LazyprocError as error:
            self._clients.tell(stands(int(self._journal.facts["tree"]["root_pid"]), error))
        guest.close()
        self._guest = None

    def _heard_the_end(self) -> bool:
        """Whether the pager has said that there is nothing left to do. What it says is for the journal."""
        for kind, facts in heard(self._near):
            amend(self._journal, facts, self._clients.tell)
            if kind == "over":
                return True
        return False

    def _replace_pager(self) -> None:
        """What was under way to a dead pager is asked for again, over a new link: the old one is out of step."""
        self._clients.tell(Note(f"session {self._session.id}: the pager was killed and is replaced"))
        self._count_killed()
        self._exchange_pager()

    def _exchange_pager(self) -> None:
        """A guard goes by the numbers on record: what is closed is not there any more by then. There are never two, for
        the new one begins when it is there.
        """
        before, self._pager = self._pager, self._new_pager()
        lost, self._connections = self._connections, []
        self._note_crew()
        before.forget()
        _hang_up(lost)
        say(self._near, "serve", None)

    def _new_pager(self) -> Member:
        paging = Paging(
            self._session, self._journal, self._place, self._clients, self._far, self._preferences
        )
        keeper, begin = self._keeper, paging.next if self._committed else paging.first
        return Member(family.child_sharing_descriptors(lambda: begin(keeper), "lazyproc-pager"))

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
            "connections": self._numbers(),
            "told": self._told,
        }
        self._journal.note(str(self._journal.facts["state"]), self._clients.tell, crew)

    def _dismiss(self) -> None:
        self._guard.end()
        self._pager.end()

    # --- links ---

    def _serve(self, request: Request) -> None:
        """What another command of this host asks; whatever else is put on the desk changes nothing."""
        if request.fields.get("do") == "supply":
            self._supplied(request)
            return
        if request.fields == LET_LISTEN:
            self._doorstep.give_up()
            request.answer({})
            return
        try:
            channel = _brought(request)
        except (KeyError, TypeError, ValueError, OSError, ProtocolError) as error:
            request.answer({"error": f"not understood: {error!r:.200}"})
            return
        request.answer({})
        self._take(channel)

    def _let_in(self, channel: Channel) -> None:
        """Several trees may have come by one receiver: without it one of their keepers listens for all."""
        assert channel.hello is not None, "the door has read the HELLO"
        if channel.hello.session == self._session.id:
            self._take(channel)
            return
        with suppress(ConnectionLost, ProtocolError):
            hand_on(channel, channel.hello)

    def _take(self, channel: Channel) -> None:
        try:
            link = self._gathering.add(channel)
        except (ConnectionLost, ProtocolError):
            return
        if link is not None:
            lost, self._connections = self._connections, link.sockets
            self._note_crew()
            _hang_up(lost)
            say(self._near, "link", (link.control.peer_revision, self._numbers()))

    def _numbers(self) -> list[int]:
        return [each.fileno() for each in self._connections]

    def _supplied(self, request: Request) -> None:
        """Pages come from elsewhere from now on. One of us always lives meanwhile, and has all descriptors."""
        try:
            asker = Client(request.take_socket())
        except (OSError, ValueError) as error:
            request.answer({"error": f"not understood: {error!r:.200}"})
            return
        request.answer({})
        self._clients.ask(asker)
        self._journal.reload()
        state, supply = str(self._journal.facts["state"]), Supply.of(request.fields)
        self._journal.note(state, self._clients.tell, {"supply": supply.facts()})
        self._guard.end()
        self._guard = self._new_guard()  # one that knows who asks
        self._pager.kill()
        self._exchange_pager()

    # --- the guard ---

    def _be_guard(self) -> None:
        """Do nothing until the keeper is dead, then be it."""
        begun, _theirs = self._journal.facts, self._doorstep  # the keeper's to close: kept, and not used
        self._doorstep = Doorstep(self._place)
        readable([self._keeper.pidfd])
        self._journal.reload()
        facts = self._journal.facts
        if self._outlived[0] and not facts:
            return  # it is over: the pager has removed the record
        if facts.get("state") not in self._living or not self._outlived[0]:
            self._journal.facts = begun | facts
            self._take_back()
            return
        self._committed = True
        self._keeper = Member(os.getpid())
        if "pager_pid" in facts:  # otherwise it is the first one still, whom we know
            self._pager = Member(int(facts["pager_pid"]), int(facts["pager_pidfd"]))
        told = facts.get("told") is True
        if told:
            self._connections = [socket.socket(fileno=fd) for fd in facts["connections"]]
        else:  # nobody knows what the source has heard: it is to ask
            _hang_up(self._connections)
            self._connections = []
        self._doorstep.inherit()
        self._count_killed()
        self._guard = self._new_guard()
        self._clients.tell(Note(f"session {self._session.id}: the keeper was killed and is replaced"))
        if "monitor" in facts and not told:
            with suppress(ConnectionLost):  # QEMU has ended
                self._guest = run_instead(int(facts["tree"]["root_pid"]), int(facts["monitor"]))
            say(self._near, "run", None)
        self._watch()

    def _take_back(self) -> None:
        """The keeper died before the commit, or before its first word of it, and with it the tree, which has not run.
        It never will, and a source in doubt learns so when it asks.
        """
        if "tree" in self._journal.facts:
            end_tree(from_facts(self._journal.facts["tree"]))
        reason = "the keeper was killed before the tree ran"
        self._journal.note("aborted", self._clients.tell, {"reason": reason}, durable=True)
        _hang_up(self._connections)  # the pager of a guest has them as well


def _hang_up(connections: Sequence[socket.socket]) -> None:
    """A duplicate that a dead pager has left in our table must not keep them open."""
    for each in connections:
        with suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
        each.close()


def _brought(request: Request) -> Channel:
    """A connection whose HELLO who brings it has read. Raises whatever strange fields or descriptors lead to."""
    fields = request.fields
    if fields["do"] != "connect":
        raise ValueError(fields["do"])
    role, revision = Role(fields["role"]), int(fields.get("revision", REVISION))
    hello = Hello(role, fields["session"], fields["token"], revision=revision, resume=True)
    sock = request.take_socket()
    try:
        sock.getpeername()  # a socket that is not connected is never ready to be answered on
        return Channel.adopted(sock, Party.DESTINATION, hello, welcomed=False)
    except BaseException:
        sock.close()
        raise
