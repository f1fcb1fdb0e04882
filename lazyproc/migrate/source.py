"""The source's side of a migration, in order: prepare, freeze, hand over, commit, serve, release.

Until COMMIT is sent every failure ends with the tree running as if nothing had happened. Once COMMITTED has come
it never runs here again. In between is doubt: the tree stays stopped and the operator is told.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lazyproc.dump.apart import demand_apart
from lazyproc.dump.before import Before, look_before, observed_sleeps
from lazyproc.dump.explain import examine_again
from lazyproc.dump.freeze import FrozenTree, frozen_tree
from lazyproc.dump.gather import Dump, dumped
from lazyproc.dump.late import late_signals
from lazyproc.dump.source import DumpPages, dump_pages
from lazyproc.dump.tcp import hang_up, silence
from lazyproc.errors import UsageError
from lazyproc.events import Listener, Over, StateChanged, ignore
from lazyproc.facts import asdict
from lazyproc.kernel.deaf import deaf, ignore_interrupts
from lazyproc.kernel.fds import AMPLE, make_room
from lazyproc.kernel.netfilter import Hold
from lazyproc.migrate.agreeing import agreed
from lazyproc.migrate.description import description
from lazyproc.migrate.going_on import releaser_of
from lazyproc.migrate.holding import Holding
from lazyproc.migrate.journal import Journal
from lazyproc.migrate.link import Chain
from lazyproc.migrate.moving import BUILD_S, moved, way_to
from lazyproc.migrate.order import USUAL, Order
from lazyproc.migrate.parking import Standing, parked_tree
from lazyproc.migrate.report import MigrateReport
from lazyproc.migrate.serving import Serving, await_running, report_of
from lazyproc.migrate.talk import expect
from lazyproc.pages.channel import Channel
from lazyproc.pages.peer import Trust
from lazyproc.pages.server import PageServer
from lazyproc.pages.tls import Tls
from lazyproc.steps import Steps
from lazyproc.trace import TraceFile
from lazyproc.wire.native import Built, Commit, Images

FRESH_S = 0.5  # what was seen longer ago, before ssh had come through, is looked at again


def migrate(
    pid: int,
    target: str,
    order: Order = USUAL,
    *,
    insecure: bool = False,
    tls: Tls | None = None,
    listener: Listener = ignore,
    retry_for: float | None = None,
    trace: Path | str | None = None,
) -> MigrateReport:
    """Move the tree under `pid` to the receiver at `target` (HOST:PORT); returns when its memory has followed.

    With ssh://[USER@]HOST[:PORT] it is started there, through ssh(1); ssh://HOST/N names one on 127.0.0.1:N there.
    With `tls` both ends prove who they are, and nobody can listen; see lazyproc.Tls. Without it only a receiver on this
    host that is root's or our own user's is talked to, unless `insecure` takes any. The faults at the destination are
    written to `trace` (docs/trace.md). The work is done in a process that outlives this one; a lost connection is
    opened again for `retry_for` seconds (None: until it comes).

    Raises CannotBeDone (Unfit: by the other host), Refused, ConnectionLost, the dump's errors and LazyprocError
    (`trace` cannot be written) with the tree running as before; Parked when that is not known, or when it runs there
    and its memory has stopped following.
    """
    order.demand_known()
    if order.release and order.mode != "postcopy":
        raise UsageError(f"nothing is released in mode {order.mode}", remedy="leave out --mode or --release")
    way = way_to(target, Trust(insecure, tls=tls))
    return moved(TreeMove(pid, order), way, listener=listener, retry_for=retry_for, trace=trace)


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


def look(pid: int, listener: Listener = ignore, *, tcp_close: bool = False) -> Before:
    """What is learned while the tree still runs. Raises CannotBeDone with all obstacles."""
    return look_before(examine_again(pid, tcp_close=tcp_close, listener=listener), tcp_close=tcp_close)


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
        with parked_tree(tree, dump, hold, journal, began, steps) as standing:
            held = standing.held
            steps.done("park")
            listener(StateChanged("frozen", frozen_at))  # only now: who hears it takes a processor
            built = _await_built(control, dump, held, steps)
            settle()
            last.enter_context(deaf())  # until all is put away
            if built.fields.get("locks"):
                _let_go_of_locks(standing, dump, steps)
            control.send(Commit(late_signals(tree, dump.checkpoint).fields()))
            standing.committing = True
            await_running(serving, journal, steps, listener)
            hang_up(dump.given_up)
            with releaser_of(order.release, held, server, journal, listener, traced=True) as releaser:
                drained = serving.until_drained(releaser)
        report = report_of(journal.facts, drained, server, chain)
        _put_away(report, tree, dump, serving, journal, listener)
    return report


def _await_built(control: Channel, dump: Dump, held: Holding, steps: Steps) -> Built:
    """The last moment in which it may be called off. Raises CannotBeDone, and what `expect` raises."""
    dump.demand_no_waiter()  # which takes 10 ms, when nobody has asked for 10 ms (kernel/proc_locks.py)
    built = expect(control, Built, BUILD_S)
    steps.done("built")
    dump.demand_idle_rings()
    held.demand_there()
    steps.done("check")
    return built


def _let_go_of_locks(standing: Standing, dump: Dump, steps: Steps) -> None:
    """The other side has the same files, and is about to take them. Raises CannotBeDone when somebody here waits for
    one, who would be the first to get it.
    """
    dump.demand_no_waiter()
    standing.let_go_of_locks()
    steps.done("locks")


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
