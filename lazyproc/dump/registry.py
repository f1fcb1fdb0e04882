"""What a dump has found so far, each thing once: open file descriptions, pipes, shared memory, contents.

All gatherers of one dump share one Registry: it gives out the numbers, tells whether two descriptors are the
same open file description, and takes descriptors out of the tree.
"""

from __future__ import annotations

import os
import stat as st
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from lazyproc.dump.permits import MOVED, Permits
from lazyproc.errors import NoSuchProcess, Obstacle
from lazyproc.facts import dataclass, field
from lazyproc.kernel import proc
from lazyproc.kernel.fds import kcmp_epoll_target
from lazyproc.kernel.proc_fdinfo import LockInfo
from lazyproc.kernel.sys import KCMP_FILE, kcmp, pidfd_getfd
from lazyproc.model import FileContent, FileLock, OpenFile, Pipe, RegularFile, SharedMemory

Inode = tuple[int, int]  # st_dev, st_ino
FileSeen = tuple[str, tuple[int, ...]]  # what a link led to, and the stat of the file: see `file_seen`


@dataclass(frozen=True, slots=True)
class TaskRef:
    """A process of the tree: `pid` in our pid namespace, `vpid` in its own."""

    pid: int
    vpid: int
    pidfd: int


def file_seen(target: str, status: os.stat_result) -> FileSeen:
    """Whatever changes of a file, its name in the link or one of these does: ctime cannot be set."""
    return target, (
        *(status.st_dev, status.st_ino, status.st_mode, status.st_nlink, status.st_rdev),
        *(status.st_size, status.st_mtime_ns, status.st_ctime_ns),
    )


class Refused(Exception):
    """What a gatherer says of a thing that cannot be dumped; becomes an Obstacle of its process."""

    def __init__(self, why: str, remedy: str) -> None:
        super().__init__(why, remedy)
        self.why = why
        self.remedy = remedy


@dataclass(frozen=True, slots=True)
class Place:
    """Where an open file description was first seen: descriptor `fd` of process `pid`."""

    pid: int
    fd: int
    file_id: int
    inode: Inode
    is_socket: bool


class Numbers:
    """Counts from 1, the same number for the same key."""

    def __init__(self) -> None:
        self._known: dict[Hashable, int] = {}
        self._last = 0

    def new(self) -> int:
        self._last += 1
        return self._last

    def of(self, key: Hashable) -> tuple[int, bool]:
        """The number of `key`, and whether it is new."""
        if key in self._known:
            return self._known[key], False
        self._known[key] = self.new()
        return self._known[key], True


