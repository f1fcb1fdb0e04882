"""What a lazy tree keeps of itself in its own descriptor tables, taken back when all our processes are gone."""

from __future__ import annotations

import os
from contextlib import ExitStack, suppress

from lazyproc.errors import LostAfterCommit
from lazyproc.kernel import proc
from lazyproc.kernel.sys import pidfd_getfd, pidfd_open
from lazyproc.restore.lazytree import LazyTask


def anchors(tasks: tuple[LazyTask, ...]) -> tuple[int, list[int]]:
    """The ledger and the userfaultfds that a tree keeps, as descriptors of ours; -1 for a process that has ended.

    Raises LostAfterCommit when nobody of the tree is left who has them.
    """
    ledger, userfaultfds = -1, []
    with ExitStack() as stack:
        for task in tasks:
            userfaultfds.append(-1)
            if not proc.lives(task.pid, task.started):
                continue
            pidfd = pidfd_open(task.pid)
            stack.callback(os.close, pidfd)
            with suppress(OSError):
                userfaultfds[-1] = pidfd_getfd(pidfd, task.userfaultfd)
                if ledger < 0:
                    ledger = os.open(f"/proc/{task.pid}/fd/{task.ledger}", os.O_RDWR | os.O_CLOEXEC)
    if ledger < 0:
        raise LostAfterCommit(
            "no process of the tree is left, or none has kept its memory's descriptors (close_range(2))",
            where=f"pids {', '.join(str(task.pid) for task in tasks)}",
            remedy="end it with lazyproc abort",
        )
    return ledger, userfaultfds
