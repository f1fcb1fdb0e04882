"""The source's side of a migration, in order: prepare, freeze, hand over, commit, serve, release.

Until COMMIT is sent every failure ends with the tree running as if nothing had happened. Once COMMITTED has come
it never runs here again. In between is doubt: the tree stays stopped and the operator is told.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from lazyproc.dump.before import Before, look_before, observed_sleeps
from lazyproc.dump.explain import examine
from lazyproc.dump.freeze import FrozenTree, frozen_tree
from lazyproc.dump.gather import Dump, dumped
from lazyproc.dump.source import DumpPages, dump_pages
from lazyproc.dump.tcp import hang_up, silence
from lazyproc.errors import (
    CannotBeDone,
    ConnectionLost,
    LazyprocError,
    LostAfterCommit,
    Parked,
    ProtocolError,
)
from lazyproc.events import Listener, PagesMoved, StateChanged, ignore
from lazyproc.facts import dataclass
from lazyproc.images.convert import to_images
from lazyproc.images.files import pack
from lazyproc.kernel.deaf import deaf
from lazyproc.kernel.netfilter import Hold
from lazyproc.migrate.asking import asked
from lazyproc.migrate.link import Link, dialled
from lazyproc.migrate.prepare import offer_of
from lazyproc.migrate.report import MigrateReport
from lazyproc.migrate.talk import Refused, Unfit, checked, expect, milliseconds
from lazyproc.pages.bundle import NAME, pack_bundle
from lazyproc.pages.peer import Trust
from lazyproc.pages.remote import map_of
from lazyproc.pages.server import PageServer
from lazyproc.pages.transport import Channel
from lazyproc.trace import Clock, TraceFile
from lazyproc.wire.native import (
    Built,
    Commit,
    Committed,
    Drained,
    Images,
    Party,
    Released,
    Running,
    Trace,
)

BUILD_S = 60.0
POLL_S = 0.1
LOOKS = 3
LOOK_AGAIN_S = 0.02


@dataclass(frozen=True, slots=True)
class Order:
    """What the user asked for."""

    mode: str = "postcopy"  # or stopcopy
    policy: str = "sequential"
    bulk: bool = True
    max_rate: int = 0  # bytes a second, 0 without limit
    tcp_close: bool = False  # TCP connections to others are given up

    def fields(self) -> dict[str, str | int | bool]:
        return {name: getattr(self, name) for name in self.__slots__}


def migrate(
    pid: int,
    target: str,
    order: Order,
    *,
    insecure: bool,
    listener: Listener,
    trace: Path | str | None = None,
) -> MigrateReport:
    """Move the tree under `pid` to the receiver at `target` (HOST:PORT); returns when its memory has followed.

    The faults at the destination go to `trace` (docs/trace.md). Raises CannotBeDone (Unfit: by the other
    host), Refused, ConnectionLost, LazyprocError (`trace` cannot be written), the dump's errors, with the tree running
    as before; Parked when it is not known whether the other side has it; LostAfterCommit.
    """
    started = time.monotonic()
    with ExitStack() as stack:
        file = stack.enter_context(TraceFile(trace, listener)) if trace is not None else None
        before = look(pid, listener, tcp_close=order.tcp_close)
        link = stack.enter_context(dialled(target, Party.SOURCE, Trust(insecure)))
        return hand_over(pid, link, before, order, started, listener, trace=file)


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
    link: Link,
    before: Before,
    order: Order,
    started: float,
    listener: Listener,
    *,
    trace: TraceFile | None = None,
) -> MigrateReport:
    """The whole of it over connections that stand, whoever opened them; see `migrate`."""
    _prepare(link, before, order, trace, listener)
    listener(StateChanged("prepared", time.monotonic()))
    with ExitStack() as last, ExitStack() as stack:
        hold = stack.enter_context(Hold(link.session.id))
        hold.add(before.flows)
        asleep = observed_sleeps(pid)
        frozen = time.monotonic()
        tree = stack.enter_context(frozen_tree(pid, asleep=asleep))
        stack.callback(hold.release)  # before the tree is let go: its sends must not fail
        listener(StateChanged("frozen", time.monotonic()))
        dump, pages = stack.enter_context(_described(tree, before, hold, order.tcp_close))
        server = stack.enter_context(PageServer(pages.segments()))
        _offer(link, dump, pages, server, order)
        last.enter_context(deaf())  # until all is put away
        _commit(link, tree)
        frozen_ms = milliseconds(frozen)
        with _lost_from_here(tree, server):
            running = expect(link.control, Running, BUILD_S)
            blackout_ms = milliseconds(frozen)
            listener(StateChanged("running", time.monotonic()))
            hang_up(dump.given_up)
            drained = _serve(link, dump, server, order, listener, trace).fields
        silence(dump.connections)
        tree.kill()
        dump.remove_segments()
        with suppress(ConnectionLost):  # it has every page and does without this word
            link.control.send(Released())
        listener(StateChanged("released", time.monotonic()))
    return MigrateReport(
        session=link.session.id,
        mode=order.mode,
        root_pid=_number(running.fields, "root_pid"),
        root_vpid=dump.checkpoint.root.vpid,
        frozen_ms=frozen_ms,
        blackout_ms=blackout_ms,
        total_ms=milliseconds(started),
        rtt_us=rtt_us(link.control),
        pages_total=_number(drained, "pages_total"),
        pages_zero=_number(drained, "pages_zero"),
        pages_eager=_number(drained, "pages_eager"),
        pages_urgent=_number(drained, "pages_urgent"),
        pages_bulk=_number(drained, "pages_bulk"),
        pages_dropped=_number(drained, "pages_dropped"),
        bytes_wire=sum(c.bytes_in + c.bytes_out for c in server.counters().values()),
        reconnects=0,
        fault_us=_faults(drained),
        ended=drained.get("ended") is True,
    )


def _prepare(link: Link, before: Before, order: Order, trace: TraceFile | None, listener: Listener) -> None:
    """Raises Unfit with all that stands in the way at the destination."""
    wishes = {**order.fields(), "trace": trace is not None}
    answer = asked(link.control, offer_of(before.smaps), before.wanted, wishes, listener)
    if isinstance(answer, tuple):
        raise Unfit(answer)
    clock = answer.fields.get("trace")
    if trace is None:
        return
    if not isinstance(clock, dict):
        raise LazyprocError(
            "the receiver sends no trace", where=link.control.peer, remedy="update it, or leave out --trace"
        )
    trace.begin(link.session.id, Clock(_number(clock, "monotonic_ns"), _number(clock, "realtime_ns")))


@contextmanager
def _described(
    tree: FrozenTree, before: Before, hold: Hold, tcp_close: bool
) -> Iterator[tuple[Dump, DumpPages]]:
    with (
        dumped(tree, smaps=before.smaps, guarded=before.guarded, tcp_close=tcp_close, hold=hold.add) as dump,
        dump_pages(dump) as pages,
    ):
        yield dump, pages


def _offer(link: Link, dump: Dump, pages: DumpPages, server: PageServer, order: Order) -> None:
    """Send the description and what must be there at once; the other side builds the tree from it."""
    server.serve(link.urgent.detach(), "urgent")
    server.serve(link.bulk.detach(), "bulk")
    checkpoint = dump.checkpoint if order.mode == "postcopy" else dump.whole()
    images = to_images(checkpoint)
    images[NAME] = pack_bundle(checkpoint.memory, pages)
    link.control.send(Images(pack(images)))
    expect(link.control, Built, BUILD_S)
    dump.demand_idle_rings()


def _commit(link: Link, tree: FrozenTree) -> None:
    """From COMMIT on the tree stays stopped whatever becomes of us, unless the other side says no."""
    tree.stop_for_good()
    try:
        link.control.send(Commit())
        _await_committed(link, tree)
    except (ConnectionLost, Refused):  # it has not left, or was answered with no
        tree.not_for_good()
        raise


def _await_committed(link: Link, tree: FrozenTree) -> None:
    """Only the other side knows who runs the tree until it has said so."""
    try:
        expect(link.control, Committed, BUILD_S)
    except (ConnectionLost, ProtocolError) as error:
        pids = _pids(tree)
        raise Parked(
            f"it is not known whether it runs on the other host ({error.what}); it stays stopped here",
            where=f"pid {pids[0]}",
            remedy=f"if it does not run there, let it run here with: kill -CONT {' '.join(pids)}",
        ) from error


@contextmanager
def _lost_from_here(tree: FrozenTree, server: PageServer) -> Iterator[None]:
    """The tree runs on the other host, which has failed or gone before it had every page."""
    try:
        yield
    except LazyprocError as error:
        sent = sum(counters.pages + counters.zero for counters in server.counters().values())
        pids = _pids(tree)
        raise LostAfterCommit(
            f"the move to the other host was lost after {sent} pages ({error.what}); it stays stopped here",
            where=f"pid {pids[0]}",
            remedy=f"if it does not run there, let it run here with: kill -CONT {' '.join(pids)}; else end it",
        ) from error


def _pids(tree: FrozenTree) -> list[str]:
    return [str(task.pid) for task in tree.tasks.values() if not task.zombie]


def _serve(
    link: Link, dump: Dump, server: PageServer, order: Order, listener: Listener, trace: TraceFile | None
) -> Drained:
    """Tell what there is, then wait while the C threads serve it."""
    extents = dump.lazy_extents() if order.mode == "postcopy" else {}
    link.control.send(map_of(extents))
    total = sum(e.count for runs in extents.values() for e in runs)
    while not isinstance(event := link.control.receive(POLL_S), Drained):
        if isinstance(event, Trace) and trace is not None:
            trace.write(event.records, event.lost)
        elif event is not None:
            return checked(event, Drained, link.control)
        counters = server.counters()
        urgent, bulk = counters["urgent"], counters["bulk"]
        zero = urgent.zero + bulk.zero
        moved = urgent.pages + bulk.pages
        listener(PagesMoved(total, moved, zero, urgent.pages, bulk.pages, 0))
    return event


def _number(fields: Mapping[str, object], name: str) -> int:
    value = fields.get(name)
    if not isinstance(value, int):
        raise ProtocolError(f"the receiver gave no {name}")
    return value


def _faults(fields: Mapping[str, object]) -> dict[str, float]:
    faults = fields.get("fault_us")
    if not isinstance(faults, dict):
        raise ProtocolError("the receiver gave no fault_us")
    return {str(name): float(value) for name, value in faults.items()}


def rtt_us(channel: Channel) -> float:
    """The kernel's smoothed round trip time, tcpi_rtt of struct tcp_info (tcp(7))."""
    info = channel.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    return float(struct.unpack_from("<I", info, 68)[0])
