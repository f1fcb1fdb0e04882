"""A tree is restored otherwise than it was dumped, because whoever restores it says so. Pure."""

from __future__ import annotations

from lazyproc.facts import replace
from lazyproc.kernel.sockopt import TCP_CLOSE
from lazyproc.model import Checkpoint, InetSocket, TaskState


def all_stopped(checkpoint: Checkpoint) -> Checkpoint:
    """The same tree with every process stopped."""
    tasks = (
        replace(task, state=TaskState.STOPPED) if task.state is TaskState.ALIVE else task
        for task in checkpoint.tasks
    )
    return replace(checkpoint, tasks=tuple(tasks))


def all_ended(checkpoint: Checkpoint) -> Checkpoint:
    """The same tree with every TCP connection at its end: what has arrived can be read."""
    files = dict(checkpoint.files)
    for number, file in files.items():
        inet = file.resource
        if isinstance(inet, InetSocket) and inet.tcp is not None and inet.state != TCP_CLOSE:
            ended = replace(inet, state=TCP_CLOSE, remote=None, shutdown=0)
            files[number] = replace(file, resource=ended)
    return replace(checkpoint, files=files)
