"""Files without a path: eventfd, timerfd, signalfd, epoll (empty) and inotify."""

from __future__ import annotations

import os
from contextlib import suppress

from lazyproc.errors import RestoreError
from lazyproc.kernel import fds
from lazyproc.model import Epoll, EventFd, Inotify, InotifyWatch, OpenFile, SignalFd, TimerFd
from lazyproc.restore.workshop import Workshop, probe, words


def make_eventfd(_workshop: Workshop, _file: OpenFile, resource: EventFd) -> int:
    """The count goes in by a write: eventfd2(2) takes 32 bits of it only."""
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK | (os.EFD_SEMAPHORE if resource.semaphore else 0))
    if resource.count:
        os.eventfd_write(fd, resource.count)
    return fd


def make_timerfd(workshop: Workshop, _file: OpenFile, resource: TimerFd) -> int:
    """Armed with the time that was left, which no time namespace or clock offset changes.

    Only an absolute CLOCK_REALTIME timer keeps its date: it is to expire when the wall clock says so.
    """
    remedy = "the clock needs CAP_WAKE_ALARM" if resource.clock in _ALARM_CLOCKS else "report it"
    with words(f"timerfd of clock {resource.clock}", "cannot be made again", remedy):
        fd = fds.timerfd_create(resource.clock, os.O_CLOEXEC | os.O_NONBLOCK)
    value, flags = resource.value_ns, 0
    if resource.clock in _WALL_CLOCKS and resource.settime_flags & fds.TFD_TIMER_ABSTIME and value:
        value, flags = workshop.checkpoint.clocks.realtime_ns + value, resource.settime_flags
    fds.timerfd_settime(fd, flags, fds.TimerSetting(value, resource.interval_ns))
    if resource.ticks:  # after settime, which forgets them
        fds.timerfd_set_ticks(fd, resource.ticks)
    return fd


_WALL_CLOCKS = (0, 8)  # CLOCK_REALTIME, CLOCK_REALTIME_ALARM
_ALARM_CLOCKS = (8, 9)


def make_signalfd(_workshop: Workshop, _file: OpenFile, resource: SignalFd) -> int:
    return fds.signalfd(resource.mask, os.O_CLOEXEC | os.O_NONBLOCK)


def make_epoll(_workshop: Workshop, _file: OpenFile, _resource: Epoll) -> int:
    """Empty: see epolls.epoll_rows and epolls.add_orphans."""
    return fds.epoll_create(os.O_CLOEXEC)


def make_inotify(workshop: Workshop, _file: OpenFile, resource: Inotify) -> int:
    fd = fds.inotify_init(os.O_CLOEXEC | os.O_NONBLOCK)
    for watch in sorted(resource.watches, key=lambda watch: watch.wd):
        _watch(workshop, fd, watch)
    with suppress(BlockingIOError):  # IN_IGNORED of the watches that were only counted over
        while os.read(fd, 1 << 16):
            pass
    return fd


def _watch(workshop: Workshop, fd: int, watch: InotifyWatch) -> None:
    """Watch descriptors are counted up: add and remove until the next one is the one it had."""
    with probe(workshop.open_path, watch.path) as found:
        target = f"/proc/self/fd/{found}"
        with words(f"file {watch.path}", "cannot be watched", "raise fs.inotify.max_user_watches"):
            while (wd := fds.inotify_add_watch(fd, target, watch.mask)) < watch.wd:
                fds.inotify_rm_watch(fd, wd)
        if wd != watch.wd:
            raise RestoreError(
                f"cannot be watched as {watch.wd} again (got {wd})",
                where=f"file {watch.path}",
                remedy="report it",
            )
