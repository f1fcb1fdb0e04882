"""Gatherers of files without a path: eventfd, timerfd, signalfd, epoll and inotify."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TypeVar

from lazyproc.dump.look import Look, look_at
from lazyproc.dump.pipes import unread
from lazyproc.dump.registry import Inode, Place, Refused, Registry
from lazyproc.errors import UnexpectedProcText
from lazyproc.kernel import fds, proc
from lazyproc.kernel.proc_fdinfo import EpollInfo, InotifyInfo, TimerFdInfo
from lazyproc.model import Epoll, EpollTarget, EventFd, Inotify, InotifyWatch, SignalFd, TimerFd

SIGNALFD_LINK = "anon_inode:[signalfd]"
LAST_WATCH = 1 << 16  # a watch descriptor is restored by counting up to it, two system calls each
_EXPIRY_ROUNDS = 3
_GLANCES = 8

T = TypeVar("T")


def _told(value: T | None, look: Look) -> T:
    """What fdinfo has to tell of this kind of file."""
    if value is None:
        raise UnexpectedProcText(
            f"does not say what {look.link} does", where=f"/proc/{look.pid}/fdinfo/{look.fd}"
        )
    return value


def gather_eventfd(_registry: Registry, look: Look, _taken: int) -> EventFd:
    info = _told(look.info.eventfd, look)
    return EventFd(info.count, info.semaphore)


def gather_signalfd(_registry: Registry, look: Look, _taken: int) -> SignalFd:
    return SignalFd(_told(look.info.signalfd_mask, look))


def gather_timerfd(_registry: Registry, look: Look, taken: int) -> TimerFd:
    info = _settled_timer(look, taken)
    return TimerFd(info.clock, info.settime_flags, info.ticks, info.value_ns, info.interval_ns)


def _settled_timer(look: Look, taken: int) -> TimerFdInfo:
    """After timerfd_gettime all ticks are counted and a periodic timer runs, unless it expires just then."""
    for _ in range(_EXPIRY_ROUNDS):
        left = fds.timerfd_gettime(taken)
        info = _told(look_at(look.pid, look.fd).info.timerfd, look)
        if info.value_ns or not left.value_ns:
            break
    return info


# --- epoll --------------------------------------------------------------------------------------------------


def gather_epoll(registry: Registry, look: Look, _taken: int) -> Epoll:
    """The watched files. An entry outlives the closing of its number as long as the file is open."""
    seen: Counter[int] = Counter()
    targets = []
    for entry in look.info.epoll:
        place = registry.epoll_target(look.pid, look.fd, entry.fd, seen[entry.fd], _inode(entry))
        seen[entry.fd] += 1
        if place is None and not registry.contents_wanted and _comes_or_goes(look, entry):
            continue
        targets.append(EpollTarget(entry.fd, _target(registry, look, entry, place), entry.events, entry.data))
    return Epoll(tuple(targets))


def _comes_or_goes(look: Look, entry: EpollInfo) -> bool:
    """Whether a running process has opened the file since its descriptors were listed, or closed it since the set was
    read: a server with many connections does all the time, and gives the number to the next one.
    """
    return any(_is_open_there(look, entry) or not _is_watched(look, entry) for _ in range(_GLANCES))


def _is_open_there(look: Look, entry: EpollInfo) -> bool:
    with suppress(OSError):
        status = os.stat(f"/proc/{look.pid}/fd/{entry.fd}")
        return (status.st_dev, status.st_ino) == _inode(entry)
    return False


def _is_watched(look: Look, entry: EpollInfo) -> bool:
    watched = look_at(look.pid, look.fd).info.epoll
    return any(each.fd == entry.fd and _inode(each) == _inode(entry) for each in watched)


def _target(registry: Registry, look: Look, entry: EpollInfo, place: Place | None) -> int:
    if place is None:
        raise Refused(
            f"it watches a file, added as descriptor {entry.fd}, that no process of the tree has open",
            "move the process that has it too, or let the program take it out of the set (EPOLL_CTL_DEL)",
        )
    # A watched signalfd belongs to the process that adds it (fs/signalfd.c), so that has to add it again.
    if registry.is_open(look.pid, entry.fd, place) or registry.link(place) != SIGNALFD_LINK:
        return place.file_id
    raise Refused(
        f"it watches a signalfd under number {entry.fd}, which is no longer open there",
        "let the program keep the signalfd open under the number it added it with",
    )


# --- inotify ------------------------------------------------------------------------------------------------


def gather_inotify(registry: Registry, look: Look, taken: int) -> Inotify:
    if waiting := unread(taken):
        raise Refused(
            f"{waiting} bytes of file events wait in it, which cannot be copied out and put back",
            "try again when the program has read them",
        )
    mounts = proc.mountinfo(proc.read(look.pid, "mountinfo")) if look.info.inotify else ()
    return Inotify(tuple(_watch(registry, mounts, entry) for entry in look.info.inotify))


def _watch(registry: Registry, mounts: Sequence[proc.Mount], entry: InotifyInfo) -> InotifyWatch:
    if entry.wd > LAST_WATCH:
        raise Refused(f"its watch descriptor {entry.wd} is too high to be made again", "restart the program")
    for path in _watched_paths(registry, mounts, entry):
        with suppress(OSError):
            status = os.lstat(registry.outside(path))
            if (status.st_dev, status.st_ino) == _inode(entry):
                return InotifyWatch(entry.wd, path, entry.mask)
    raise Refused(
        f"watch {entry.wd} is on inode {entry.inode} of device {entry.dev[0]}:{entry.dev[1]}, whose path "
        f"cannot be found",
        "keep the file or directory open in the program, or remove the watch before the move",
    )


def _inode(entry: EpollInfo | InotifyInfo) -> Inode:
    return os.makedev(*entry.dev), entry.inode


def _watched_paths(registry: Registry, mounts: Sequence[proc.Mount], entry: InotifyInfo) -> Iterator[str]:
    """Where the watched inode may be: by its handle, or a mount point, or something that is open."""
    points = [mount.point for mount in mounts if mount.dev == entry.dev]
    if entry.handle is not None and entry.handle_type is not None:
        for point in points:
            with suppress(OSError):
                yield _path_of_handle(registry, point, entry.handle_type, entry.handle)
    yield from points
    for task in registry.tasks:
        yield registry.inside(os.readlink(f"/proc/{task.pid}/cwd"))
    for place in registry.places(_inode(entry)):
        yield registry.inside(registry.link(place))


def _path_of_handle(registry: Registry, point: str, handle_type: int, handle: bytes) -> str:
    mount = os.open(registry.outside(point), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fd = fds.open_by_handle(mount, handle_type, handle, os.O_PATH | os.O_CLOEXEC)
    finally:
        os.close(mount)
    try:
        return registry.inside(os.readlink(f"/proc/self/fd/{fd}"))
    finally:
        os.close(fd)
