"""What the source keeps until every page has gone: a parked tree, or a QEMU whose guest is stopped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from lazyproc.model import Extent, MemoryObject
from lazyproc.pages.frozen import FrozenPages


class Held(Protocol):
    """Known by numbers and paths alone, so that another process can go on when the one that took it is gone."""

    @property
    def root_pid(self) -> int: ...

    def extents(self) -> dict[MemoryObject, tuple[Extent, ...]]:
        """Every page with content that may be asked for. Raises NoSuchProcess."""

    def open(self) -> FrozenPages:
        """The pages where they lie. Raises NoSuchProcess, PermissionDenied."""

    def stands(self) -> bool:
        """Whether all of it stands still."""

    def ended(self) -> int | None:
        """The pid of a process of it that somebody has killed."""

    def demand_there(self) -> None:
        """Raises NoSuchProcess when one of it has been killed."""

    def let_run(self) -> None:
        """It goes on here."""

    def end(self) -> None:
        """It is not needed any more."""


def held_by(facts: Mapping[str, Any]) -> Held:
    """By the facts of a record that has "held". Raises KeyError, TypeError, ValueError for anything else."""
    if facts.get("kind") == "guest":
        from lazyproc.migrate.held_guest import HeldGuest
        from lazyproc.qemu.guest import from_facts as guest_of

        return HeldGuest(guest_of(facts["held"]))
    from lazyproc.migrate.holding import from_facts

    return from_facts(facts["held"])
