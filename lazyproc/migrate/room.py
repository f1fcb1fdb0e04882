"""How much memory this host, or a cgroup that a tree would be in, has left for it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from lazyproc.facts import dataclass, replace
from lazyproc.kernel.cgroup import V2, Hierarchy, hierarchies
from lazyproc.migrate.promises import Promise

UNLIMITED_V1 = 1 << 62  # what memory.limit_in_bytes says without a limit is near 2**63


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes that can be used without swapping, and what sets the limit; `limit` is the file to raise it in."""

    bytes: int
    whose: str = "this host"
    limit: str = ""
    promised: int = 0  # bytes that are free and belong to trees which came before


@dataclass(frozen=True, slots=True)
class Controller:
    """Where a version of cgroups says how many bytes may be and are used (cgroup-v2.rst, cgroup-v1/memory.rst)."""

    limit: str
    usage: str
    page_cache: str  # in memory.stat: counted as used, and given back before anybody is killed


MEMORY_V1 = Controller("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
MEMORY_V2 = Controller("memory.max", "memory.current", "inactive_file")


def least_room(groups: Mapping[str, str], promised: Sequence[Promise] = ()) -> Room:
    """MemAvailable, or less where a memory cgroup limits a tree that is in `groups` (controllers to path), without what
    was `promised` to trees there.
    """
    meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    host = Room(int(meminfo["MemAvailable"].split()[0]) * 1024)
    found = [_less(host, sum(each.bytes for each in promised))]
    for each in hierarchies():
        if each.controllers == V2 or "memory" in each.controllers.split(","):
            found += rooms(each, groups.get(each.controllers, each.own), promised)
    return min(found, key=lambda room: room.bytes)


def _less(room: Room, promised: int) -> Room:
    return replace(room, bytes=room.bytes - promised, promised=promised)


def rooms(hierarchy: Hierarchy, path: str, promised: Sequence[Promise] = ()) -> Iterator[Room]:
    """What is left in a group and in each above it, as far as they have limits and are to be seen here."""
    controller = MEMORY_V2 if hierarchy.controllers == V2 else MEMORY_V1
    while hierarchy.shows(path):
        folder = Path(hierarchy.folder(path))
        with suppress(OSError):
            limit = (folder / controller.limit).read_text().strip()
            if limit != "max" and int(limit) < UNLIMITED_V1:
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                used = int((folder / controller.usage).read_text()) - int(stat[controller.page_cache])
                room = Room(int(limit) - used, f"cgroup {path}", controller.limit)
                yield _less(room, _promised_in(promised, hierarchy.controllers, path))
        if path == hierarchy.root:
            return
        path = os.path.dirname(path)


def _promised_in(promised: Sequence[Promise], controllers: str, path: str) -> int:
    """Bytes that are to come into a group or below it. Pure."""
    below = path.rstrip("/") + "/"
    return sum(each.bytes for each in promised if f"{each.groups.get(controllers, '')}/".startswith(below))
