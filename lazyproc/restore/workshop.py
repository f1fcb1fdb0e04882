"""Where files are made again: the destination's paths, what exists already, and words for what fails."""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from lazyproc.errors import RestoreError
from lazyproc.events import Listener
from lazyproc.facts import dataclass, field
from lazyproc.kernel import fds
from lazyproc.model import Checkpoint, OpenFile, Pipe, RegularFile, SharedMemory, VmaKind
from lazyproc.restore.users import Users

OpenPath = Callable[[str, int, int], int]  # path from the tree's root directory, O_*, mode -> descriptor

LARGEFILE = 0o100000  # O_LARGEFILE, which Python defines as 0

# What open(2) takes again; O_ASYNC waits for fcntl, the others have done their work.
REOPEN_FLAGS = (
    os.O_ACCMODE
    | os.O_APPEND
    | os.O_NONBLOCK
    | os.O_SYNC
    | os.O_DIRECT
    | os.O_NOATIME
    | os.O_PATH
    | LARGEFILE
)


@dataclass(slots=True)
class Workshop:
    """One make_files in progress. `stack` closes and undoes on its end."""

    checkpoint: Checkpoint
    open_path: OpenPath
    listener: Listener
    stack: ExitStack
    users: Users = field(default_factory=Users)
    files: dict[int, int] = field(default_factory=dict)  # file id -> descriptor
    objects: dict[int, int] = field(
        default_factory=dict
    )  # SharedMemory id -> a memfd open for reading and writing
    ghosts: dict[int, int] = field(default_factory=dict)  # content id of a deleted file -> O_PATH descriptor
    pipes: dict[int, int] = field(default_factory=dict)  # pipe id -> descriptor of either end
    originals: dict[tuple[type[Pipe] | type[SharedMemory], int, int], int] = field(
        default_factory=dict
    )  # by kind, id and access: what no open(2) has made, until it is given to somebody
    mapped: frozenset[int] = field(init=False)  # files whose pages in mappings are not all the process's own
    # Contents of files of O_TMPFILE: they may be given a name yet (linkat(2)), and those that were removed may not.
    nameless: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        self.mapped = frozenset(
            vma.file_id
            for task in self.checkpoint.tasks
            if task.mm
            for vma in task.mm.vmas
            if vma.kind is VmaKind.FILE and vma.flags & mmap.MAP_PRIVATE
        )
        self.nameless = frozenset(
            file.resource.content_id
            for file in self.checkpoint.files.values()
            if isinstance(file.resource, RegularFile) and file.flags & os.O_TMPFILE == os.O_TMPFILE
        )

    def original(self, what: Pipe | SharedMemory, flags: int) -> int | None:
        """An open file description that was not made by open(2), for the first who wants one."""
        return self.originals.pop((type(what), what.id, flags & os.O_ACCMODE), None)

    def keep(self, fd: int) -> int:
        """Close `fd` when the workshop closes."""
        self.stack.callback(os.close, fd)
        return fd


@contextmanager
def probe(open_path: OpenPath, path: str) -> Iterator[int]:
    """An O_PATH descriptor: what is there can be looked at without opening it (a FIFO would block)."""
    with words(f"file {path}", "is not on this host", f"copy {path} to this host, or restore where it is"):
        fd = open_path(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, 0)
    try:
        yield fd
    finally:
        os.close(fd)


def reopen(fd: int, flags: int) -> int:
    """A new open file description of the same file, deleted or not."""
    return os.open(f"/proc/self/fd/{fd}", flags & REOPEN_FLAGS | os.O_CLOEXEC)


def finish(fd: int, file: OpenFile) -> None:
    """What every kind of file gets after it was made: status flags, position, the signal of F_SETSIG."""
    if file.flags & os.O_PATH:
        return
    settable = os.O_APPEND | os.O_NONBLOCK | os.O_DIRECT | os.O_NOATIME | os.O_ASYNC
    current = fcntl.fcntl(fd, fcntl.F_GETFL)
    if (current ^ file.flags) & settable:
        fcntl.fcntl(fd, fcntl.F_SETFL, current & ~settable | file.flags & settable)
    if file.pos:
        os.lseek(fd, file.pos, os.SEEK_SET)
    if file.owner.signal:
        fcntl.fcntl(fd, fds.F_SETSIG, file.owner.signal)


@contextmanager
def words(where: str, what: str, remedy: str) -> Iterator[None]:
    """OSError inside becomes RestoreError."""
    try:
        yield
    except OSError as error:
        raise RestoreError(f"{what} ({error.strerror})", where=where, remedy=remedy) from error
