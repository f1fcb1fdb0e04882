"""What is learned of a tree while it still runs, so that the freeze is short."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lazyproc.errors import LazyprocError, NoSuchProcess
from lazyproc.kernel import proc


@dataclass(frozen=True, slots=True)
class Before:
    """`smaps` by pid: reading it walks all memory, so it is kept and only compared with maps after the freeze."""

    smaps: Mapping[int, tuple[proc.SmapsEntry, ...]]


def tree_of(pid: int) -> list[int]:
    """The processes of the running tree, parents first; it may change at any time."""
    found = [pid]
    for parent in found:
        for tid in _task_ids(parent):
            try:
                found += [child for child in proc.children_of(parent, tid) if child not in found]
            except NoSuchProcess:
                continue
    return found


def _task_ids(pid: int) -> tuple[int, ...]:
    try:
        return proc.task_ids(pid)
    except NoSuchProcess:
        return ()


def look_before(pid: int) -> Before:
    """Raises NoSuchProcess or PermissionDenied for the root; other processes may come and go."""
    smaps = {pid: proc.smaps(proc.read(pid, "smaps"))}
    for other in tree_of(pid)[1:]:
        try:
            smaps[other] = proc.smaps(proc.read(other, "smaps"))
        except LazyprocError:
            continue
    return Before(smaps)
