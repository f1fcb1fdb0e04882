"""Ending a running tree with all it has started, none of which may read memory that is not there meanwhile."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from lazyproc.kernel import proc
from lazyproc.restore.lazytree import LazyTree, descendants

NURSERY = "/memfd:lazyproc-nursery (deleted)"


def end_tree(tree: LazyTree) -> None:
    """SIGKILL to all of it. Who forks is stopped first, so nobody is born behind our back."""
    stopped: set[int] = set()
    while new := set(_members(tree)) - stopped:
        for pid in new:
            _signal(pid, signal.SIGSTOP)
        stopped |= new
    for pid in stopped:
        _signal(pid, signal.SIGKILL)


def _members(tree: LazyTree) -> Iterator[int]:
    """By birth, and by the cgroups that were made for it: children may have lost their parents, and the nursery too."""
    roots = [task.pid for task in tree.tasks if proc.lives(task.pid, task.started)]
    with suppress(OSError):
        if os.readlink(f"/proc/{tree.nursery_pid}/exe") == NURSERY:
            roots.append(tree.nursery_pid)
    yield from descendants(roots)
    for group in tree.groups:
        with suppress(OSError):
            yield from map(int, Path(group, "cgroup.procs").read_text().split())


def _signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
