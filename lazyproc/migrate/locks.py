"""The file locks of a parked tree: let go of right before COMMIT, where its copy is to have them, and taken again
before any thread runs here after all (docs/adr/0028-file-locks.md).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TypeAlias

from lazyproc.errors import LazyprocError, NoSuchProcess, Parked
from lazyproc.kernel import park
from lazyproc.kernel.filelocks import (
    HELD_BY_ANOTHER,
    PATIENCE_S,
    PAUSE_S,
    holders,
    letting_go,
    room_for,
    taking,
)
from lazyproc.kernel.park import ParkedProcess
from lazyproc.kernel.parked import bench_in, unfiltered
from lazyproc.kernel.remote import Bench, Call
from lazyproc.model import FileLock

Locks: TypeAlias = Mapping[int, Sequence[FileLock]]  # of a tree, by pid


class LockTaken(LazyprocError):
    """A lock of a tree that is to run on here is somebody else's by now."""


def let_go(processes: Sequence[ParkedProcess], locks: Locks) -> None:
    """Of a tree whose tracer we are."""
    for process in processes:
        _call(process, locks, letting_go, traced=True)


def take_again(processes: Sequence[ParkedProcess], locks: Locks, *, traced: bool) -> None:
    """Raises LockTaken. With a process that was killed meanwhile its locks have gone."""
    until, ours = time.monotonic() + PATIENCE_S, {-1, *(process.pid for process in processes)}
    for process in processes:
        with suppress(NoSuchProcess):
            while missing := _missing(process, locks, traced=traced):
                if time.monotonic() > until:
                    raise _taken(process.pid, *missing[0], ours)
                time.sleep(PAUSE_S)


def _missing(process: ParkedProcess, locks: Locks, *, traced: bool) -> list[tuple[FileLock, int]]:
    """Those that could not be had, and what the kernel has said. Raises LockTaken when none can be asked for."""
    try:
        results = _call(process, locks, taking, traced=traced)
    except NoSuchProcess:
        raise
    except LazyprocError as error:
        raise LockTaken(f"its file locks cannot be taken: {error.what}", where=error.where) from error
    return [(lock, result) for lock, result in results if result < 0]


def _taken(pid: int, lock: FileLock, result: int, ours: Collection[int]) -> LockTaken:
    path, who = "", "somebody else has it" if result in HELD_BY_ANOTHER else os.strerror(-result)
    with suppress(OSError, LazyprocError):
        path = f" ({os.readlink(f'/proc/{pid}/fd/{lock.fd}')})"
        others = [f"pid {each}" for each in holders(pid, lock.fd) if each not in ours]
        who = f"{', '.join(others)} has it" if others else who
    return LockTaken(f"its file lock cannot be had: {who}", where=f"pid {pid}: fd {lock.fd}{path}")


def still_parked(taken: LockTaken, session: str) -> Parked:
    return Parked(
        f"it stays parked here: {taken.what}",
        where=taken.where,
        remedy=f"when that one has let go of it, let the process run with lazyproc resume {session} --here",
    )


def _call(
    process: ParkedProcess,
    locks: Locks,
    calls: Callable[[Sequence[FileLock], Bench], Iterator[Call]],
    *,
    traced: bool,
) -> list[tuple[FileLock, int]]:
    """Each lock of the process, and what the call for it has returned."""
    its = locks.get(process.pid, ())
    if not its or not park.is_there(process):
        return []
    thread = unfiltered(process) or process.threads[0]
    with bench_in(process, thread, traced=traced, size=room_for(len(its))) as (tracee, bench):
        return list(zip(its, bench.run(tracee, [*calls(its, bench)]), strict=True))
