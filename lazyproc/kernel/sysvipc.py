"""System V semaphores and message queues of our own ipc namespace, and who used them last (ipc/sem.c, ipc/msg.c)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from lazyproc.kernel.sys import syscall

SYS_SEMCTL = 66
SEM_GETPID = 11  # GETPID of include/uapi/linux/sem.h


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
