"""Making open files again, in the process that restores: one recipe for each kind, in a table.

The files are made here, sent to the tasks and closed here before the tree runs (a pipe held open never ends).
What only the task itself can do comes as rows: epolls.epoll_rows, owners.owner_rows.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat as st
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import MappingProxyType
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
    TerminalSlave,
    TimerFd,
)
from lazyproc.needs import FileNeed, file_need
from lazyproc.restore import anon, memfds, pipes, terminals
from lazyproc.restore.contents import ghost, make_named_contents
from lazyproc.restore.users import Users
from lazyproc.restore.workshop import OpenPath, Workshop, finish, probe, reopen, words

NONE_YET: Mapping[int, int] = MappingProxyType({})
_MEMORY_DEVICES = 1  # MEM_MAJOR of the kernel's include/uapi/linux/major.h
Recipe = Callable[[Workshop, OpenFile, Any], int]  # the last one: the file's resource, of the recipe's kind


@dataclass(frozen=True, slots=True)
class Made:
    """Descriptors of ours. `objects` are the memfds by SharedMemory id, open for reading and writing."""

    files: dict[int, int]  # by file id
    objects: dict[int, int]


@contextmanager
def make_files(
    checkpoint: Checkpoint,
    *,
    open_path: OpenPath,
    listener: Listener = ignore,
    users: Users | None = None,
    made: Mapping[int, int] = NONE_YET,
) -> Iterator[Made]:
    """Every file of the checkpoint but sockets. On leaving all are closed; files created on a tmpfs are
    removed again when it was left by an exception.

    `open_path(path, flags, mode)` opens a path from the tree's root directory on this host; `users` whose rights it
    takes, otherwise ours. `made` are open already, and not closed here. Raises RestoreError that names the file and
    what to do.
    """
    with ExitStack() as stack:
        workshop = Workshop(checkpoint, open_path, listener, stack, users or Users(), dict(made))
        make_named_contents(workshop)
        memfds.make_objects(workshop)
        for kind, recipe in _RECIPES.items():
            for file in checkpoint.files.values():
                if isinstance(file.resource, kind) and file.id not in workshop.files:
                    workshop.files[file.id] = _make(workshop, file, recipe)
        yield Made(workshop.files, workshop.objects)


def _make(workshop: Workshop, file: OpenFile, recipe: Recipe) -> int:
    where = f"file {file.id} ({type(file.resource).__name__})"
    with (
        words(where, "cannot be made again", "report it with this host's kernel version"),
        workshop.users.opening(file.id),
    ):
        fd = workshop.keep(recipe(workshop, file, file.resource))
        finish(fd, file)
    return fd


def make_regular(workshop: Workshop, file: OpenFile, resource: RegularFile) -> int:
    """A file, directory or device by its path; or a deleted file made from its content."""
    content = workshop.checkpoint.contents.get(resource.content_id)
    if content and not content.path:
        found = ghost(workshop, content.id, resource.path)
        return os.dup(found) if file.flags & os.O_PATH else reopen(found, file.flags)
    need = file_need(resource, file.flags, sized=file.id in workshop.mapped)
    with probe(workshop.open_path, need.path) as found:
        check_file(need, found)
        if need.flags & os.O_PATH:
            return os.dup(found)
        with _opening(need):
            return reopen(found, need.flags)


def check_file(need: FileNeed, probe: int) -> None:
    """Raise RestoreError unless what is at the path (an O_PATH descriptor) can stand for what was there."""
    status = os.fstat(probe)
    wants_id = need.build_id and st.S_ISREG(status.st_mode)
    build_id = _build_id(probe, status) if wants_id else b""
    found = FoundFile(status.st_mode, status.st_rdev, status.st_size, build_id)
    against = objection(need, found)
    if against is not None:
        raise RestoreError(against[0], where=f"file {need.path}", remedy=against[1])


def check_access(need: FileNeed, probe: int) -> None:
    """Raise RestoreError unless the file may be opened as before. It is not opened: others may be watching it."""
    ways = {os.O_RDONLY: os.R_OK, os.O_WRONLY: os.W_OK}
    way = ways.get(need.flags & os.O_ACCMODE, os.R_OK | os.W_OK)
    with _opening(need):
        # As open(2) would see it: access(2) itself asks for our real uid.
        if not need.flags & os.O_PATH and not os.access(f"/proc/self/fd/{probe}", way, effective_ids=True):
            raise OSError(errno.EACCES, "no access, or a read-only file system")


def _opening(need: FileNeed) -> AbstractContextManager[None]:
    return words(f"file {need.path}", "cannot be opened as before", "check its permissions and file system")


@dataclass(frozen=True, slots=True)
class FoundFile:
    """What is at a path here; `build_id` only where one is wanted."""

    mode: int
    rdev: int
    size: int
    build_id: bytes


def objection(need: FileNeed, found: FoundFile) -> tuple[str, str] | None:
    """What is wrong with the file that is here, and the remedy; None when it will do. Pure."""
    same_kind = st.S_IFMT(found.mode) == st.S_IFMT(need.mode)
    if not same_kind or (st.S_ISCHR(found.mode) and not _same_device(need.rdev, found.rdev)):
        return "is another kind of file on this host", "put the same kind of file there"
    if need.build_id and found.build_id != need.build_id:
        return (
            f"is another build on this host (build id is not {need.build_id.hex()})",
            "install the same version of the package that it belongs to",
        )
    if need.size not in (-1, found.size):
        return (
            f"has {found.size} bytes on this host and had {need.size} where the process mapped it",
            "copy the same file to this host",
        )
    return None


def _same_device(needed: int, found: int) -> bool:
    """CRIU does not write down which device it was (0): it dumps memory devices only, /dev/null and the like."""
    return found == needed if needed else os.major(found) == _MEMORY_DEVICES


# By what changes with a file's content: they are read before a tree is stopped for us, and asked for again after that.
_build_ids: dict[tuple[int, ...], bytes] = {}


def _build_id(probe: int, status: os.stat_result) -> bytes:
    key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    if key not in _build_ids:
        _build_ids[key] = _read_build_id(probe)
    return _build_ids[key]


def _read_build_id(probe: int) -> bytes:
    fd = reopen(probe, os.O_RDONLY)
    try:
        if not os.fstat(fd).st_size:
            return b""
        with mmap.mmap(fd, 0, mmap.MAP_PRIVATE, mmap.PROT_READ) as data:
            return elf.build_id(data)
    finally:
        os.close(fd)


# In the order in which they are made. Inotify comes last, so that it sees none of the others being created.
_RECIPES: Mapping[type[Resource], Recipe] = {
    RegularFile: make_regular,
    PipeEnd: pipes.make_pipe_end,
    EventFd: anon.make_eventfd,
    TimerFd: anon.make_timerfd,
    SignalFd: anon.make_signalfd,
    MemFd: memfds.make_memfd,
    TerminalSlave: terminals.make_slave,
    Epoll: anon.make_epoll,
    Inotify: anon.make_inotify,
}
