"""Taking the open files out of a process tree: every descriptor to its open file description, each of those
once.

The same pass, without contents, tells beforehand what would stop it (`explain_descriptors`).
"""

from __future__ import annotations

import os
import stat as st
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from lazyproc.dump import anon, files, pipes, terminals
from lazyproc.dump.locks import note_locks, refuse_awaited, refuse_locks
from lazyproc.dump.look import Look, attempt, leads_to, look_at
from lazyproc.dump.permits import MOVED, Permits
from lazyproc.dump.refusals import refusal
from lazyproc.dump.registry import FileSeen, Refused, Registry, TaskRef
from lazyproc.dump.sockets import SocketTable
from lazyproc.errors import NoSuchProcess, Obstacle
from lazyproc.facts import dataclass, replace
from lazyproc.kernel import fds, proc
from lazyproc.kernel.netfilter import Flow
from lazyproc.kernel.proc_fdinfo import fdinfo
from lazyproc.kernel.sys import KCMP_FILES, kcmp
from lazyproc.model import (
    Descriptor,
    FileContent,
    OpenFile,
    Owner,
    Pipe,
    RegularFile,
    Resource,
    SharedMemory,
    UnixSocket,
)
from lazyproc.outside import external_name

SOCKET_LINK = "socket:["

Gatherer = Callable[[Registry, Look, int], Resource]


@dataclass(frozen=True, slots=True)
class Gathered:
    """The registry's own tables: files mapped later appear in them too. The caller closes `sockets`."""

    descriptors: Mapping[int, tuple[Descriptor, ...]]  # by vpid
    files: dict[int, OpenFile]
    pipes: dict[int, Pipe]
    shared: dict[int, SharedMemory]
    contents: dict[int, FileContent]
    obstacles: list[Obstacle]
    registry: Registry
    sockets: SocketTable


def gather_descriptors(
    tasks: Sequence[TaskRef],
    *,
    tcp_close: bool = False,
    permits: Permits = MOVED,
    hold: Callable[[Sequence[Flow]], None] | None = None,
    seen: Mapping[FileSeen, RegularFile] = {},
) -> Gathered:
    """All descriptors of a frozen tree, root first. Nothing is consumed: the tree can run on as it was.

    `hold` is told which packets to hold back before the queues of sockets are read; `seen` are files looked at before.
    What cannot be dumped is
    in `obstacles`. Raises NoSuchProcess when a process is gone.
    """
    registry = Registry(tuple(tasks), permits=permits, seen=seen)
    sockets = SocketTable(registry, tcp_close)
    try:
        looks: dict[int, Look] = {}
        tables = {task.vpid: _table(registry, task, looks) for task in tasks}
        _inspect(registry, sockets, looks, hold)
        _refuse_odd_tables(registry)
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


def early_flows(tasks: Sequence[TaskRef], *, tcp_close: bool = False) -> list[Flow]:
    """What can be held back before the freeze, and so costs none of it (SocketTable.early_flows)."""
    registry = Registry(tuple(tasks), contents_wanted=False)
    with SocketTable(registry, tcp_close) as sockets:
        for task in tasks:
            with suppress(NoSuchProcess):
                _table(registry, task, {})
        _add_sockets(registry, sockets, {})
        return sockets.early_flows()


def explain_descriptors(tasks: Sequence[TaskRef], *, tcp_close: bool = False) -> list[Obstacle]:
    """What would stop gather_descriptors, of a tree that runs. No pipe, socket or file is read."""
    registry = Registry(tuple(tasks), contents_wanted=False)
    look_at_descriptors(registry, tcp_close=tcp_close)
    return registry.obstacles


def look_at_descriptors(registry: Registry, *, tcp_close: bool = False) -> None:
    """Files, pipes and obstacles of a tree that runs, without contents, into a registry that wants none."""
    with SocketTable(registry, tcp_close) as sockets:
        looks: dict[int, Look] = {}
        for task in registry.tasks:
            with suppress(NoSuchProcess):
                _table(registry, task, looks)
        _inspect(registry, sockets, looks, None)
    refuse_awaited(registry)
    _refuse_odd_tables(registry)


def _table(registry: Registry, task: TaskRef, looks: dict[int, Look]) -> tuple[Descriptor, ...]:
    """The descriptors of one process; `looks` gets the first one of each new file, by file id."""
    rows = []
    for fd in proc.descriptor_numbers(task.pid):
        with attempt(registry, task.pid, f"fd {fd}"):
            info = fdinfo(proc.read(task.pid, f"fdinfo/{fd}"))
            if info.flags & os.O_PATH:
                _refuse_pathless(leads_to(f"/proc/{task.pid}/fd/{fd}"))
            file_id, is_new = registry.intern(task.pid, fd)
            if is_new:
                with suppress(Refused):  # which is said by `_add_sockets`, once for each file
                    looks[file_id] = Look(task.pid, fd, leads_to(f"/proc/{task.pid}/fd/{fd}"), info)
            note_locks(registry, task, fd, info.locks, first=is_new)
            rows.append(Descriptor(fd, file_id, info.flags & os.O_CLOEXEC != 0))
    return tuple(rows)


