"""The limits of a process (getrlimit(2)) on this host: those under which it is built, and those that it gets."""

from __future__ import annotations

import resource
from collections.abc import Iterator

from lazyproc.errors import RestoreError
from lazyproc.events import Listener, Note
from lazyproc.kernel import host
from lazyproc.limits import NAMES
from lazyproc.model import Checkpoint, Task
from lazyproc.needs import LimitNeed, limit_needs, tree_need

UNLIMITED = (1 << 64) - 1
_FREES = {resource.RLIMIT_MEMLOCK: "IPC_LOCK"}  # capabilities(7)


def check_limit(need: LimitNeed) -> None:
    """Whether a process that is built here may have that much. A name that is not known is passed over. Raises
    RestoreError.
    """
    if need.name not in NAMES:
        return
    number = NAMES.index(need.name)
    most = _unsigned(resource.getrlimit(number)[1])
    if need.value <= most:
        return
    try:
        if number == resource.RLIMIT_MEMLOCK:
            host.lock(need.value)
        else:
            host.raise_limit(number, _signed(need.value))
    except OSError as error:
        raise RestoreError(
            f"no more than {_text(most)} may be had here, and it takes {_text(need.value)}",
            where=f"RLIMIT_{need.name.upper()}",
            remedy=f"raise the hard limit of who restores or receives it (prlimit --{need.name}, systemd's "
            f"Limit{need.name.upper()}=), or give it CAP_{_FREES.get(number, 'SYS_RESOURCE')}",
        ) from error


def demand_limits(checkpoint: Checkpoint) -> None:
    """Raises RestoreError for what is beyond the limits of this host."""
    needs = [(f"pid {task.vpid}", need) for task in checkpoint.tasks for need in _needs_of(task)]
    opened = len(checkpoint.files) + len(checkpoint.shared)
    for where, need in (*needs, ("tree", tree_need(opened, len(checkpoint.tasks)))):
        try:
            check_limit(need)
        except RestoreError as lack:
            raise RestoreError(lack.what, where=f"{where}: {lack.where}", remedy=lack.remedy) from lack


def _needs_of(task: Task) -> Iterator[LimitNeed]:
    if task.mm is not None:
        highest = max((each.fd for each in task.descriptors), default=-1)
        behind = {(vma.kind, vma.file_id, vma.object_id) for vma in task.mm.vmas}
        yield from limit_needs(task.mm.vmas, highest, len(behind))


def give_limits(task: Task, pid: int, listener: Listener) -> None:
    """From outside, while it still has our rights. What cannot be had is as much as can, and is said: a program that
    was given 1024 descriptors may take no more for its sets (select(2)).
    """
    for limit in task.limits:
        number, wanted = limit.resource, (limit.soft, limit.hard)
        try:
            resource.prlimit(pid, number, (_signed(limit.soft), _signed(limit.hard)))
        except (PermissionError, ValueError):
            most = _unsigned(resource.prlimit(pid, number)[1])
            soft, hard = (min(value, most) for value in wanted)
            resource.prlimit(pid, number, (_signed(soft), _signed(hard)))
            told = f"RLIMIT_{NAMES[number].upper()} is {_text(soft)} (hard {_text(hard)}) here"
            had = f"{_text(limit.soft)} (hard {_text(limit.hard)})"
            listener(Note(f"pid {task.vpid}: {told}, and was {had}: who restores it may have no more"))


def _signed(value: int) -> int:
    """As prlimit(2) takes it by way of Python: RLIM_INFINITY is -1."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _unsigned(value: int) -> int:
    return value + (1 << 64) if value < 0 else value


def _text(value: int) -> str:
    return "unlimited" if value == UNLIMITED else str(value)
