"""The pager's process of a session at the destination: every missing page, over one link after another.

It shares its descriptors with the keeper, who brings it links and replaces it when it is killed (keeper.py).
"""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

from lazyproc.errors import LazyprocError, Parked
from lazyproc.events import Note, ignore
from lazyproc.facts import dataclass
from lazyproc.kernel.ready import readable
from lazyproc.kernel.sys import pidfd_open
from lazyproc.migrate.arrival import Wishes
from lazyproc.migrate.crew import Clients, Member, amend, heard, say
from lazyproc.migrate.criu_supply import finish
from lazyproc.migrate.drain import Drain
from lazyproc.migrate.images_server import Refetch
from lazyproc.migrate.journal import ARRIVING, Journal
from lazyproc.migrate.link import ROLES, Link, Redial
from lazyproc.migrate.place import Place
from lazyproc.migrate.supply import Supply
from lazyproc.pages.channel import Channel
from lazyproc.pages.dial import Declined
from lazyproc.pages.private import PrivatePages
from lazyproc.pages.session import Session
from lazyproc.restore.handed import forestall
from lazyproc.restore.lazy import note_removals
from lazyproc.restore.lazytree import LazyTask, LazyTree, from_facts, to_facts
from lazyproc.trace import Clock, TraceFile
from lazyproc.uffd.pager import Pager
from lazyproc.uffd.policy import POLICIES, Policy, blocks
from lazyproc.wire.jsonobject import JsonValue
from lazyproc.wire.native import REVISION, Hello, Party

LOOK_S = 0.5
STEP_S = 0.02
NOTED_S = 0.001
SETTLINGS = 4  # of LOOK_S each: the source takes us for lost after 5 s of silence
GOODBYE_S = 1.0
RELEASE_S = 60.0  # the tree is complete: how long the source is waited for, to be told so


@dataclass(frozen=True, slots=True)
class Preferences:
    """What `receive` was told about pages. A tree that is resumed when all are killed has the source's policy again."""

    policy: Policy | None = None  # before the source's
    record: TraceFile | None = None  # for the faults


