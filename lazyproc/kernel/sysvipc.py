"""System V objects of our own ipc namespace, and who used them last (ipc/shm.c, ipc/sem.c, ipc/msg.c)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from lazyproc.kernel.sys import syscall

SYS_SHMCTL, SYS_SEMCTL = 31, 66
IPC_RMID = 0
SEM_GETPID = 11  # GETPID of include/uapi/linux/sem.h


class Segment(NamedTuple):
    """A shared memory segment: `mode` are its permissions and SHM_DEST, SHM_LOCKED (include/linux/shm.h)."""

    key: int
    id: int
    mode: int
    uid: int
    gid: int
    attachments: int


def segments() -> dict[int, Segment]:
    """All shared memory segments by their number."""
    found = {}
    for key, number, mode, _size, _cpid, _lpid, attached, uid, gid, *_ in _rows("shm"):
        found[int(number)] = Segment(int(key), int(number), int(mode, 8), int(uid), int(gid), int(attached))
    return found


def remove_segment(number: int) -> None:
    """shmctl(2) IPC_RMID: it goes with its last attachment."""
    syscall(SYS_SHMCTL, number, IPC_RMID, 0)


class LastUse(NamedTuple):
    """`pid`, as we see it, was the last to operate on semaphore set or message queue `id`."""

    pid: int
    kind: str
    id: int


def last_uses() -> Iterator[LastUse]:
    """Every last use that the kernel still knows. What is removed meanwhile, or not ours to ask, is left out."""
    for row in _rows("sem"):
        number, semaphores = int(row[1]), int(row[3])
        for index in range(semaphores):
            try:
                yield LastUse(syscall(SYS_SEMCTL, number, index, SEM_GETPID), "semaphore set", number)
            except OSError:
                break
    for row in _rows("msg"):
        for column in (5, 6):  # lspid, lrpid
            yield LastUse(int(row[column]), "message queue", int(row[1]))


def _rows(name: str) -> list[list[str]]:
    try:
        with open(f"/proc/sysvipc/{name}") as file:
            return [line.split() for line in file.readlines()[1:]]
    except FileNotFoundError:  # a kernel without CONFIG_SYSVIPC
        return []
