"""How much memory this host, or the cgroup we are in, has left for a tree."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from lazyproc.facts import dataclass
from lazyproc.kernel import proc

MOUNT = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Controller:
    """Where a version of cgroups says how many bytes may be and are used (cgroup-v2.rst, cgroup-v1/memory.rst)."""

    mounts: tuple[Path, ...]
    limit: str
    usage: str
    page_cache: str  # in memory.stat: counted as used, and given back before anybody is killed


V1 = Controller((MOUNT / "memory",), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = Controller((MOUNT, MOUNT / "unified"), "memory.max", "memory.current", "inactive_file")


def available_memory() -> int:
    """Bytes that can be used without swapping: MemAvailable, or less where a memory cgroup limits us."""
    meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return min([int(meminfo["MemAvailable"].split()[0]) * 1024, *_cgroup_rooms()])


def _cgroup_rooms() -> Iterator[int]:
    for controllers, path in proc.cgroup(proc.read(os.getpid(), "cgroup")).items():
        if "memory" in controllers.split(","):
            yield from _rooms(V1, path)
        elif not controllers:
            yield from _rooms(V2, path)


def _rooms(controller: Controller, path: str) -> Iterator[int]:
    """What is left in a cgroup and in each above it, as far as they have limits and are to be seen here."""
    for mount in controller.mounts:
        folder = mount / path.lstrip("/")
        while folder.is_relative_to(mount):
            with suppress(OSError):
                limit = (folder / controller.limit).read_text().strip()
                if limit != "max":
                    stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                    used = int((folder / controller.usage).read_text()) - int(stat[controller.page_cache])
                    yield int(limit) - used
            folder = folder.parent
