"""A guest to another host. What is imported before the other side is called delays the start of the QEMU there."""

from __future__ import annotations

from pathlib import Path

from lazyproc.errors import LazyprocError, UsageError
from lazyproc.events import Listener, ignore
from lazyproc.facts import replace
from lazyproc.migrate.guest_look import demand_movable, looked_at
from lazyproc.migrate.journal import Journal
from lazyproc.migrate.link import Chain
from lazyproc.migrate.moving import moved, way_to
from lazyproc.migrate.order import USUAL, Order
from lazyproc.migrate.report import MigrateReport
from lazyproc.pages.peer import Trust
from lazyproc.pages.tls import Tls
from lazyproc.qemu.guest import glance
from lazyproc.qemu.qmp import Qmp
from lazyproc.trace import TraceFile

# A guest's system lies around the places where it works, and what is behind them by address may never be touched.
POLICY = "pivots"


def migrate_guest(
    monitor: str,
    target: str,
    order: Order = USUAL,
    *,
    insecure: bool = False,
    tls: Tls | None = None,
    listener: Listener = ignore,
    retry_for: float | None = None,
    trace: Path | str | None = None,
) -> MigrateReport:
    """Move the guest of the QEMU whose QMP monitor is the unix socket `monitor` to the receiver at `target`, which has
    been given the command line of a QEMU; returns when its memory has followed, and quits QEMU here.

    The rest is as with lazyproc.migrate. Raises what that does; Refusal for what QEMU does not want.
    """
    order.demand_known()
    if order.mode != "postcopy" or order.release or order.tcp_close:
        raise UsageError(
            "a guest moves in mode postcopy, and as a whole",
            remedy="leave out --mode, --release and --tcp-close",
        )
    way = way_to(target, Trust(insecure, tls=tls))
    return moved(GuestMove(monitor, order), way, listener=listener, retry_for=retry_for, trace=trace)


class GuestMove:
    """The guest behind a monitor."""

    def __init__(self, monitor: str, order: Order) -> None:
        self._monitor = monitor
        self._order = replace(order, policy=order.policy or POLICY)
        self._pid = 0

    @property
    def facts(self) -> dict[str, object]:
        return {"root_pid": self._pid, "mode": self._order.mode, "release": False, "kind": "guest"}

    def look(self, listener: Listener) -> None:
        """At what can be told at once. Its RAM is looked for when the other side has answered, and starts a QEMU."""
        with Qmp(self._monitor) as qmp:
            guest = glance(qmp)
            demand_movable(qmp, guest)
        self._pid = guest.pid

    def hand_over(
        self, chain: Chain, journal: Journal, listener: Listener, trace: TraceFile | None
    ) -> MigrateReport:
        from lazyproc.migrate.guest_source import hand_over  # while the QEMU there starts

        with Qmp(self._monitor) as qmp:
            guest = looked_at(qmp)
            if guest.pid != self._pid:
                raise LazyprocError(
                    f"was the monitor of pid {self._pid} a moment ago, and is that of pid {guest.pid}",
                    where=self._monitor,
                    remedy="give each QEMU a path of its own (-qmp)",
                )
            return hand_over(qmp, guest, chain, self._order, journal, listener, trace)
