"""A forecast of a running tree: what will be said of it when it is frozen, unless it changes meanwhile."""

from __future__ import annotations

import os
from collections.abc import Mapping

from lazyproc.dump.walk import thread_ids, tree_of
from lazyproc.errors import NoSuchProcess
from lazyproc.images.forecast import Forecast, Room, bare_task, can_be_foreseen, can_be_opened, part
from lazyproc.images.memory import WrittenMappings
from lazyproc.kernel import proc
from lazyproc.model import OpenFile, Task, TerminalMaster


def forecast_of(
    root: int, written: Mapping[int, WrittenMappings], opened: Mapping[int, OpenFile]
) -> Forecast | None:
    """Of the tree under `root`; mappings are `written`, by pid, as far as they are known, of files that are `opened`.
    None when a process has ended, and of a tree that has terminals: they come before the processes.
    """
    if any(isinstance(file.resource, TerminalMaster) for file in opened.values()):
        return None
    tasks: dict[int, Task] = {}
    rooms: dict[int, Room] = {}
    files: dict[int, OpenFile] = {}
    try:
        for pid in tree_of(root):
            stat, status = proc.stat(proc.read(pid, "stat")), proc.status(proc.read(pid, "status"))
            if stat.state == "Z":
                return None
            mappings = written.get(pid)
            behind = {number: opened[number] for number in mappings.access} if mappings else {}
            movable = {number: file for number, file in behind.items() if can_be_opened(file)}
            known = mappings is not None and can_be_foreseen(mappings.vmas, movable)
            parent = tasks[stat.ppid].vpid if tasks else 0
            numbers = (status.ns_pid[-1], parent, status.ns_pgid[-1], status.ns_sid[-1])
            vmas, stack = (mappings.vmas, mappings.start_stack) if mappings and known else (None, 0)
            tasks[pid] = bare_task(numbers, stat.exit_signal, vmas, stack)
            rooms[status.ns_pid[-1]] = _room(pid)
            files |= movable if known else {}
    except (NoSuchProcess, KeyError, OSError):
        return None
    return Forecast(part(tasks.values(), files), rooms) if tasks else None


def _room(pid: int) -> Room:
    numbers = [int(name) for name in os.listdir(f"/proc/{pid}/fd")]
    return Room(max(numbers, default=-1), len(numbers), len(thread_ids(pid)))
