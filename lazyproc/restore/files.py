"""Making open files again, in the process that restores: one recipe for each kind, in a table.

The files are made here, sent to the tasks and closed here before the tree runs (a pipe held open never ends).
What only the task itself can do comes as rows: epolls.epoll_rows, owners.owner_rows.
"""

from __future__ import annotations

import mmap
import os
import stat as st
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from lazyproc.errors import RestoreError
from lazyproc.events import Listener, ignore
from lazyproc.facts import dataclass
from lazyproc.kernel import elf
from lazyproc.model import (
    Checkpoint,
    Epoll,
    EventFd,
    Inotify,
    MemFd,
    OpenFile,
    PipeEnd,
    RegularFile,
    Resource,
    SignalFd,
    TimerFd,
    VmaKind,
)
from lazyproc.restore import anon, memfds, pipes
from lazyproc.restore.contents import ghost, make_named_contents
from lazyproc.restore.workshop import OpenPath, Workshop, finish, reopen, words

Recipe = Callable[[Workshop, OpenFile, Any], int]  # the last one: the file's resource, of the recipe's kind


@dataclass(frozen=True, slots=True)
class Made:
    """Descriptors of ours. `objects` are the memfds by SharedMemory id, open for reading and writing."""

    files: dict[int, int]  # by file id
    objects: dict[int, int]


@contextmanager
def make_files(checkpoint: Checkpoint, *, open_path: OpenPath, listener: Listener = ignore) -> Iterator[Made]:
    """Every file of the checkpoint but sockets. On leaving all are closed; files created on a tmpfs are
    removed again when it was left by an exception.

    `open_path(path, flags, mode)` opens a path from the tree's root directory on this host. Raises
    RestoreError that names the file and what to do.
    """
    with ExitStack() as stack:
        workshop = Workshop(checkpoint, open_path, listener, stack)
        make_named_contents(workshop)
        memfds.make_objects(workshop)
        for kind, recipe in _RECIPES.items():
            for file in checkpoint.files.values():
                if isinstance(file.resource, kind):
                    workshop.files[file.id] = _make(workshop, file, recipe)
        yield Made(workshop.files, workshop.objects)


def _make(workshop: Workshop, file: OpenFile, recipe: Recipe) -> int:
    where = f"file {file.id} ({type(file.resource).__name__})"
    with words(where, "cannot be made again", "report it with this host's kernel version"):
        fd = workshop.keep(recipe(workshop, file, file.resource))
        finish(fd, file)
    return fd


def make_regular(workshop: Workshop, file: OpenFile, resource: RegularFile) -> int:
    """A file, directory or device by its path; or a deleted file made from its content."""
    content = workshop.checkpoint.contents.get(resource.content_id)
    if content and not content.path:
        return reopen(ghost(workshop, content.id, resource.path), file.flags)
    with workshop.probe(resource.path) as probe:
        _check(workshop, file, resource, probe)
        if file.flags & os.O_PATH:
            return os.dup(probe)
        with words(
            f"file {resource.path}", "cannot be opened as before", "check its permissions and file system"
        ):
            return reopen(probe, file.flags)


def _check(workshop: Workshop, file: OpenFile, resource: RegularFile, probe: int) -> None:
    """Raise RestoreError unless what is at the path can stand for what was there."""
    status = os.fstat(probe)
    where = f"file {resource.path}"
    same_kind = st.S_IFMT(status.st_mode) == st.S_IFMT(resource.mode)
    if not same_kind or (st.S_ISCHR(status.st_mode) and status.st_rdev != resource.rdev):
        raise RestoreError(
            "is another kind of file on this host", where=where, remedy="put the same kind of file there"
        )
    if resource.build_id and _build_id(probe) != resource.build_id:
        raise RestoreError(
            f"is another build on this host (build id is not {resource.build_id.hex()})",
            where=where,
            remedy="install the same version of the package that it belongs to",
        )
    if file.id in _mapped_privately(workshop.checkpoint) and status.st_size != resource.size:
        raise RestoreError(
            f"has {status.st_size} bytes on this host and had {resource.size} where the process mapped it",
            where=where,
            remedy="copy the same file to this host",
        )


def _build_id(probe: int) -> bytes:
    fd = reopen(probe, os.O_RDONLY)
    try:
        if not os.fstat(fd).st_size:
            return b""
        with mmap.mmap(fd, 0, mmap.MAP_PRIVATE, mmap.PROT_READ) as data:
            return elf.build_id(data)
    finally:
        os.close(fd)


def _mapped_privately(checkpoint: Checkpoint) -> set[int]:
    return {
        vma.file_id
        for task in checkpoint.tasks
        if task.mm
        for vma in task.mm.vmas
        if vma.kind is VmaKind.FILE and vma.flags & mmap.MAP_PRIVATE
    }


# In the order in which they are made. Inotify comes last, so that it sees none of the others being created.
_RECIPES: Mapping[type[Resource], Recipe] = {
    RegularFile: make_regular,
    PipeEnd: pipes.make_pipe_end,
    EventFd: anon.make_eventfd,
    TimerFd: anon.make_timerfd,
    SignalFd: anon.make_signalfd,
    MemFd: memfds.make_memfd,
    Epoll: anon.make_epoll,
    Inotify: anon.make_inotify,
}
