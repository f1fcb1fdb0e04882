"""The destination's side of a hand-over, in order: prepare, build, commit, run. The pages follow (drain.py)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, suppress
from typing import Any, Protocol

from lazyproc.errors import ConnectionLost, LazyprocError, ProtocolError
from lazyproc.events import Later, Listener, Note, StateChanged
from lazyproc.facts import asdict, dataclass
from lazyproc.images.convert import from_images
from lazyproc.images.files import unpack
from lazyproc.images.forecast import Forecast, read_forecast
from lazyproc.kernel.netfilter import Flow
from lazyproc.late import Late
from lazyproc.migrate.address import announced
from lazyproc.migrate.answering import groups_here, heard, numbers_of, obstacles_here
from lazyproc.migrate.drafting import Drafting
from lazyproc.migrate.identity import identity
from lazyproc.migrate.journal import ARRIVING, Journal, one_at_a_time
from lazyproc.migrate.link import Link
from lazyproc.migrate.needs import obstacles_frame
from lazyproc.migrate.talk import Unfit, expect
from lazyproc.migrate.whom import ROOT, Whom
from lazyproc.model import WIPED, Checkpoint, Vma
from lazyproc.needs import FeatureNeed, Wanted
from lazyproc.pages.bundle import NAME, BundledPages
from lazyproc.pages.remote import RemotePages
from lazyproc.restore.groundwork import Groundwork, laid
from lazyproc.restore.groups import Birth
from lazyproc.restore.late import give
from lazyproc.restore.lazy import introduce
from lazyproc.restore.lazytree import LazyTree, to_facts
from lazyproc.restore.locks import TreeLocks
from lazyproc.restore.rehearsal import no_collections, rehearse
from lazyproc.restore.sockets import flows_to_hold
from lazyproc.restore.tree import BuiltTree, Pidns, built_tree, expecting, wants_new_pidns
from lazyproc.restore.users import Users
from lazyproc.steps import Steps
from lazyproc.trace import Clock, TraceFile
from lazyproc.uffd.pager import Pager
from lazyproc.wire.jsonobject import JsonValue
from lazyproc.wire.native import WIPES, Abort, Built, Commit, Committed, Images, Prepared, Running

PREPARE_S = 60.0
FREEZE_S = 60.0
NO_LOCKS = TreeLocks()


@dataclass(frozen=True, slots=True)
class Terms:
    """On which terms trees are taken in."""

    pidns: Pidns = "auto"  # host: this pid namespace, new: one of its own, auto: that when a number is taken
    overcommit: bool = False  # trees that are larger than the available memory, too
    cgroup: str | None = None  # a path as in /proc/PID/cgroup; None: one of its own
    uids: frozenset[int] = frozenset()  # as whom they may run; as anybody when there is none
    policy: str | None = None  # what comes next, recorded:FILE too; None: as the source wants it
    record: str | None = None  # a file for the faults of the one tree that comes
    command: tuple[str, ...] = ()  # of a QEMU: guests are taken in, and nothing else

    def whom(self) -> Whom | None:
        """None: as anybody."""
        return Whom.here(self.uids) if self.uids else None


USUAL = Terms()


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the source asked for in PREPARE."""

    lazy: bool
    policy: str
    bulk: bool
    max_rate: int
    traced: bool  # it wants the faults
    release: bool  # it frees pages as they are acknowledged

    @classmethod
    def of(cls, fields: Mapping[str, Any], *, traced: bool | None = None) -> Wishes:
        """Raises ProtocolError."""
        max_rate = fields.get("max_rate", 0)
        if not isinstance(max_rate, int):
            raise ProtocolError("PREPARE's max_rate is no number")
        lazy, bulk = fields.get("mode") == "postcopy", fields.get("bulk") is not False
        wanted = fields.get("trace") is True if traced is None else traced
        release = fields.get("release") is True
        return cls(lazy, str(fields.get("policy")), bulk, max_rate, wanted, release)

    def fields(self) -> dict[str, JsonValue]:
        """As PREPARE has them; for a journal."""
        mode = "postcopy" if self.lazy else "stopcopy"
        return {
            "mode": mode,
            "policy": self.policy,
            "bulk": self.bulk,
            "max_rate": self.max_rate,
            "trace": self.traced,
            "release": self.release,
        }


class Outliving(Protocol):
    """What is built, and ends with us until then."""

    def demand_there(self) -> None:
        """Raises NoSuchProcess when somebody has ended it."""

    def outlive_us(self) -> None: ...


@dataclass(slots=True)
class Ready:
    """What is known and made before the freeze: foreseen mappings by vpid, a nursery, and processes in it."""

    wishes: Wishes
    foreseen: Mapping[int, tuple[Vma, ...]]
    birth: Birth | None = None
    ground: Groundwork | None = None


def demand_wiped(checkpoint: Checkpoint, revision: int) -> None:
    """A source of a `revision` before WIPES names the pages of such memory in MAP, when it is too late. Raises
    LazyprocError.
    """
    for task in checkpoint.tasks if revision < WIPES else ():
        for vma in task.mm.vmas if task.mm else ():
            if WIPED in vma.vm_flags:
                raise LazyprocError(
                    f"a fork wipes the memory at {vma.start:#x} (MADV_WIPEONFORK), for which its source is too old",
                    where=f"pid {task.vpid}",
                    remedy="use the same lazyproc on both hosts, or --mode stopcopy",
                )


