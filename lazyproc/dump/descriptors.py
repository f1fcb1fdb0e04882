"""Taking the open files out of a process tree: every descriptor to its open file description, each of those once.

The same pass, without contents, tells beforehand what would stop it (`explain_descriptors`).
"""

from __future__ import annotations

import os
import stat as st
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from lazyproc.dump import anon, files, pipes
from lazyproc.dump.look import Look, attempt, look_at
from lazyproc.dump.refusals import refusal
from lazyproc.dump.registry import Refused, Registry, TaskRef
from lazyproc.dump.sockets import SocketTable
from lazyproc.errors import NoSuchProcess, Obstacle
from lazyproc.kernel import fds, proc
from lazyproc.kernel.netfilter import Flow
from lazyproc.kernel.proc_fdinfo import LockInfo
from lazyproc.kernel.sys import KCMP_FILES, kcmp
from lazyproc.model import Descriptor, FileContent, OpenFile, Owner, Pipe, Resource, SharedMemory

SOCKET_LINK = "socket:["

Gatherer = Callable[[Registry, Look, int], Resource]


@dataclass(frozen=True, slots=True)
class Gathered:
    """The registry's own tables: files mapped later appear in them too. `sockets` is the caller's to close."""

    descriptors: Mapping[int, tuple[Descriptor, ...]]  # by vpid
    files: dict[int, OpenFile]
    pipes: dict[int, Pipe]
    shared: dict[int, SharedMemory]
    contents: dict[int, FileContent]
    obstacles: list[Obstacle]
    registry: Registry
    sockets: SocketTable


def gather_descriptors(
    tasks: Sequence[TaskRef], *, tcp_close: bool = False, hold: Callable[[Sequence[Flow]], None] | None = None
) -> Gathered:
    """All descriptors of a frozen tree, root first. Nothing is consumed: the tree can run on as it was.

    `hold` is told which packets to hold back before the queues of sockets are read. What cannot be dumped is in
    `obstacles`. Raises NoSuchProcess when a process is gone.
    """
    registry = Registry(tuple(tasks))
    sockets = SocketTable(registry, tcp_close)
    try:
        tables = {task.vpid: _table(registry, task) for task in tasks}
        _inspect(registry, sockets, hold)
        _refuse_shared_tables(registry)
    except BaseException:
        sockets.__exit__(None, None, None)
        raise
    return Gathered(
        descriptors=tables,
        files=registry.files,
        pipes=registry.pipes,
        shared=registry.shared,
        contents=registry.contents,
        obstacles=registry.obstacles,
        registry=registry,
        sockets=sockets,
    )


def explain_descriptors(tasks: Sequence[TaskRef], *, tcp_close: bool = False) -> list[Obstacle]:
    """What would stop gather_descriptors, of a tree that runs: nothing is read out of pipes, sockets and files."""
    registry = Registry(tuple(tasks), contents_wanted=False)
    with SocketTable(registry, tcp_close) as sockets:
        for task in tasks:
            with suppress(NoSuchProcess):
                _table(registry, task)
        _inspect(registry, sockets, None)
    _refuse_shared_tables(registry)
    return registry.obstacles


def _table(registry: Registry, task: TaskRef) -> tuple[Descriptor, ...]:
    rows = []
    for fd in proc.descriptor_numbers(task.pid):
        with _unless_closed(registry):
            file_id, _ = registry.intern(task.pid, fd)
            cloexec = look_at(task.pid, fd).info.flags & os.O_CLOEXEC != 0
            rows.append(Descriptor(fd, file_id, cloexec))
    return tuple(rows)


def _inspect(registry: Registry, sockets: SocketTable, hold: Callable[[Sequence[Flow]], None] | None) -> None:
    """Look at each file once. Sockets come first: descriptors may lie in their queues, and epoll watches any."""
    looks: dict[int, Look] = {}
    while registry.queue:
        _add_sockets(registry, sockets, looks)
        if hold is not None:
            hold(sockets.flows())
        if registry.contents_wanted:
            sockets.read_queues()
    for number, look in looks.items():
        if not look.link.startswith(SOCKET_LINK):
            with _unless_closed(registry), attempt(registry, look.pid, f"fd {look.fd}"):
                with registry.taken(look.pid, look.fd) as taken:
                    resource = _gatherer(look, os.fstat(taken))(registry, look, taken)
                    registry.files[number] = _open_file(registry, number, look, taken, resource)
    for number, socket in sockets.resolve().items():
        look = looks[number]
        with _unless_closed(registry), attempt(registry, look.pid, f"fd {look.fd}"):
            with registry.taken(look.pid, look.fd) as taken:
                registry.files[number] = _open_file(registry, number, look, taken, socket)
    pipes.finish_pipes(registry, looks)


