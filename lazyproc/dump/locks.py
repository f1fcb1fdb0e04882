"""File locks and leases, as /proc/PID/fdinfo tells of them."""

from __future__ import annotations

from collections.abc import Sequence

from lazyproc.dump.look import Look
from lazyproc.dump.registry import Refused, Registry
from lazyproc.kernel.proc_fdinfo import LockInfo
from lazyproc.model import FileLock, LockKind

_KINDS = {"POSIX": LockKind.POSIX, "FLOCK": LockKind.FLOCK, "OFDLCK": LockKind.OFD, "LEASE": LockKind.LEASE}
_ASK = "let the program release the lock before the move"


def note_locks(registry: Registry, vpid: int, fd: int, locks: Sequence[LockInfo], *, first: bool) -> None:
    """Those of descriptor `fd`, the `first` of its open file description or not. A lock of the process shows with each
    descriptor of the file.
    """
    known = registry.locks.setdefault(vpid, []) if locks else []
    for info in locks:
        lock = _lock(fd, info)
        if lock is None:
            continue
        own = lock.kind is LockKind.POSIX
        if first if not own else (vpid, info.dev, info.inode, info.start, info.end) not in registry.locked:
            registry.locked.add((vpid, info.dev, info.inode, info.start, info.end))
            known.append(lock)


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
                f"it holds a file lock ({info.kind} {info.mode}), which cannot be kept through a move", _ASK
            )
        if _lock(look.fd, info) is None or info.breaking:
            raise Refused(f"it holds a file lock ({info.kind} {info.mode}) that cannot be kept", _ASK)
        if look.pid not in {task.pid for task in registry.tasks}:
            raise Refused("it holds a file lock and is known to a message only", _ASK)
