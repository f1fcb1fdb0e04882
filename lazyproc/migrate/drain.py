"""The destination after the hand-over: a tree runs, and its missing pages come over one link after another."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from lazyproc.errors import ConnectionLost, ProtocolError
from lazyproc.events import Listener, Note, StateChanged
from lazyproc.facts import asdict
from lazyproc.images.pagemap import to_extents
from lazyproc.kernel.cgroup import remove
from lazyproc.kernel.ready import readable
from lazyproc.migrate.criu_supply import attach
from lazyproc.migrate.link import Link
from lazyproc.migrate.talk import Pulse
from lazyproc.model import Extent, MemoryObject
from lazyproc.pages.criu_source import LazyRuns
from lazyproc.pages.images import ImagePages
from lazyproc.pages.private import PrivatePages
from lazyproc.pages.remote import Maps
from lazyproc.restore.finishing import Finishing
from lazyproc.restore.lazytree import LazyTree, descendants
from lazyproc.trace import TraceFile
from lazyproc.uffd.pager import Counters, Pager, PagerState
from lazyproc.uffd.planner import follow
from lazyproc.uffd.policy import Policy
from lazyproc.uffd.recorder import Recorder
from lazyproc.wire.jsonobject import JsonValue
from lazyproc.wire.native import (
    PACKS,
    Abort,
    Ack,
    Committed,
    Drained,
    Event,
    Map,
    MapEntry,
    Pong,
    Released,
    Running,
    Trace,
)

LAST_WORD_S = 0.5  # once a connection has broken: a source looks every 0.1 s (serving.py)


class Drain:
    """One tree's. `attach` gives it a link, as often as the last one is lost; `step` does what there is to do."""

    def __init__(
        self,
        pager: Pager,
        tree: LazyTree,
        policy: Policy,
        listener: Listener,
        report: Mapping[str, JsonValue] | None = None,
        *,
        settled: Mapping[str, JsonValue] | None = None,
        settle: Callable[[Mapping[str, JsonValue]], object] = lambda _: None,
    ) -> None:
        """With a `report` every page is here already, and only the source has to be told. `settle` is called with what
        will be the report, when every page is here and right before the tree gives back what it keeps of its memory:
        who finds it without that has to know why. What an earlier one has so `settled` holds.
        """
        self._pager = pager
        self._tree = tree
        self._policy = policy
        self._listener = listener
        self._settled = settled
        self._settle = settle
        self._finishing = Finishing(pager, tree, listener)
        self._whole: Mapping[str, JsonValue] | None = (
            None  # the report, while the tree has something to give back
        )
        self._link: Link | None = None
        self._alone = False  # nobody has to be told
        self._stays = False  # whoever maps lost memory anew needs our answer
        self._recorder: Recorder | None = None
        self._mapped = False
        self._acknowledges = False
        self.report = report  # once every page is here
        self.released = False  # the source knows it and has ended its side
        self.reason = "the source is waited for"  # why no page comes, "" while some do

    @property
    def linked(self) -> bool:
        return self._link is not None

    @property
    def alone(self) -> bool:
        return self._alone

    @property
    def stays(self) -> bool:
        return self._stays

    @property
    def over(self) -> bool:
        return self.report is not None and (self.released or self._alone) and not self._stays

    @property
    def lacking(self) -> int:
        """How many pages neither come from anywhere nor are given up."""
        lost = self._alone and not self.linked and self._pager.state is PagerState.LOST
        return self._pager.counters().remaining if lost else 0

    def attach(self, link: Link) -> None:
        """Go on over this link. Who is at the other end learns first that the tree runs here."""
        self._lose()
        try:
            link.control.send(Committed())
            link.control.send(Running({"root_pid": self._tree.root_pid}))
        except (ConnectionLost, ProtocolError) as error:
            self._listener(Note(f"session {link.session.id}: {error}"))
            link.close()
            return
        self.take(link)
        self._listener(StateChanged("running", time.monotonic()))

    def take(self, link: Link) -> None:
        """As `attach`, when that has been said."""
        self._link = link
        self.reason = ""
        self._pulse = Pulse(link.control)
        self._maps = Maps(link.control.peer_revision)
        self._pager.forget_acknowledged()
        packs = link.bulk.peer_revision >= PACKS
        self._pager.serve_remote(link.urgent.detach(), link.bulk.detach(), packs=packs)
        if self.report is not None:
            self._send(Drained(self.report))

    def go_alone(self, source: ImagePages | None, *, poison: bool) -> None:
        """What is missing comes from these images; with `poison` what they lack is lost. A source that comes back is
        told how it ended. Before the pager is started.
        """
        if source is not None:
            self._pager.serve_segments(source.segments())
            self._apply(source.extents())
        self._pager.alone(poison=poison)
        self._alone = True
        self.reason = "the source is given up"

    def know(self, source: PrivatePages) -> None:
        """These images say where there are pages, and have some of them; the others come over a link. Before the pager
        is started.
        """
        self._pager.serve_segments(source.segments_here())
        self._apply(source.extents())

    def go_to_criu(self, images: ImagePages, session: str) -> socket.socket:
        """What these images call lazy comes from a page server of CRIU's, over the connection that a restore has left;
        what is to be told when all is there. Before the pager is started. Raises ConnectionLost.
        """
        lazy = LazyRuns(images)
        urgent, bulk, control = attach(session)
        self._pager.serve_segments(lazy.beside(images))
        self._pager.serve_remote(urgent, bulk)
        private = isinstance(images, PrivatePages)  # CRIU's restore: see there
        marked = {obj: to_extents(pagemap) for obj, pagemap in images.pagemaps()}
        self._apply(images.extents() if private else marked)
        self._alone = True
        self.reason = ""
        return control

    def record(self, file: TraceFile | None, *, tell: bool) -> None:
        """The faults into `file`; with `tell` the source gets them as well, while it can be reached."""

        def sink(records: bytes, lost: int) -> None:
            if file is not None:
                file.write(records, lost)
            if tell:
                self._send_trace(records, lost)

        self._recorder = Recorder(self._pager, sink)

    def acknowledge(self) -> None:
        """The source is told which pages have come, and frees them."""
        self._acknowledges = True

    def step(self, timeout: float) -> None:
        """Wait for `timeout` seconds at most for what the source has to say, and see how far the pages are."""
        if self._link is not None:
            self._listen(self._link, timeout)
        else:
            time.sleep(timeout)  # a pager that has lost its source does not wait
        if self._acknowledges and self.report is None:
            self._send_acks()
        if self.report is None and self._pager.wait(0):
            self._complete()
        if self._stays and not self._pager.spaces():
            self._finish()

    def _listen(self, link: Link, timeout: float) -> None:
        try:
            if self.report is None and self._whole is None:  # the last page is heard of at once
                readable([link.control.fileno(), self._pager.news], timeout)
                timeout = 0
            event = link.control.receive(timeout)
            if event is not None:
                self._hear(event)
            self._pulse.check()
            if self._pager.state is PagerState.LOST:  # by one of the other two connections
                self._hear_the_last(link)
                raise ConnectionLost(self._pager.reason)
        except (ConnectionLost, ProtocolError) as error:
            self.reason = f"the source is lost: {error}"
            self._listener(Note(f"session {link.session.id}: {self.reason}"))
            self._listener(StateChanged("reconnecting", time.monotonic()))
            self._lose()

    def _hear_the_last(self, link: Link) -> None:
        """A source that gives up says why before it hangs up, and three connections end in any order."""
        while (event := link.control.receive(LAST_WORD_S)) is not None:
            self._hear(event)

    def _hear(self, event: Event) -> None:
        match event:
            case Map() if not self._mapped:
                if self._maps.hear(event):
                    self._apply(self._maps.extents())
            case Released():
                self.released = True
            case Map() | Pong():
                return
            case Abort():
                raise ConnectionLost(str(event.fields.get("reason")))
            case _:
                raise ProtocolError(f"{type(event).__name__} from the source of a tree that runs here")

    def _apply(self, extents: Mapping[MemoryObject, Sequence[Extent]]) -> None:
        """Once in the life of a ledger: what comes later says the same."""
        self._pager.plan(self._policy.order(extents))
        if not self._pager.map_known:
            self._pager.apply_map(extents)
        if not self._mapped and self._policy.reaction is not None:
            follow(self._pager, self._policy.reaction())
        self._mapped = True

    def _complete(self) -> None:
        """Every page is there. Again and again while a debugger keeps us out of the tree."""
        if self._whole is None:
            self._whole = self._counted()
        if not (self._stays or self._finish()):
            return
        self.report = self._whole
        self._listener(StateChanged("drained", time.monotonic()))
        self._send(Drained(self.report))

    def _counted(self) -> Mapping[str, JsonValue]:
        counters = self._last_counters()
        ended = has_ended(self._pager, self._tree)
        self._stays = not ended and self._pager.shares_poison
        report = self._settled or report_of(counters, ended=ended)
        if not self._stays:
            self._settle(report)
        return report

    def _finish(self) -> bool:
        """False: not yet."""
        ended = has_ended(self._pager, self._tree)
        done = self._finishing.attempt()
        self.reason = self._finishing.reason
        if not done:
            return False
        self._stays = False
        if ended:
            remove(self._tree.groups)
        return True

    def _last_counters(self) -> Counters:
        """The counters of the report. The trace that the source has asked for ends with the same fault."""
        if self._recorder is None:
            return self._pager.counters()
        self._recorder.stop()
        counters = self._pager.counters()
        self._recorder.drain(counters.fault_us.count)
        return counters

    def _send_trace(self, records: bytes, lost: int) -> None:
        if self._link is None:
            raise ConnectionLost("nobody takes the trace")
        self._link.control.send(Trace(records, lost))

    def _send_acks(self) -> None:
        while self._link is not None and (runs := [MapEntry(*run) for run in self._pager.acknowledge()]):
            if not self._send(Ack(runs)):
                return

    def _send(self, event: Event) -> bool:
        if self._link is not None:
            with suppress(ConnectionLost):  # `_listen` notices
                self._link.control.send(event)
                return True
        return False

    def _lose(self) -> None:
        if self._link is not None:
            self._link.hang_up()
            self._link = None


def has_ended(pager: Pager, tree: LazyTree) -> bool:
    """Of a tree without lazy memory (mode stopcopy) the pager has nothing by which it would hear of the end."""
    return not pager.spaces() and (bool(tree.tasks) or descendants([tree.nursery_pid]) == [tree.nursery_pid])


def report_of(counters: Counters, *, ended: bool) -> Mapping[str, JsonValue]:
    """What DRAINED says, in the words of MigrateReport."""
    faults: dict[str, JsonValue] = asdict(counters.fault_us)
    return {**counters.pages(), "fault_us": faults, "ended": ended}
