"""File locks and leases, as /proc/PID/fdinfo and /proc/locks tell of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from lazyproc.dump.look import Look
from lazyproc.dump.registry import Refused, Registry, TaskRef
from lazyproc.errors import Obstacle
from lazyproc.kernel.proc_fdinfo import LockInfo
from lazyproc.kernel.proc_locks import HeldLock, awaited_locks
from lazyproc.model import FileLock, LockKind

_KINDS = {"POSIX": LockKind.POSIX, "FLOCK": LockKind.FLOCK, "OFDLCK": LockKind.OFD, "LEASE": LockKind.LEASE}
_ASK = "let the program release it before the move"


def note_locks(registry: Registry, task: TaskRef, fd: int, locks: Sequence[LockInfo], *, first: bool) -> None:
    """Those of descriptor `fd`, the `first` of its open file description or not. A lock of the process shows with each
    descriptor of the file.
    """
    for info in locks:
        lock = _lock(fd, info)
        if lock is None:
            continue
        own = lock.kind is LockKind.POSIX
        if first if not own else info not in registry.locked:
            registry.locked[info] = task.pid, fd
            registry.locks.setdefault(task.vpid, []).append(lock)


def _lock(fd: int, info: LockInfo) -> FileLock | None:
    kind = _KINDS.get(info.kind)
    if kind is None or info.mode not in ("READ", "WRITE"):
        return None
    ranged = kind in (LockKind.POSIX, LockKind.OFD)
    length = 0 if info.end is None or not ranged else info.end + 1 - info.start
    return FileLock(fd, kind, info.mode == "WRITE", info.start if ranged else 0, length)


def refuse_locks(registry: Registry, look: Look) -> None:
    """Raise Refused for a lock that cannot be taken again, or is not to be."""
    for info in look.info.locks:
        if not registry.permits.locks:
            raise Refused(
                f"it holds a file lock ({info.kind} {info.mode}), and those are not permitted",
                "permit them (--file-locks), or let the program release it",
            )
        if (info.kind, info.mode) == ("LEASE", "WRITE") and not registry.permits.write_leases:
            raise Refused("it holds a lease for writing, which ends when the file is opened elsewhere", _ASK)
        if _lock(look.fd, info) is None or info.breaking:
            raise Refused(f"it holds a file lock ({info.kind} {info.mode}) that cannot be kept", _ASK)
        if look.pid not in {task.pid for task in registry.tasks}:
            raise Refused("it holds a file lock and is known to a message only", _ASK)


def refuse_awaited(registry: Registry) -> None:
    """An obstacle for each lock of a tree that runs and a process outside of it waits for."""
    if registry.locked and not registry.permits.awaited_locks:
        inside = {-1, *(task.pid for task in registry.tasks)}
        registry.obstacles.extend(awaited(registry.locked, awaited_locks(), inside))


def awaited(
    locked: Mapping[LockInfo, tuple[int, int]], table: Sequence[HeldLock], inside: Collection[int] = ()
) -> Iterator[Obstacle]:
    """Who waits for one of the `locked`, whose pid and descriptor are given; but for those `inside`, of a tree that
    runs: a call that waits is interrupted by the freeze, and made again afterwards. -1 is whom the kernel does not
    name. Pure.
    """
    for held in table:
        others = [pid for pid in held.waiting if pid not in inside]
        if others and held.lock in locked:
            pid, fd = locked[held.lock]
            who = f"pid {others[0]}" if others[0] > 0 else "somebody"
            yield Obstacle(
                pid, f"fd {fd}", f"{who} waits for its file lock ({held.lock.kind}), and would get it in the middle of "
                "a move", f"end {who if others[0] > 0 else 'who waits (see lslocks)'} first",
            )  # fmt: skip
