"""Who gets the SIGIO of a file (F_SETOWN): set by a task, in whose pid namespace the number has a meaning."""

from __future__ import annotations

from typing import NamedTuple

from lazyproc.model import Checkpoint, Task


class OwnerRow(NamedTuple):
    """fcntl(fd, F_SETOWN_EX, {type, pid}). The signal itself and O_ASYNC are set already."""

    fd: int
    type: int
    pid: int


def owner_rows(checkpoint: Checkpoint, task: Task) -> list[OwnerRow]:
    """The rows of one task, to be done when all tasks exist; over all tasks each file comes once."""
    rows: dict[int, OwnerRow] = {}
    for descriptor in task.descriptors:
        owner = checkpoint.files[descriptor.file_id].owner
        if owner.pid and _first_holder(checkpoint, descriptor.file_id) is task:
            rows.setdefault(descriptor.file_id, OwnerRow(descriptor.fd, owner.type, owner.pid))
    return list(rows.values())


def _first_holder(checkpoint: Checkpoint, file_id: int) -> Task | None:
    return next(
        (task for task in checkpoint.tasks if any(d.file_id == file_id for d in task.descriptors)), None
    )
