"""Giving a task its descriptors: made elsewhere, received in one go, moved to their numbers."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from itertools import count as counted
from itertools import islice

from lazyproc.kernel.remote import Bench, Call
from lazyproc.model import Checkpoint, RegularFile, Task
from lazyproc.restore.epolls import epoll_rows
from lazyproc.restore.install import Close, Dup3, SetFd, install_plan, messages
from lazyproc.restore.owners import owner_rows
from lazyproc.restore.site import Site

EPOLL_CTL_ADD = 1
F_SETFD, F_SETOWN_EX = 2, 15
FD_CLOEXEC = 1


def install(site: Site, checkpoint: Checkpoint, files: Mapping[int, int]) -> None:
    """The task's descriptor table; then what only the task itself can do with its files. With the next run."""
    task = site.task
    brought = [files[i] for message in messages(task.descriptors) for i in message]
    site.receive_later(brought, range(len(brought)))
    site.run_later(
        *_moves(task),
        *_epoll_calls(checkpoint, task, site.bench),
        *_owner_calls(checkpoint, task, site.bench),
    )


def _moves(task: Task) -> Iterator[Call]:
    for op in install_plan(task.descriptors):
        match op:
            case Dup3(old, new, cloexec):
                yield Call("dup3", (old, new, os.O_CLOEXEC if cloexec else 0))
            case Close(fd):
                yield Call("close", (fd,))
            case SetFd(fd, cloexec):
                yield Call("fcntl", (fd, F_SETFD, FD_CLOEXEC if cloexec else 0))


def _epoll_calls(checkpoint: Checkpoint, task: Task, bench: Bench) -> Iterator[Call]:
    for row in epoll_rows(checkpoint, task):
        event = bench.place(struct.pack("<IQ", row.events, row.data))
        yield Call("epoll_ctl", (row.epfd, EPOLL_CTL_ADD, row.fd, event))


def _owner_calls(checkpoint: Checkpoint, task: Task, bench: Bench) -> Iterator[Call]:
    for row in owner_rows(checkpoint, task):
        yield Call("fcntl", (row.fd, F_SETOWN_EX, bench.place(struct.pack("<ii", row.type, row.pid))))


def lowest_free(site: Site, count: int) -> list[int]:
    """The numbers that the next descriptors get: the task's own are in use, and ours right above them."""
    ours = {site.transport_fd, site.anchor, site.ledger, site.cradle}
    taken = ours | {descriptor.fd for descriptor in site.task.descriptors}
    return list(islice((fd for fd in counted() if fd not in taken), count))


def is_our_root(checkpoint: Checkpoint, root_id: int) -> bool:
    """Whether the task's root directory is the one we restore in (paths are seen from the tree's root)."""
    resource = checkpoint.files[root_id].resource
    return isinstance(resource, RegularFile) and resource.path == "/"