def _late(commit: Commit) -> Late:
    """Raises ProtocolError."""
    try:
        return Late.of(commit.fields)
    except (KeyError, TypeError, ValueError) as error:
        raise ProtocolError(f"COMMIT's signals are none: {error!r:.100}") from None


class Arrival:
    """One migration on its way in, up to the first instruction of the tree here. One thread does all its work: ptrace
    calls have one tracer thread.
    """

    def __init__(
        self,
        link: Link,
        terms: Terms,
        journal: Journal,
        listener: Listener,
        *,
        trace: TraceFile | None = None,
        settle: Callable[[], object] = lambda: None,
        outlived: Callable[[], object] = lambda: None,
    ) -> None:
        """With `trace` the faults go into that file, and the source does not get them. `settle` is called right before
        the commit: from then on nothing is to interrupt us. `outlived` is called right after it, before anybody is
        told: until then our death is the end of a tree that has not run an instruction.
        """
        self._link = link
        self._terms = terms
        self._journal = journal
        self._listener = listener
        self._trace = trace
        self._settle = settle
        self._outlived = outlived
        self.described = False  # from here on the source may have parked the tree, and be in doubt
        self.committed = False

    def begin(self, pager: Pager, serve: Callable[[], None]) -> LazyTree:
        """Build the tree, commit, let it run. `pager` learns of its memory; `serve` is called when that is to be
        filled, right before the tree runs: the journal has what it needs by then. Until the commit every error is
        told to the source, and nothing is left here.
        """
        try:
            return self._begin(pager, serve)
        except (LazyprocError, OSError) as error:
            if not self.committed:
                self._journal.remove()
                self._refuse(error)
            raise
        except KeyboardInterrupt:
            self._journal.remove()
            self._refuse(LazyprocError("the receiver was stopped"))
            raise

    def _begin(self, pager: Pager, serve: Callable[[], None]) -> LazyTree:
        with ExitStack() as stack:
            ready = self._prepare(pager, stack)
            drafting = stack.enter_context(closing(Drafting(self._journal)))
            self._say_prepared(ready.wishes)
            data = expect(self._link.control, Images, FREEZE_S).data
            later = Later(self._listener)
            stack.callback(later.tell)
            steps = Steps(later, "arrival: ", began=self._link.control.began)
            steps.done("receive")
            return self._build(data, ready, pager, serve, drafting, later, steps)

    def _build(
        self,
        data: bytes,
        ready: Ready,
        pager: Pager,
        serve: Callable[[], None],
        drafting: Drafting,
        later: Later,
        steps: Steps,
    ) -> LazyTree:
        """All that is done while the tree stands still at its source."""
        images = unpack(data)
        self.described = True
        source = BundledPages(images.pop(NAME, b""), RemotePages(self._link.urgent, {}))
        checkpoint = from_images(images, ready.foreseen)
        if ready.wishes.lazy:
            demand_wiped(checkpoint, self._link.control.peer_revision)
        steps.done("decode")
        users = self._users(checkpoint)
        pidns, cgroup = self._terms.pidns, self._terms.cgroup

        def draft(tree: LazyTree) -> None:
            facts = {"tree": to_facts(tree), "wishes": ready.wishes.fields(), "ledger": pager.ledger}
            drafting.begin({**facts, "identity": identity(checkpoint, source)})

        with (
            built_tree(
                checkpoint,
                source,
                later,
                pager=pager if ready.wishes.lazy else None,
                pidns=pidns,
                cgroup=cgroup,
                users=users,
                birth=ready.birth,
                ground=ready.ground,
                steps=steps,
                known=draft,
                awaits_locks=True,
            ) as tree,
            ExitStack() as afterwards,
        ):
            introduce(pager, tree, later)
            steps.done("tables")
            late = self._commit(tree, drafting, steps, tree.locks)
            committed = StateChanged("committed", time.monotonic())
            serve()
            self._announce(flows_to_hold(checkpoint), afterwards)
            steps.done("announce")
            self._release(tree, late)
            steps.done("release")
            with suppress(ConnectionLost):  # whoever drains notices
                self._link.control.send(Committed())
                self._link.control.send(Running({"root_pid": tree.root_pid, "steps_ms": {**steps.ms()}}))
            self._listener(committed)
            later(StateChanged("running", time.monotonic()))
        return tree.lazy_tree

    def _users(self, checkpoint: Checkpoint) -> Users | None:
        """Whose files it may open; None: anybody's. What came before the freeze was the word of the source, and what it
        has sent since is what will be. Raises PermissionDenied.
        """
        whom = self._terms.whom()
        if whom is None:
            return None
        whom.check(checkpoint)
        return None if ROOT in whom.uids else Users.of(checkpoint)

    def _release(self, tree: BuiltTree, late: Late) -> None:
        """It is committed: it runs, whatever of it went wrong."""
        try:
            give(late, tree.sites)
        except (LazyprocError, OSError) as error:
            self._listener(Note(f"pid {tree.root_pid}: did not get all signals of its last moment: {error}"))
        try:
            tree.release()
        except (LazyprocError, OSError) as error:
            self._listener(Note(f"pid {tree.root_pid}: runs, but not all of it could be let go: {error}"))

    def _announce(self, flows: list[Flow], afterwards: ExitStack) -> None:
        """Before connections live: what they send first is to be answered to us. What comes until then is held back."""
        try:
            afterwards.enter_context(announced(flows))
        except OSError as error:
            self._listener(Note(f"the moved addresses could not be announced: {error.strerror}"))

    def _refuse(self, error: LazyprocError | OSError) -> None:
        control = self._link.control
        with suppress(ConnectionLost, ProtocolError):  # the source has given up itself
            if not isinstance(error, Unfit):
                control.send(Abort({"reason": str(error)}))
            elif control.peer_revision:
                control.send(obstacles_frame(error.obstacles))
            else:
                control.send(Abort({"reason": "; ".join(map(str, error.obstacles))}))

    def _prepare(self, pager: Pager, stack: ExitStack) -> Ready:
        """What is asked for, and what can be made before the freeze. Until PREPARED is said the tree runs at its
        source; what is left to be done afterwards is a part of its blackout.
        """
        heard_of = heard(self._link.control, PREPARE_S)
        order, wanted = heard_of.order, heard_of.wanted
        with one_at_a_time():
            self._admit(order, wanted)
        wishes = Wishes.of(order, traced=self._trace is None and order.get("trace") is True)
        forecast = read_forecast(unpack(heard_of.forecast)) if heard_of.forecast is not None else None
        rehearse(
            self._listener, identity, connected=FeatureNeed("TCP_REPAIR") in {each.need for each in wanted}
        )
        stack.enter_context(no_collections())
        ready = Ready(wishes, forecast.mappings if forecast else {})
        if numbers := numbers_of(wanted):  # its source is not too old to say them
            self._make_ready(ready, numbers, forecast, pager if wishes.lazy else None, stack)
        return ready

    def _make_ready(
        self,
        ready: Ready,
        numbers: list[int],
        forecast: Forecast | None,
        pager: Pager | None,
        stack: ExitStack,
    ) -> None:
        """A nursery, and the tree as it is foreseen. Not where it may run as some users only: their rights are known
        for certain when it has come.
        """
        if forecast is not None and self._terms.whom() is None:
            try:
                with ExitStack() as attempt:
                    birth = attempt.enter_context(self._expecting(numbers))
                    ready.ground = attempt.enter_context(laid(forecast, birth, pager))
                    ready.birth = birth
                    stack.enter_context(attempt.pop_all())
                return
            except (LazyprocError, OSError) as error:
                self._listener(Note(f"the tree could not be begun before it came: {error}"))
        ready.birth = stack.enter_context(self._expecting(numbers))

    def _say_prepared(self, wishes: Wishes) -> None:
        clock = Clock.now()
        if self._trace is not None:
            self._trace.begin(self._link.session.id, clock)
        trace: dict[str, JsonValue] = {"trace": asdict(clock)} if wishes.traced else {}
        self._link.control.send(Prepared({**trace, "release": True} if wishes.release else trace))

    def _expecting(self, numbers: list[int]) -> AbstractContextManager[Birth]:
        new = wants_new_pidns(self._terms.pidns, numbers)
        return expecting(numbers[0], self._listener, new_pidns=new, cgroup=self._terms.cgroup)

    def _admit(self, order: Mapping[str, JsonValue], wanted: Sequence[Wanted]) -> None:
        """Raises Unfit. Whoever comes next is told what this tree is going to take."""
        terms = self._terms
        groups = groups_here(terms.cgroup)
        against = obstacles_here(
            order, wanted, groups, pidns=terms.pidns, overcommit=terms.overcommit, whom=terms.whom()
        )
        if obstacles := tuple(against):
            raise Unfit(obstacles)
        self._journal.write(ARRIVING, durable=False, pages=order["pages"], groups=groups)

    def _commit(self, tree: Outliving, drafting: Drafting, steps: Steps, locks: TreeLocks = NO_LOCKS) -> Late:
        """The one durable write that decides: from here on the tree is ours. When the source does not learn of it now,
        it will when it asks again. Returns what the source says has come to its tree since it was described.
        """
        in_common = locks.in_common()
        self._link.control.send(Built({"locks": in_common} if in_common else {}))
        committed, running = drafting.drafts()
        steps.done("draft")
        late = _late(expect(self._link.control, Commit, FREEZE_S))
        steps.done("wait for commit")
        if in_common:
            locks.take_awaited()
            steps.done("locks")
        tree.demand_there()  # the last moment in which it may be called off
        self._settle()
        self._journal.publish(committed)
        steps.done("durable")
        # Before it may run: who finds COMMITTED knows that it never did (docs/adr/0010).
        self._journal.publish(running)
        self.committed = True
        tree.outlive_us()
        self._outlived()
        steps.done("outlive")
        return late
