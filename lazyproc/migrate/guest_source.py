"""The source's side of a guest's migration, in order: prepare, stop, hand over, commit, serve, quit.

As with a tree (source.py), but the guest is stopped and let go by QEMU's monitor, and its devices are saved by it. QEMU
at the destination has loaded them before the commit: what it refuses is known while the guest can still go on here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from threading import Event

from lazyproc.errors import LazyprocError, NoSuchProcess, Parked
from lazyproc.events import Listener, Over, StateChanged
from lazyproc.facts import asdict
from lazyproc.images.files import pack
from lazyproc.kernel.deaf import deaf, ignore_interrupts
from lazyproc.kernel.fds import AMPLE, make_room
from lazyproc.migrate.asking import asked, begin_trace
from lazyproc.migrate.held_guest import HeldGuest
from lazyproc.migrate.journal import Journal
from lazyproc.migrate.link import Chain
from lazyproc.migrate.moving import BUILD_S
from lazyproc.migrate.order import Order
from lazyproc.migrate.prepare import Offer
from lazyproc.migrate.report import MigrateReport
from lazyproc.migrate.serving import Serving, await_running, report_of
from lazyproc.migrate.talk import Refused, Unfit, expect
from lazyproc.pages.server import PageServer
from lazyproc.qemu import devices
from lazyproc.qemu.guest import Guest, to_facts
from lazyproc.qemu.qmp import FLUSH_S, Qmp
from lazyproc.qemu.ram import rows
from lazyproc.steps import Steps
from lazyproc.trace import TraceFile
from lazyproc.wire.native import Built, Commit, Images

ALONE = "leave its monitors alone, and try again"


def hand_over(
    qmp: Qmp,
    guest: Guest,
    chain: Chain,
    order: Order,
    journal: Journal,
    listener: Listener,
    trace: TraceFile | None,
) -> MigrateReport:
    """The whole of it over connections that stand."""
    control, held = chain.current.control, HeldGuest(guest)
    _agree(chain, guest, order, trace, listener)
    make_room(AMPLE)
    listener(StateChanged("prepared", time.monotonic()))
    with ExitStack() as last, ExitStack() as stack:
        steps, frozen_at = Steps(), time.monotonic()
        sent = stack.enter_context(_recorded(qmp, held, journal))
        steps.done("stop")
        state = devices.saved(qmp, guest.machine, ran=guest.running)
        steps.done("devices")
        control.send(Images(pack({devices.NAME: state})))
        steps.done("send")
        pages = stack.enter_context(held.open())
        server = stack.enter_context(PageServer(pages.segments()))
        serving = Serving(chain, server, held.extents, guest.pid, listener, trace)
        serving.answer(chain.current)
        steps.done("serve")
        listener(StateChanged("frozen", frozen_at))
        demand_unchanged(qmp, guest)  # while it is loaded there
        expect(control, Built, BUILD_S)
        steps.done("built")
        demand_stopped(qmp)
        ignore_interrupts()
        last.enter_context(deaf())  # until all is put away
        control.send(Commit())
        sent.set()
        await_running(serving, journal, steps, listener)
        qmp.close()  # whoever else wants the monitor may have it now
        report = report_of(journal.facts, serving.until_drained(None), server, chain)
    _put_away(report, held, serving, journal, listener)
    return report


def demand_stopped(qmp: Qmp) -> None:
    """Inside `standing`. Raises LazyprocError when somebody else has let it go on meanwhile, also if it stands again by
    now, or has reset it (`prelaunch`); ConnectionLost when QEMU has ended.
    """
    if qmp.execute("query-status")["status"] != "paused" or qmp.came("RESUME"):
        raise LazyprocError(
            "somebody else has continued the guest, or has reset it", where=qmp.path, remedy=ALONE
        )


def demand_unchanged(qmp: Qmp, guest: Guest) -> None:
    """Raises LazyprocError when its RAM is not what was looked at before it was stopped: memory was plugged, or a
    firmware has made its tables anew.
    """
    if set(rows(qmp.hmp("info ramblock"))) != {each.named for each in guest.blocks}:
        raise LazyprocError("the guest has other RAM than a moment ago", where=qmp.path, remedy=ALONE)


def _agree(chain: Chain, guest: Guest, order: Order, trace: TraceFile | None, listener: Listener) -> None:
    """The destination has an empty QEMU for it. Raises Unfit, LazyprocError."""
    control = chain.current.control
    fields = {**order.fields(), "trace": trace is not None, "guest": guest.offer()}
    answer = asked(control, Offer(guest.pages, 1, 0, {}, ""), (), fields, listener)
    if isinstance(answer, tuple):
        raise Unfit(answer)
    if trace is not None:
        begin_trace(trace, chain.session, control.peer, answer)


@contextmanager
def _recorded(qmp: Qmp, held: HeldGuest, journal: Journal) -> Iterator[Event]:
    """As `standing`. The record comes before the stop: whoever finds it lets the guest go on."""
    facts = {"held": to_facts(held.guest), "root_vpid": held.root_pid, "frozen_at": time.time()}

    def record() -> None:
        journal.write("parked", durable=False, **facts)

    sent = Event()
    with held.alone(), standing(qmp, held, sent, record, journal.remove):
        yield sent


@contextmanager
def standing(
    qmp: Qmp,
    held: HeldGuest,
    sent: Event,
    begun: Callable[[], object] = lambda: None,
    called_off: Callable[[], object] = lambda: None,
) -> Iterator[None]:
    """Inside, the guest stands still; `begun` is called right before it is stopped. It goes on here after an error
    before the event `sent` was set, or when the other side says no: then it was `called_off`. After any other error it
    stays, since it may run there.

    Raises LazyprocError when it is no longer as it was seen, and then it is left alone.
    """
    qmp.forget()  # what came before says nothing of the time from now on
    if (qmp.execute("query-status")["running"] is True) != held.guest.running:
        raise LazyprocError(
            "somebody else has stopped or continued the guest", where=qmp.path, remedy="try again"
        )
    begun()
    try:
        if held.guest.running:
            qmp.execute("stop", timeout=FLUSH_S)
        yield
    except BaseException as error:
        if sent.is_set() and not isinstance(error, Refused):
            raise
        with deaf():
            let_go_on(qmp, held)
            called_off()
        raise


def let_go_on(qmp: Qmp, held: HeldGuest) -> None:
    """By the connection that is there: whoever waits for the monitor would get in before us. Raises Parked,
    NoSuchProcess.
    """
    if not held.guest.running:
        return
    try:
        _continued(qmp, held)
    except NoSuchProcess:
        raise
    except (LazyprocError, TimeoutError) as error:
        raise Parked(
            f"the guest stands still, and could not be continued: {error}",
            where=f"QEMU of pid {held.root_pid}",
            remedy="use `cont` in its monitor",
        ) from error


def _continued(qmp: Qmp, held: HeldGuest) -> None:
    try:
        qmp.execute("cont", timeout=FLUSH_S)
    except (LazyprocError, TimeoutError):
        qmp.close()
        held.let_run()


def _put_away(
    report: MigrateReport, held: HeldGuest, serving: Serving, journal: Journal, listener: Listener
) -> None:
    """Every page is there, and nothing of it is needed here."""
    journal.note(journal.facts["state"], listener, {"report": asdict(report)})
    held.end()
    serving.release()
    listener(Over(report))
    journal.remove()
    listener(StateChanged("released", time.monotonic()))
