"""Memory that this host owes to trees it has taken in and that have not got all of theirs yet."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from lazyproc.errors import LazyprocError
from lazyproc.facts import dataclass
from lazyproc.migrate.desk import is_staffed
from lazyproc.migrate.journal import ARRIVING, DESTINATION, Record, records
from lazyproc.model import PAGE
from lazyproc.restore.lazytree import anchor_holders, from_facts
from lazyproc.uffd.pager import remaining

RUNNING = ("committed", "running")


@dataclass(frozen=True, slots=True)
class Promise:
    """Bytes that are still to come into these cgroups (controllers to path)."""

    bytes: int
    groups: Mapping[str, str]


def promises() -> Iterator[Promise]:
    """Of every tree that is on its way in or runs with missing pages."""
    for record in records():
        if record.role == DESTINATION and not record.rebooted and (pages := _outstanding(record)):
            yield Promise(pages * PAGE, record.facts.get("groups", {}))


def _outstanding(record: Record) -> int:
    """Before the map has come every page that may be touched is missing by the ledger: there was said to be less."""
    announced = int(record.facts.get("pages", 0))
    if record.state == ARRIVING:
        return announced if is_staffed(record.session, record.role) else 0
    return min(announced, pages_remaining(record.facts) or 0) if record.state in RUNNING else 0


def pages_remaining(facts: Mapping[str, Any]) -> int | None:
    """By the ledger that a running tree itself keeps; None without one."""
    if "tree" not in facts:
        return None
    for pid, number in anchor_holders(from_facts(facts["tree"]), "ledger"):
        with suppress(OSError, LazyprocError):
            fd = os.open(f"/proc/{pid}/fd/{number}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                return remaining(fd)
            finally:
                os.close(fd)
    return None
