"""What stands in the way of a guest, by its QEMU and by what this host has begun with it already."""

from __future__ import annotations

from collections.abc import Iterator

from lazyproc.errors import CannotBeDone, Obstacle
from lazyproc.migrate.guest_records import begun, ways_of, went_alone
from lazyproc.migrate.journal import Record
from lazyproc.qemu.guest import Guest, look
from lazyproc.qemu.guest import obstacles as obstacles_of
from lazyproc.qemu.qmp import Qmp


def looked_at(qmp: Qmp, *, again: bool = False) -> Guest:
    """Raises CannotBeDone with all that stands in the way, and what `look` does."""
    guest = look(qmp)
    demand_movable(qmp, guest, again=again)
    return guest


def demand_movable(qmp: Qmp, guest: Guest, *, again: bool = False) -> None:
    """Raises CannotBeDone with all that stands in the way."""
    if found := tuple(obstacles(qmp, guest, again=again)):
        raise CannotBeDone(found)


def obstacles(qmp: Qmp, guest: Guest, *, again: bool = False) -> Iterator[Obstacle]:
    """Everything of it that cannot be moved; with `again`, by who goes on giving the pages of a guest that has left."""
    yield from obstacles_of(qmp, guest)
    for record in begun(guest):
        # Whoever has continued it here has decided that it does not run there.
        if not (went_alone(record) and (again or guest.running)):
            yield _of_record(guest, record)


def _of_record(guest: Guest, record: Record) -> Obstacle:
    from lazyproc.migrate.sessions import ORPHANED, state_of  # there is seldom a record, and each move asks

    peer = record.facts.get("peer", "another host")
    if state_of(record) != ORPHANED:
        why = f"has moved, or is about to: it is held for {peer}"
        remedy = f"wait until that is over (session {record.session}, lazyproc sessions)"
        return Obstacle(guest.pid, "guest", why, remedy)
    why = f"has moved to {peer}, or was about to, and nobody works on that any more"
    remedy = ways_of(record) if went_alone(record) else f"go on with lazyproc resume {record.session}"
    return Obstacle(guest.pid, "guest", why, remedy)
