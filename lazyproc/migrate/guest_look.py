"""What stands in the way of a guest, by its QEMU and by what this host has begun with it already."""

from __future__ import annotations

from collections.abc import Iterator

from lazyproc.errors import CannotBeDone, Obstacle
from lazyproc.migrate.journal import ENDED, SOURCE, records
from lazyproc.qemu.guest import Guest, look
from lazyproc.qemu.guest import obstacles as obstacles_of
from lazyproc.qemu.qmp import Qmp


def looked_at(qmp: Qmp) -> Guest:
    """Raises CannotBeDone with all that stands in the way, and what `look` does."""
    guest = look(qmp)
    demand_movable(qmp, guest)
    return guest


def demand_movable(qmp: Qmp, guest: Guest) -> None:
    """Raises CannotBeDone with all that stands in the way."""
    if found := tuple(obstacles(qmp, guest)):
        raise CannotBeDone(found)


def obstacles(qmp: Qmp, guest: Guest) -> Iterator[Obstacle]:
    """Everything of it that cannot be moved."""
    yield from obstacles_of(qmp, guest)
    yield from _begun(guest)


def _begun(guest: Guest) -> Iterator[Obstacle]:
    """A QEMU whose guest has gone looks like one whose guest is paused, and has what is missing there."""
    for record in records():
        held = record.facts.get("held")
        if record.role != SOURCE or record.state in ENDED or record.rebooted or not isinstance(held, dict):
            continue
        if (held.get("pid"), held.get("started")) == (guest.pid, guest.started):
            why = f"has moved, or is about to: it is held for {record.facts.get('peer', 'another host')}"
            remedy = f"wait until that is over (session {record.session}, lazyproc sessions)"
            yield Obstacle(guest.pid, "guest", why, remedy)
