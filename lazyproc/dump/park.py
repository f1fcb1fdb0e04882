"""A frozen tree that stays where it is without us, until it is ended here or let run on."""

from __future__ import annotations

from contextlib import suppress

from lazyproc.dump.freeze import FrozenTask, FrozenTree
from lazyproc.errors import NoSuchProcess
from lazyproc.kernel import park, proc
from lazyproc.kernel import tracee as ptrace
from lazyproc.kernel.park import ParkedProcess


def parking(tree: FrozenTree) -> tuple[ParkedProcess, ...]:
    """What `park_tree` will do, for a journal to know before it is done. Raises TraceeError."""
    found = []
    for task in _alive(tree):
        maps = task.maps or proc.maps(proc.read(task.pid, "maps"))
        with ptrace.memory(task.pid) as memory:
            found.append(
                park.place_for(task.pid, task.stat.start_time, maps, task.threads, task.stopped, memory)
            )
    return tuple(found)


def park_tree(tree: FrozenTree, processes: tuple[ParkedProcess, ...]) -> None:
    """From here on no thread of it runs on, whatever becomes of us."""
    tree.parked = True
    for task, process in zip(_alive(tree), processes, strict=True):
        filtered = [stopped.status.seccomp != 0 for stopped in task.stopped]
        with ptrace.memory(task.pid) as memory:
            park.park(process, task.threads, filtered, memory)


def unpark_tree(tree: FrozenTree, processes: tuple[ParkedProcess, ...]) -> None:
    """Frozen as it was before `park_tree`."""
    for task, process in zip(_alive(tree), processes, strict=True):
        with suppress(NoSuchProcess), ptrace.memory(task.pid) as memory:  # it may have been killed
            park.unpark(process, task.threads, memory)
    tree.parked = False


def _alive(tree: FrozenTree) -> list[FrozenTask]:
    return [task for task in tree.tasks.values() if not task.zombie]
