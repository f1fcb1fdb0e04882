"""What is added to epoll sets, and by whom.

A task adds the files it has under the numbers they were added with: a watched signalfd belongs to the process
that adds it (fs/signalfd.c). Entries whose number names another file by now, or none, are added from outside.

One thing differs from the source: an EPOLLONESHOT entry that has fired still reports errors and hang-ups,
since EPOLL_CTL_ADD always asks for them (fs/eventpoll.c).
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from lazyproc.errors import RestoreError
from lazyproc.kernel import fds
from lazyproc.model import Checkpoint, Epoll, EpollTarget, Task


class EpollRow(NamedTuple):
    """One EPOLL_CTL_ADD, to be done by a task with its own descriptor numbers."""

    epfd: int
    fd: int
    events: int
    data: int


def epoll_rows(checkpoint: Checkpoint, task: Task) -> list[EpollRow]:
    """The rows of one task; over all tasks each entry comes once, from the first that has both numbers."""
    return [
        EpollRow(epfd, target.fd, target.events, target.data)
        for _, target, adder, epfd in _entries(checkpoint)
        if adder is task
    ]


def add_orphans(checkpoint: Checkpoint, made: Mapping[int, int]) -> None:
    """Add the entries that no task can add, under the numbers they had. `made`: file id to our descriptor.

    To be called when all files are made, sockets included. Raises RestoreError.
    """
    orphans = [
        (made[file_id], made[target.file_id], target)
        for file_id, target, adder, _ in _entries(checkpoint)
        if adder is None
    ]
    if orphans:
        from concurrent.futures import ThreadPoolExecutor  # rarely needed, and it imports logging

        with ThreadPoolExecutor(1) as thread:
            thread.submit(_add_in_own_table, orphans).result()


def _add_in_own_table(orphans: Sequence[tuple[int, int, EpollTarget]]) -> None:
    """Runs in a thread of its own: any number can be overwritten there, the table ends with the thread."""
    fds.unshare_descriptors()
    above = 1 + max(target.fd for _, _, target in orphans)
    lifted = [
        (fcntl.fcntl(epfd, fcntl.F_DUPFD, above), fcntl.fcntl(watched, fcntl.F_DUPFD, above), target)
        for epfd, watched, target in orphans
    ]
    for epfd, watched, target in lifted:
        os.dup2(watched, target.fd)
        try:
            fds.epoll_add(epfd, target.fd, target.events, target.data)
        except OSError as error:
            raise RestoreError(
                f"cannot be added to an epoll set again ({error.strerror})", where=f"fd {target.fd}"
            ) from error


class _Table(NamedTuple):
    """A task's descriptors both ways."""

    task: Task
    files: Mapping[int, int]  # number -> file id
    numbers: Mapping[int, int]  # file id -> a number


def _entries(checkpoint: Checkpoint) -> Iterator[tuple[int, EpollTarget, Task | None, int]]:
    """Each entry of each set: the set's file id, the entry, who adds it, and the set's number there."""
    tables = [
        _Table(task, {d.fd: d.file_id for d in task.descriptors}, {d.file_id: d.fd for d in task.descriptors})
        for task in checkpoint.tasks
    ]
    for file in checkpoint.files.values():
        if isinstance(file.resource, Epoll):
            holders = [table for table in tables if file.id in table.numbers]
            for target in file.resource.targets:
                adder = next((t for t in holders if t.files.get(target.fd) == target.file_id), None)
                yield file.id, target, adder and adder.task, adder.numbers[file.id] if adder else -1
