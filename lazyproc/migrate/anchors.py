"""What a lazy tree keeps of itself in its own descriptor tables, taken back when all our processes are gone."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress

from lazyproc.errors import LostAfterCommit
from lazyproc.facts import dataclass
from lazyproc.kernel import proc
from lazyproc.kernel.sys import pidfd_getfd, pidfd_open
from lazyproc.restore.lazytree import LazyTree, anchor_holders


@dataclass(frozen=True, slots=True)
class Anchors:
    """Descriptors of ours; -1 in `userfaultfds`, by the order of the tasks, for a process that has ended."""

    ledger: int
    cradle: int
    userfaultfds: tuple[int, ...]


def anchors(tree: LazyTree) -> Anchors:
    """Raises LostAfterCommit when nobody of the tree is left who has them."""
    return Anchors(
        _first(tree, "ledger", _for_writing), _first(tree, "cradle", _duplicate), _userfaultfds(tree)
    )


def _first(tree: LazyTree, name: str, take: Callable[[int, int], int]) -> int:
    for pid, number in anchor_holders(tree, name):
        with suppress(OSError):  # it has just ended, or closed it
            return take(pid, number)
    raise LostAfterCommit(
        "no process of the tree is left, or none has kept its memory's descriptors (close_range(2))",
        where=f"pids {', '.join(str(task.pid) for task in tree.tasks)}",
        remedy="if its source says that all of it has followed, its record could not be written, and is to be removed; "
        "otherwise end it with lazyproc abort",
    )


def _userfaultfds(tree: LazyTree) -> tuple[int, ...]:
    found = [-1] * len(tree.tasks)
    for index, task in enumerate(tree.tasks):
        if proc.lives(task.pid, task.started):
            with suppress(OSError):
                found[index] = _duplicate(task.pid, task.userfaultfd)
    return tuple(found)


def _for_writing(pid: int, number: int) -> int:
    """The tree itself may only read it."""
    return os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR | os.O_CLOEXEC)


def _duplicate(pid: int, number: int) -> int:
    pidfd = pidfd_open(pid)
    try:
        return pidfd_getfd(pidfd, number)
    finally:
        os.close(pidfd)
