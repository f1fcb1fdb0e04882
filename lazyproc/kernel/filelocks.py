"""File locks as remote calls: nobody but the process itself can take or let go of those that are the process's own
(fcntl(2)). None of them waits.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator, Sequence

from lazyproc.kernel.proc_locks import held_locks
from lazyproc.kernel.remote import ROW, Bench, Call
from lazyproc.model import PAGE, FileLock, LockKind

F_OFD_SETLK = 37
FLOCK = struct.Struct("<hhxxxxqqixxxx")  # struct flock: type, whence, start, len, pid
PATIENCE_S, PAUSE_S = 2.0, 0.002  # who only tries it, or has just been killed, has a lock for a moment
HELD_BY_ANOTHER = (-errno.EAGAIN, -errno.EACCES)


def room_for(locks: int) -> int:
    """Bytes of a bench's data in which that many of these calls find room."""
    return (locks * (ROW.size + FLOCK.size) + PAGE - 1) & -PAGE


def taking(locks: Sequence[FileLock], bench: Bench) -> Iterator[Call]:
    """What these calls return is a result, see HELD_BY_ANOTHER. To take what one has already changes nothing."""
    for lock in locks:
        if lock.kind is LockKind.FLOCK:
            yield _flock(lock, fcntl.LOCK_EX if lock.exclusive else fcntl.LOCK_SH)
        else:
            yield _fcntl(lock, fcntl.F_WRLCK if lock.exclusive else fcntl.F_RDLCK, bench)


def letting_go(locks: Sequence[FileLock], bench: Bench) -> Iterator[Call]:
    for lock in locks:
        if lock.kind is LockKind.FLOCK:
            yield _flock(lock, fcntl.LOCK_UN)
        else:
            yield _fcntl(lock, fcntl.F_UNLCK, bench)


def _flock(lock: FileLock, operation: int) -> Call:
    return Call("flock", (lock.fd, operation | fcntl.LOCK_NB), may_fail=True)


def _fcntl(lock: FileLock, kind: int, bench: Bench) -> Call:
    if lock.kind is LockKind.LEASE:
        return Call("fcntl", (lock.fd, fcntl.F_SETLEASE, kind), may_fail=True)
    command = F_OFD_SETLK if lock.kind is LockKind.OFD else fcntl.F_SETLK
    where = bench.place(FLOCK.pack(kind, os.SEEK_SET, lock.start, lock.length, 0))
    return Call("fcntl", (lock.fd, command, where), may_fail=True)


def holders(pid: int, fd: int) -> list[int]:
    """Who has locks of the file that is open there, by pid; -1 for whom the kernel does not tell."""
    status = os.stat(f"/proc/{pid}/fd/{fd}")
    file = (os.major(status.st_dev), os.minor(status.st_dev)), status.st_ino
    return sorted({held.lock.pid for held in held_locks() if (held.lock.dev, held.lock.inode) == file})