@dataclass(slots=True)
class Registry:
    """The tree's resources by number. Paths start at the root directory of `tasks[0]`, the tree's root.

    With `contents_wanted` False nothing is read out of pipes and files: so `explain` looks at running processes.
    `seen` is what such a look has found, in `looked`. `queue` holds the places of files that were interned and not yet
    looked at.
    """

    tasks: tuple[TaskRef, ...]
    contents_wanted: bool = True
    permits: Permits = MOVED
    files: dict[int, OpenFile] = field(default_factory=dict)
    pipes: dict[int, Pipe] = field(default_factory=dict)
    shared: dict[int, SharedMemory] = field(default_factory=dict)
    contents: dict[int, FileContent] = field(default_factory=dict)
    content_bytes: int = 0  # of all of them, as the file system counts
    locks: dict[int, list[FileLock]] = field(default_factory=dict)  # by vpid
    locked: dict[LockInfo, tuple[int, int]] = field(default_factory=dict)  # the same, with pid and fd
    obstacles: list[Obstacle] = field(default_factory=list)
    seen: Mapping[FileSeen, RegularFile] = field(default_factory=dict)  # before the freeze
    looked: dict[FileSeen, RegularFile] = field(default_factory=dict)  # whose content does not travel
    queue: deque[Place] = field(default_factory=deque)
    unread: bool = False  # a message that was not looked at waits in a socket, perhaps with descriptors
    objects: Numbers = field(default_factory=Numbers)  # SharedMemory, by Inode
    pipe_numbers: dict[Inode, int] = field(default_factory=dict)
    content_numbers: Numbers = field(default_factory=Numbers)  # by Inode
    _file_numbers: Numbers = field(default_factory=Numbers)
    _places: dict[Inode, list[Place]] = field(default_factory=dict)  # each list in the order of kcmp
    _first: dict[int, Place] = field(default_factory=dict)  # by file id
    _open: dict[tuple[int, int], Place] = field(default_factory=dict)  # what a process has under a number
    _root: str = ""  # of the tree, as we see it
    _vpids: dict[int, int | None] = field(default_factory=dict)

    def new_file_id(self) -> int:
        return self._file_numbers.new()

    def intern(self, pid: int, fd: int) -> tuple[int, bool]:
        """The number of the open file description behind `fd` of `pid`, and whether it is new.

        A new one is put on the queue. `pid` may be our own (descriptors received from a peeked message): that
        descriptor then has to stay open as long as the registry is in use. OSError when it was closed.
        """
        status = os.stat(f"/proc/{pid}/fd/{fd}")
        inode = status.st_dev, status.st_ino
        places = self._places.setdefault(inode, [])
        at, found = _search(places, lambda place: kcmp(place.pid, pid, KCMP_FILE, place.fd, fd))
        if found:
            self._open[pid, fd] = places[at]
            return places[at].file_id, False
        place = Place(pid, fd, self.new_file_id(), inode, st.S_ISSOCK(status.st_mode))
        self._open[pid, fd] = place
        places.insert(at, place)
        self._first[place.file_id] = place
        self.queue.append(place)
        return place.file_id, True

    def intern_path(self, key: Hashable) -> tuple[int, bool]:
        """The number of a file that is no descriptor (a mapping's, cwd, exe), by whatever identifies it."""
        return self._file_numbers.of(key)

    def place(self, file_id: int) -> Place:
        """Where a descriptor's file was first seen."""
        return self._first[file_id]

    def places(self, inode: Inode) -> tuple[Place, ...]:
        """Where each open file description of this inode was first seen."""
        return tuple(self._places.get(inode, ()))

    @staticmethod
    def link(place: Place) -> str:
        """What /proc/PID/fd/FD points to."""
        return os.readlink(f"/proc/{place.pid}/fd/{place.fd}")

    def epoll_target(self, pid: int, epfd: int, fd: int, nth: int, inode: Inode) -> Place | None:
        """Where the file that epoll set `epfd` of `pid` watches under number `fd` was seen; None: nowhere.

        `nth` counts the entries of that number in the set, in fdinfo's order. Each kcmp walks the set up to the entry
        (fs/eventpoll.c, ep_find_tfd): what the process has under that number comes first, and of a socket, whose only
        file that is, nothing is asked.
        """
        places = self._places.get(inode, [])

        def compare(place: Place) -> int:
            return kcmp_epoll_target(place.pid, place.fd, pid, epfd, fd, nth)

        here = self._open.get((pid, fd))
        if here is not None and here.inode == inode:
            # A socket cannot be opened again: no second file leads to it, but an O_PATH one, which is not dumped.
            only = here.is_socket and len(places) == 1
            if only or compare(here) == 0:
                return here
        at, found = _search(places, compare)
        return places[at] if found else None

    def is_open(self, pid: int, fd: int, place: Place) -> bool:
        """Whether process `pid` has this file under number `fd`, as it was interned."""
        return self._open.get((pid, fd)) is place

    def highest_descriptors(self) -> dict[int, int]:
        """By pid, as far as they were interned."""
        return dict(sorted(self._open))

    def pidfd(self, pid: int) -> int:
        return next(task.pidfd for task in self.tasks if task.pid == pid)

    @contextmanager
    def taken(self, pid: int, fd: int) -> Iterator[int]:
        """Our own duplicate of a descriptor: the same open file description, so never seek or read it."""
        own = os.dup(fd) if pid == os.getpid() else pidfd_getfd(self.pidfd(pid), fd)
        try:
            yield own
        finally:
            os.close(own)

    def vpid(self, pid: int) -> int | None:
        """What a process or thread of the tree is called in its own pid namespace; None for others."""
        if pid not in self._vpids:
            try:
                status = proc.status(proc.read(pid, "status"))
            except NoSuchProcess:
                return None
            inside = status.tgid in {task.pid for task in self.tasks}
            self._vpids[pid] = status.ns_pid[-1] if inside else None
        return self._vpids[pid]

    def number_of_dead(self, pid: int) -> int:
        """What a process that has ended was called in the tree's pid namespace; 0 where that cannot be known."""
        ours = all(task.pid == task.vpid for task in self.tasks)
        return pid if ours and not os.path.exists(f"/proc/{pid}") else 0

    def inside(self, path: str) -> str:
        """A path of ours (what readlink of /proc/PID/fd gives) as seen from the tree's root directory."""
        self._root = self._root or os.readlink(f"/proc/{self.tasks[0].pid}/root")
        if self._root == "/" or not f"{path}/".startswith(f"{self._root}/"):
            return path
        return path[len(self._root) :] or "/"

    def outside(self, path: str) -> str:
        """A path of the tree's as one that we can open, whatever mount namespace or root it lives in."""
        return f"/proc/{self.tasks[0].pid}/root{path}"

    def refuse(self, pid: int, where: str, refused: Refused) -> None:
        """Note an obstacle of `pid` at `where` ("fd 7", "mapping 0x..-0x..").

        A pid that is not of the tree is our own: we hold what was found in a message.
        """
        if pid not in {task.pid for task in self.tasks}:
            pid, where = self.tasks[0].pid, "a descriptor in a message that waits in a socket"
        self.obstacles.append(Obstacle(pid, where, refused.why, refused.remedy))


def _search(places: Sequence[Place], compare: Callable[[Place], int]) -> tuple[int, bool]:
    """Binary search with kcmp(2), which orders open file descriptions: (index, whether it is the same)."""
    low, high = 0, len(places)
    while low < high:
        middle = (low + high) // 2
        order = compare(places[middle])
        if order == 0:
            return middle, True
        low, high = (middle + 1, high) if order == 1 else (low, middle)
    return low, False