class Paging:
    """`keeper` is the end of a socket where the keeper sends links, and hears what becomes of them."""

    def __init__(
        self,
        session: Session,
        journal: Journal,
        place: Place,
        clients: Clients,
        keeper: socket.socket,
        preferences: Preferences,
    ) -> None:
        self._session = session
        self._journal = journal
        self._place = place
        self._clients = clients
        self._keeper = keeper
        self._preferences = preferences
        self._criu: socket.socket | None = None  # who has the connection to CRIU's page server
        self._look_at = 0.0  # when it is looked next whether anybody of the crew is left

    def first(self, keeper: Member) -> None:
        """Of a tree that is still to be built: begins when the keeper says that it is committed."""
        self._rehearse()
        if self._is_told_to_serve(keeper):
            self._run(inherited=False)

    def next(self, keeper: Member) -> None:
        """In place of one that was killed: begins when the keeper has that on record."""
        if self._is_told_to_serve(keeper):
            self._run(inherited=True)

    def _is_told_to_serve(self, keeper: Member) -> bool:
        """What was said to another one before is over. A guard speaks when the keeper is dead, and not to us."""
        while True:
            readable([self._keeper.fileno(), keeper.pidfd])
            if not keeper.alive():
                return False
            if any(kind == "serve" for kind, _ in heard(self._keeper, most=1)):
                return True

    def _run(self, *, inherited: bool) -> None:
        self._journal.reload()
        facts = self._journal.facts
        wishes = Wishes.of(facts["wishes"])
        with ExitStack() as stack:
            record = self._preferences.record
            traced = wishes.traced or record is not None
            pager = stack.enter_context(Pager(ledger=int(facts["ledger"]), trace=traced))
            tree = from_facts(facts["tree"])
            if inherited:
                note_removals(pager, tree)
            report = None if facts["state"] == "poisoned" else facts.get("report")  # poisoned is not over
            policy = self._preferences.policy or POLICIES[wishes.policy]
            drain = Drain(
                pager,
                tree,
                policy,
                self._clients.tell,
                report,
                settled=facts.get("whole"),
                settle=self._settle,
            )
            if traced:
                if record is not None:
                    record.begin(self._session.id, Clock.now())
                drain.record(record, tell=wishes.traced)
            if wishes.release:
                drain.acknowledge()
            if not pager.map_known:
                pager.plan(blocks(policy.first))
            supply = Supply.of(facts.get("supply") or {})
            alone = self._goes_alone(drain, supply, stack)
            if not alone and facts.get("criu"):
                drain.know(stack.enter_context(PrivatePages(Path(facts["folder"]))))
            redial = self._redial(drain)
            hurries = alone and not (supply.criu or supply.server)  # the source is given up
            bulk, max_rate = wishes.bulk or hurries, 0 if hurries else wishes.max_rate
            pager.start(bulk=False, max_rate=max_rate)
            if facts["state"] == ARRIVING and not self._await_the_run(drain, redial):
                return
            if bulk:
                pager.start_bulk(wakes=not (inherited or policy.first))
            if self._bring(drain, redial):
                self._close(drain)

    def _goes_alone(self, drain: Drain, supply: Supply, stack: ExitStack) -> bool:
        """Images that are no longer what they were when they were named leave everything as it was."""
        if not supply:
            return False
        try:
            images = stack.enter_context(supply.pages()) if supply.images else None
            if supply.server and images is not None:
                self._criu = drain.go_to_criu(images, self._session.id)
            else:
                drain.go_alone(images, poison=supply.poison)
        except (LazyprocError, OSError) as error:
            self._clients.failed(error)
            self._have_noted({"supply": {}})
            return False
        return True

    def _await_the_run(self, drain: Drain, redial: Redial | None) -> bool:
        """A tree that somebody else restores, or a guest that QEMU loads: they may touch its memory meanwhile, and may
        still be about to register it, so nothing else is put there before the tree runs. False when it never will.
        """
        while not self._take_links(drain, redial, STEP_S):
            if self._is_alone():
                restorer = self._journal.facts.get("restorer")
                if restorer is None:  # a guest: QEMU has ended with the keeper, unless it was let run
                    return self._journal.facts.get("state") == "running"
                if forestall(restorer[0]):
                    return False
                amend(self._journal, {"state": "running"}, self._clients.tell)
                return True
            if self._journal.facts.get("state") == "running":
                return True  # the keeper was killed when it was on record, and before it said so
        return True

    # --- links ---

    def _redial(self, drain: Drain) -> Redial | None:
        """Where it is for us to call."""
        if not self._place.dials or drain.alone:
            return None
        where = (self._place.address, self._place.trust, self._session, self._clients.tell)
        facts = self._journal.facts
        return Refetch(*where, facts["offered"]) if facts.get("criu") else Redial(*where)

    def _take_links(self, drain: Drain, redial: Redial | None, timeout: float) -> bool:
        """Whether the keeper has said that the tree runs, which he may have said to one before us as well."""
        runs = False
        for kind, value in heard(self._keeper, timeout):
            if kind == "run":
                runs = True
            if value is None:
                continue
            link = self._duplicated(*value)
            drain.take(link) if kind == "take" else drain.attach(link)
        if redial is not None:
            self._call(drain, redial)
        return runs

    def _call(self, drain: Drain, redial: Redial) -> None:
        if drain.linked:
            return
        with suppress(Declined):  # it may know the session again when it is resumed there
            if (called := redial.link()) is not None:
                drain.take(called) if redial.greeted else drain.attach(called)

    def _rehearse(self) -> None:
        """What the first fault would have to wait for otherwise (docs/adr/0020-rehearsal.md): a pager without a
        process, and a link to nobody. Where that fails faults wait longer.
        """
        wishes = Wishes(lazy=True, policy="sequential", bulk=True, max_rate=0, traced=False, release=False)
        tree = LazyTree(0, 0, 0, (LazyTask(0, 0, 0, -1, -1, -1),), (), (), 0)
        record = json.loads(json.dumps({"wishes": wishes.fields(), "tree": to_facts(tree)}))
        pager = Pager()
        try:
            policy = POLICIES[Wishes.of(record["wishes"]).policy]
            drain = Drain(pager, from_facts(record["tree"]), policy, ignore)
            pager.plan(blocks(policy.first))
            pager.start(bulk=False)
            with ExitStack() as stack:
                pairs = [socket.socketpair() for _ in ROLES]
                for end in (end for pair in pairs for end in pair):
                    stack.enter_context(end)
                link = stack.enter_context(
                    closing(self._duplicated(REVISION, [near.fileno() for near, _ in pairs]))
                )
                drain.take(link)
        except (LazyprocError, OSError) as error:
            self._clients.tell(
                Note(f"the pager could not be rehearsed, and the first faults wait longer: {error}")
            )
        finally:
            pager.abandon()

    def _duplicated(self, revision: int, fds: Sequence[int]) -> Link:
        """The connections that the keeper has welcomed, of a source of that revision."""
        channels = []
        for role, fd in zip(ROLES, fds, strict=True):
            hello = Hello(role, self._session.id, self._session.token, revision=revision, resume=True)
            sock = socket.socket(fileno=os.dup(fd))
            channels.append(Channel.adopted(sock, Party.DESTINATION, hello, welcomed=True))
        return Link(self._session, *channels)

    # --- pages ---

    def _bring(self, drain: Drain, redial: Redial | None) -> bool:
        """To the end, whoever else is alive by then. False: nobody is left who could bring another link, and who stays
        then only keeps the session from being resumed; of a tree that is complete the record tells a source that asks.
        """
        until, reason, told = math.inf, self._journal.facts.get("reason", ""), False
        while not drain.over and (drain.stays or time.monotonic() < until):
            self._take_links(drain, redial, 0 if drain.linked else STEP_S)
            drain.step(STEP_S if drain.linked else 0)
            waits = redial is None and not (drain.linked or drain.alone or drain.stays)
            if waits and self._is_alone():
                return drain.report is not None
            if drain.report is not None and until == math.inf:
                until = time.monotonic() + (GOODBYE_S if self._nobody_asks else RELEASE_S)
                self._note_whole(drain)
            elif drain.reason != reason:
                reason = drain.reason
                self._have_noted({"reason": reason})
            if not told and (pages := drain.lacking):
                told = True
                self._clients.failed(self._lacking(pages))
        return True

    def _note_whole(self, drain: Drain) -> None:
        state = "poisoned" if drain.stays else "drained"
        self._have_noted({"state": state, "report": drain.report})
        if drain.stays:
            self._clients.done(drain.report)

    def _settle(self, report: Mapping[str, JsonValue]) -> None:
        """Recorded when this returns, by whomever, unless it cannot be (a full disk): then all goes on without."""
        for _ in range(SETTLINGS):  # who was told may have been killed before he wrote it down
            self._have_noted({"whole": report})
            until = time.monotonic() + LOOK_S
            while self._is_kept() and "whole" not in self._journal.facts and time.monotonic() < until:
                time.sleep(NOTED_S)
            if "whole" in self._journal.facts:
                return

    def _close(self, drain: Drain) -> None:
        """All is done; whoever is kept is dismissed by the keeper."""
        if self._criu is not None:
            self._tell_criu(self._criu)
        self._clients.done(drain.report)
        over = drain.released or self._nobody_asks
        facts: dict[str, Any] = {} if over else {"state": "drained", "report": drain.report}
        say(self._keeper, "over", facts)
        while self._is_kept():
            time.sleep(STEP_S)
        amend(self._journal, facts, self._clients.tell)

    @property
    def _nobody_asks(self) -> bool:
        """How it ended: there is no source, or it has nothing to decide."""
        return not self._place.address or bool(self._journal.facts.get("criu"))

    def _tell_criu(self, control: socket.socket) -> None:
        try:
            finish(control, self._session.id)
        except LazyprocError as error:
            self._clients.tell(Note(f"session {self._session.id}: {error}"))

    def _lacking(self, pages: int) -> Parked:
        """It stays as it was."""
        return Parked(
            f"the images lack {pages} of the missing pages, which are waited for",
            where=f"session {self._session.id}",
            remedy="name other images, wait for the source, or give them up with --poison",
        )

    # --- the others ---

    def _have_noted(self, facts: dict[str, Any]) -> None:
        """By the keeper: a journal has one writer. By ourselves when he and the guard are dead."""
        if self._is_kept():
            say(self._keeper, "note", facts)
        else:
            amend(self._journal, facts, self._clients.tell)

    def _is_alone(self) -> bool:
        if time.monotonic() < self._look_at:
            return False
        self._look_at = time.monotonic() + LOOK_S
        return not self._is_kept()

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