def _add_sockets(registry: Registry, sockets: SocketTable, looks: dict[int, Look]) -> None:
    """Take a look at everything on the queue; `looks` gets them by file id."""
    while registry.queue:
        place = registry.queue.popleft()
        with _unless_closed(registry):
            look = look_at(place.pid, place.fd)
            if look.link.startswith(SOCKET_LINK):
                with registry.taken(place.pid, place.fd) as taken:
                    sockets.add(place, taken)
            looks[place.file_id] = look


@contextmanager
def _unless_closed(registry: Registry) -> Iterator[None]:
    """Of a running process a descriptor may go while it is looked at; of a frozen one that is an error."""
    try:
        yield
    except (OSError, NoSuchProcess) as error:
        closed = isinstance(error, NoSuchProcess) or fds.is_gone(error)
        if registry.contents_wanted or not closed:
            raise


def _open_file(registry: Registry, number: int, look: Look, taken: int, resource: Resource) -> OpenFile:
    _refuse_locks(look.info.locks)
    flags = look.info.flags & ~os.O_CLOEXEC
    return OpenFile(number, flags, look.info.pos, _owner(registry, look, taken), resource)


def _refuse_locks(locks: Sequence[LockInfo]) -> None:
    if locks:
        raise Refused(
            f"it holds a file lock ({locks[0].kind} {locks[0].mode}), which cannot be kept through a move",
            "let the program release the lock before the move",
        )


def _owner(registry: Registry, look: Look, taken: int) -> Owner:
    if look.info.flags & os.O_PATH:
        return Owner()
    owner = fds.signal_owner(taken)
    if not owner.pid:
        return Owner(signal=owner.signal)
    vpid = registry.vpid(owner.pid)
    if vpid is None:
        raise Refused(
            f"its signals (F_SETOWN) go to pid {owner.pid} outside the tree", "let the program reset F_SETOWN"
        )
    return Owner(vpid, owner.type, owner.signal, owner.uid, owner.euid)


def _gatherer(look: Look, status: os.stat_result) -> Gatherer:
    """Which kind of file this is. Raises Refused for those that cannot be dumped."""
    if look.info.flags & os.O_PATH and look.link.startswith("/"):
        return files.gather_file
    if files.is_memfd(look.link, status):
        return files.gather_memfd
    if not look.link.startswith("/") and look.link in _ANONYMOUS:
        return _ANONYMOUS[look.link]
    by_path = look.link.startswith("/") or st.S_ISFIFO(status.st_mode)
    gatherer = _BY_MODE.get(st.S_IFMT(status.st_mode)) if by_path else None
    if gatherer is None:
        raise refusal(look.link)
    return gatherer


_BY_MODE: Mapping[int, Gatherer] = {
    st.S_IFREG: files.gather_file,
    st.S_IFDIR: files.gather_file,
    st.S_IFCHR: files.gather_device,
    st.S_IFIFO: pipes.gather_pipe_end,
}

_ANONYMOUS: Mapping[str, Gatherer] = {
    "anon_inode:[eventfd]": anon.gather_eventfd,
    "anon_inode:[eventpoll]": anon.gather_epoll,
    "anon_inode:[timerfd]": anon.gather_timerfd,
    anon.SIGNALFD_LINK: anon.gather_signalfd,
    "anon_inode:inotify": anon.gather_inotify,
}


def _refuse_shared_tables(registry: Registry) -> None:
    """clone(2) with CLONE_FILES and without CLONE_THREAD: what one process opens, the other has."""
    for at, task in enumerate(registry.tasks):
        with suppress(ProcessLookupError):
            other = next((t for t in registry.tasks[:at] if kcmp(t.pid, task.pid, KCMP_FILES) == 0), None)
            if other is not None:
                why = f"it shares its descriptor table with pid {other.pid} (CLONE_FILES)"
                refused = Refused(why, "start the processes without CLONE_FILES")
                registry.refuse(task.pid, "process", refused)
