"""The sessions of a host, as text and as JSON."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lazyproc.facts import asdict
from lazyproc.show.text import table

if TYPE_CHECKING:
    from lazyproc.migrate.sessions import SessionInfo

COLUMNS = ("session", "role", "state", "for", "root", "pages missing", "peer")


def sessions_fields(found: Sequence[SessionInfo]) -> list[dict[str, object]]:
    """What `--json` prints."""
    return [asdict(info) for info in found]


def sessions_text(found: Sequence[SessionInfo]) -> str:
    """A table, with what there is to say below it."""
    if not found:
        return "no sessions"
    rows = [COLUMNS, *(_row(info) for info in found)]
    reasons = [f"{info.id}: {info.reason}" for info in found if info.reason]
    return "\n".join([table(rows), *reasons])


def _row(info: SessionInfo) -> tuple[str, ...]:
    missing = "" if info.pages_remaining is None else str(info.pages_remaining)
    age = f"{max(0, time.time() - info.since):.0f} s"
    return info.id, info.role, info.state, age, str(info.root_pid or ""), missing, info.peer
