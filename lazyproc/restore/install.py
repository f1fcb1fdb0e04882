"""How made files get into a task's empty descriptor table: pure plans for messages and dup3.

A recvmsg(2) of SCM_RIGHTS puts descriptors on the lowest free numbers. Sent by ascending target number into a
table that is empty below their count, the i-th arrives at number i, and no target is below its index. So from
the highest down each can be moved without hitting one that has not moved yet.
"""

from __future__ import annotations

from collections.abc import Sequence

from lazyproc.facts import dataclass
from lazyproc.model import Descriptor

SCM_MAX_FD = 253  # descriptors of one message, include/net/scm.h


@dataclass(frozen=True, slots=True)
class Dup3:
    """dup3(old, new, O_CLOEXEC if cloexec)."""

    old: int
    new: int
    cloexec: bool


@dataclass(frozen=True, slots=True)
class Close:
    fd: int


@dataclass(frozen=True, slots=True)
class SetFd:
    """fcntl(fd, F_SETFD, FD_CLOEXEC if cloexec)."""

    fd: int
    cloexec: bool


Op = Dup3 | Close | SetFd


def messages(descriptors: Sequence[Descriptor]) -> list[list[int]]:
    """The file ids to send, by message. All have to be received before the first op of install_plan."""
    files = [descriptor.file_id for descriptor in _ordered(descriptors)]
    return [files[at : at + SCM_MAX_FD] for at in range(0, len(files), SCM_MAX_FD)]


def install_plan(descriptors: Sequence[Descriptor]) -> list[Op]:
    """Move what the messages brought, at 0, 1, 2, ..., to the numbers it had; sets close-on-exec."""
    ops: list[Op] = []
    for arrived, descriptor in reversed(list(enumerate(_ordered(descriptors)))):
        if arrived == descriptor.fd:
            ops.append(SetFd(arrived, descriptor.cloexec))
        else:
            ops += [Dup3(arrived, descriptor.fd, descriptor.cloexec), Close(arrived)]
    return ops


def _ordered(descriptors: Sequence[Descriptor]) -> list[Descriptor]:
    return sorted(descriptors, key=lambda descriptor: descriptor.fd)