def _refuse_pathless(link: str) -> None:
    """An O_PATH descriptor of what has no path, by way of /proc/PID/fd: nothing can make that anew."""
    if not link.startswith("/"):
        raise Refused(f"is an O_PATH descriptor of {link}", "let the program close it")


def _inspect(
    registry: Registry,
    sockets: SocketTable,
    looks: dict[int, Look],
    hold: Callable[[Sequence[Flow]], None] | None,
) -> None:
    """Gather each file once. Sockets come first: their queues may hold files that epoll watches."""
    while registry.queue:
        _add_sockets(registry, sockets, looks)
        if hold is not None:
            hold(sockets.flows())
        if registry.contents_wanted:
            sockets.read_queues()
    # What has a path comes last: see pipes._number.
    for number, look in sorted(looks.items(), key=lambda item: item[1].link.startswith("/")):
        if not look.link.startswith(SOCKET_LINK):
            _describe(registry, number, look)
    for number, socket in sockets.resolve().items():
        _describe(registry, number, looks[number], socket)
    _see_outside(registry)
    pipes.finish_pipes(registry, looks)
    terminals.finish_terminals(registry, looks)


def _describe(registry: Registry, number: int, look: Look, resource: Resource | None = None) -> None:
    """Put one file into the registry, or an obstacle. Without `resource` it is gathered."""
    with attempt(registry, look.pid, f"fd {look.fd}"), registry.taken(look.pid, look.fd) as taken:
        if not registry.contents_wanted and os.readlink(f"/proc/self/fd/{taken}") != look.link:
            return  # a running process has closed it and opened another file under its number
        refuse_locks(registry, look)
        status = os.fstat(taken)
        name = external_name(status, look.info.mnt_id) if look.link.startswith("/") else ""
        outside = name in registry.permits.external
        if outside:
            resource = RegularFile(name, status.st_mode)
        elif resource is None:
            resource = _gatherer(look, status)(registry, look, taken)
        flags = look.info.flags & ~os.O_CLOEXEC
        owner = _owner(registry, look, taken)
        registry.files[number] = OpenFile(number, flags, look.info.pos, owner, resource, outside)


def _see_outside(registry: Registry) -> None:
    """Unix sockets whose other end is not in the tree; whether they may be is known already."""
    files = list(registry.files.items())
    inside = {file.resource.inode for _, file in files if isinstance(file.resource, UnixSocket)} | {0}
    for number, file in files:
        unix = file.resource
        if isinstance(unix, UnixSocket) and unix.peer not in inside and not unix.peer_name:
            registry.files[number] = replace(file, outside=True)


def _add_sockets(registry: Registry, sockets: SocketTable, looks: dict[int, Look]) -> None:
    """Hand the sockets on the queue to their table; `looks` gets what came in a message."""
    while registry.queue:
        place = registry.queue.popleft()
        with attempt(registry, place.pid, f"fd {place.fd}"):
            look = looks.get(place.file_id) or look_at(place.pid, place.fd)
            looks[place.file_id] = look
            if look.link.startswith(SOCKET_LINK):
                with registry.taken(place.pid, place.fd) as taken:
                    sockets.add(place, taken)


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
    if terminals.is_terminal(status):
        return terminals.gather_terminal
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


def _refuse_odd_tables(registry: Registry) -> None:
    """Refuse two processes with one descriptor table (CLONE_FILES), and two tables in one process."""
    for at, task in enumerate(registry.tasks):
        with attempt(registry, task.pid, "process"):
            for other in registry.tasks[:at]:
                if kcmp(other.pid, task.pid, KCMP_FILES) == 0:
                    why = f"it shares its descriptor table with pid {other.pid} (CLONE_FILES)"
                    raise Refused(why, "start the processes without CLONE_FILES")
        with suppress(NoSuchProcess):
            _refuse_apart(registry, task.pid)


def _refuse_apart(registry: Registry, pid: int) -> None:
    for tid in proc.task_ids(pid):
        with attempt(registry, pid, f"thread {tid}"):
            if kcmp(pid, tid, KCMP_FILES) != 0:
                why = "it has a descriptor table of its own, apart from the process's other threads"
                raise Refused(why, "run the program without unshare(CLONE_FILES) in a thread")
