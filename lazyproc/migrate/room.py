"""How much memory this host, or a cgroup that a tree would be in, has left for it, and for how many tasks."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from lazyproc.errors import Obstacle
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
    for group, folder in _upwards(hierarchy, path):
        with suppress(OSError):
            limit = (folder / controller.limit).read_text().strip()
            if limit != "max" and int(limit) < UNLIMITED_V1:
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                used = int((folder / controller.usage).read_text()) - int(stat[controller.page_cache])
                room = Room(int(limit) - used, f"cgroup {group}", controller.limit)
                yield _less(room, _promised_in(promised, hierarchy.controllers, group))


def short_of_tasks(groups: Mapping[str, str], count: int) -> Iterator[Obstacle]:
    """The groups in which there is no room for so many more processes and threads."""
    for group, left in _task_rooms(groups):
        if left < count:
            why = f"building the tree takes {count} processes and threads, and cgroup {group} has room for {left}"
            yield Obstacle(0, "host", why, "raise its pids.max, or name another group with --cgroup")


def _task_rooms(groups: Mapping[str, str]) -> Iterator[tuple[str, int]]:
    """How many more may be in each group of a tree that has a limit (pids.max of both versions)."""
    for each in hierarchies():
        for group, folder in _upwards(each, groups.get(each.controllers, each.own)):
            with suppress(OSError):  # it has no such controller
                limit = (folder / "pids.max").read_text().strip()
                if limit != "max":
                    yield group, max(0, int(limit) - int((folder / "pids.current").read_text()))


def _upwards(hierarchy: Hierarchy, path: str) -> Iterator[tuple[str, Path]]:
    """A group and those above it that are to be seen here, with their directories."""
    while hierarchy.shows(path):
        yield path, Path(hierarchy.folder(path))
        if path == hierarchy.root:
            return
        path = os.path.dirname(path)


def _promised_in(promised: Sequence[Promise], controllers: str, path: str) -> int:
    """Bytes that are to come into a group or below it. Pure."""
    below = path.rstrip("/") + "/"
    return sum(each.bytes for each in promised if f"{each.groups.get(controllers, '')}/".startswith(below))
