"""The file locks of a tree are taken while it is built. In a move, where both hosts have one file system, its frozen
original has them still: those are awaited, and taken when it has let go of them (docs/adr/0028-file-locks.md).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

from lazyproc.errors import RestoreError
from lazyproc.facts import dataclass, field
from lazyproc.kernel import proc, remote
from lazyproc.kernel import tracee as ptrace
from lazyproc.kernel.filelocks import HELD_BY_ANOTHER, PATIENCE_S, PAUSE_S, room_for, taking
from lazyproc.kernel.remote import Bench
from lazyproc.model import FileLock, LockKind, OpenFile, RegularFile
from lazyproc.restore.creation import ending_for
from lazyproc.restore.site import Site


def take_locks(site: Site, files: Mapping[int, OpenFile]) -> None:
    """With the next run, when nothing will be closed any more: that would take the process's own (fcntl(2)) with it.
    What somebody else has is awaited.
    """
    locks = site.task.locks
    if locks:
        site.run_later(*taking(locks, site.bench), check=partial(_note, site, locks, files))


def _note(
    site: Site, locks: Sequence[FileLock], files: Mapping[int, OpenFile], results: Sequence[int]
) -> None:
    """Which of the locks are still awaited. Raises RestoreError for one that is not to be had."""
    awaited = []
    for lock, result in zip(locks, results, strict=True):
        if result in HELD_BY_ANOTHER and lock.kind is not LockKind.LEASE:
            awaited.append(lock)
        elif result < 0:
            raise _not_had(site, lock, files, os.strerror(-result))
    site.awaited = awaited


def _not_had(site: Site, lock: FileLock, files: Mapping[int, OpenFile], why: str) -> RestoreError:
    number = next(each.file_id for each in site.task.descriptors if each.fd == lock.fd)
    resource = files[number].resource
    path = f" ({resource.path})" if isinstance(resource, RegularFile) else ""
    return RestoreError(
        f"its {'lease' if lock.kind is LockKind.LEASE else 'file lock'} cannot be had: {why}",
        where=f"pid {site.task.vpid}: fd {lock.fd}{path}",
        remedy="lslocks shows who has locked the file, on the host of that process",
    )


@dataclass(frozen=True, slots=True)
class TreeLocks:
    """Those of a tree that stands, stopped; `files` are its open files."""

    sites: Mapping[int, Site] = field(default_factory=dict)
    files: Mapping[int, OpenFile] = field(default_factory=dict)

    def in_common(self) -> int:
        """How many the original is to let go of before this tree runs: those that are awaited, and those that both can
        have, for whose end who wants to write would have to wait.
        """
        return sum(
            len({*site.awaited, *(lock for lock in site.task.locks if not lock.exclusive)})
            for site in self.sites.values()
        )

    def demand_taken(self) -> None:
        """Raises RestoreError when somebody else has one."""
        for site in self.sites.values():
            for lock in site.awaited:
                raise _not_had(site, lock, self.files, "somebody else has it")

    def take_awaited(self) -> None:
        """The original has let go of them. Raises RestoreError when somebody else has one, and keeps it."""
        until = time.monotonic() + PATIENCE_S
        waiting = [site for site in self.sites.values() if site.awaited]
        with ExitStack() as stack:
            benches = [(site, stack.enter_context(_bench(site))) for site in waiting]
            while True:
                for site, bench in benches:
                    locks = site.awaited
                    _note(site, locks, self.files, bench.run(site.leader, [*taking(locks, bench)]))
                if not any(site.awaited for site in waiting) or time.monotonic() > until:
                    break
                time.sleep(PAUSE_S)
        self.demand_taken()


@contextmanager
def _bench(site: Site) -> Iterator[Bench]:
    """In a process that is complete; on leaving it is as it was."""
    states, maps = ptrace.states([site.leader]), proc.maps(proc.read(site.pid, "maps"))
    with remote.borrowed(
        [site.leader],
        states,
        site.memory,
        maps,
        ending=ending_for(site.task),
        size=room_for(len(site.awaited)),
    ) as bench:
        yield bench
