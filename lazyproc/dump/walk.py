"""Who belongs to a process tree that runs, and may change at any time."""

from __future__ import annotations

from lazyproc.errors import NoSuchProcess
from lazyproc.kernel import proc


def tree_of(pid: int) -> list[int]:
    """The processes of the running tree, parents first; it may change at any time."""
    found = [pid]
    for parent in found:
        for tid in thread_ids(parent):
            try:
                found += [child for child in proc.children_of(parent, tid) if child not in found]
            except NoSuchProcess:
                continue
    return found


def thread_ids(pid: int) -> tuple[int, ...]:
    """None when the process has gone meanwhile."""
    try:
        return proc.task_ids(pid)
    except NoSuchProcess:
        return ()
