"""Typed system calls on descriptors of one's own. Errors are OSError with the kernel's errno; times are ns.

Python's standard library has the rest (pipes, eventfd, memfd, fcntl). Sources: the man page of each call.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import struct
from contextlib import suppress
from typing import NamedTuple

from lazyproc.kernel._core import ffi
from lazyproc.kernel.sys import KCMP_EPOLL_TFD, kcmp, syscall
from lazyproc.limits import raise_limits

SYS_FSTATFS = 138
SYS_EPOLL_CTL = 233
SYS_INOTIFY_ADD_WATCH = 254
SYS_INOTIFY_RM_WATCH = 255
SYS_UNSHARE = 272
SYS_TEE = 276
SYS_TIMERFD_CREATE = 283
SYS_TIMERFD_SETTIME = 286
SYS_TIMERFD_GETTIME = 287
SYS_SIGNALFD4 = 289
SYS_EPOLL_CREATE1 = 291
SYS_INOTIFY_INIT1 = 294
SYS_OPEN_BY_HANDLE_AT = 304

# f_type of statfs(2), include/uapi/linux/magic.h
TMPFS_MAGIC = 0x01021994  # devtmpfs too
RAMFS_MAGIC = 0x858458F6
HUGETLBFS_MAGIC = 0x958458F6
PROC_SUPER_MAGIC = 0x9FA0
MQUEUE_MAGIC = 0x19800202  # ipc/mqueue.c
SECRETMEM_MAGIC = 0x5345434D

EPOLL_CTL_ADD = 1
AMPLE = 4096  # descriptors; a table of 32 KiB
SPLICE_F_NONBLOCK = 2
CLONE_FILES = 0x400
TFD_TIMER_ABSTIME = 1
TFD_IOC_SET_TICKS = 0x40085400  # _IOW('T', 0, u64), include/uapi/linux/timerfd.h
F_SETSIG = 10
F_GETSIG = 11
F_GETOWN_EX = 16
F_GETOWNER_UIDS = 17  # kernels with CONFIG_CHECKPOINT_RESTORE, fs/fcntl.c
F_OWNER_TID, F_OWNER_PID, F_OWNER_PGRP = range(3)


def make_room(count: int) -> None:
    """Make our descriptor table large enough for `count` descriptors now, or for as many as we may have. From now on
    that is what the hard limit allows: each process of a tree takes some, also those that are forked while it arrives.

    It grows when the first beyond it is opened (64 at the start, then always twice as many), and where others share it,
    threads too, that waits until every processor has passed through the scheduler: 7 to 15 ms (fs/file.c,
    expand_fdtable, synchronize_rcu).
    """
    raise_limits()
    highest = min(count, resource.getrlimit(resource.RLIMIT_NOFILE)[0]) - 1
    some = os.open("/", os.O_PATH | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # EMFILE: the last is in use, so it is as large already
            os.close(fcntl.fcntl(some, fcntl.F_DUPFD_CLOEXEC, highest))
    finally:
        os.close(some)


def _address(buffer: bytes | bytearray) -> int:
    """Where `buffer` lies; the caller keeps it alive during the call."""
    return int(ffi.cast("uintptr_t", ffi.from_buffer(buffer)))


def file_system(fd: int) -> int:
    """The f_type of fstatfs(2); O_PATH descriptors are fine."""
    out = bytearray(120)  # struct statfs
    syscall(SYS_FSTATFS, fd, _address(out))
    return int(struct.unpack_from("<q", out)[0])


def tee(source: int, target: int, length: int) -> int:
    """tee(2) without waiting: bytes copied between two pipes, none consumed; 0 when it is empty."""
    try:
        return syscall(SYS_TEE, source, target, length, SPLICE_F_NONBLOCK)
    except BlockingIOError:
        return 0


class TimerSetting(NamedTuple):
    """struct itimerspec: `value_ns` is what is left, 0 disarmed."""

    value_ns: int
    interval_ns: int


def timerfd_create(clock: int, flags: int) -> int:
    return syscall(SYS_TIMERFD_CREATE, clock, flags)


def timerfd_settime(fd: int, flags: int, setting: TimerSetting) -> None:
    spec = struct.pack("<4q", *divmod(setting.interval_ns, 10**9), *divmod(setting.value_ns, 10**9))
    syscall(SYS_TIMERFD_SETTIME, fd, flags, _address(spec), 0)


def timerfd_gettime(fd: int) -> TimerSetting:
    """A periodic timer that has expired is accounted for by this call (fs/timerfd.c do_timerfd_gettime)."""
    spec = bytearray(32)
    syscall(SYS_TIMERFD_GETTIME, fd, _address(spec))
    interval_s, interval_ns, value_s, value_ns = struct.unpack("<4q", spec)
    return TimerSetting(value_s * 10**9 + value_ns, interval_s * 10**9 + interval_ns)


def timerfd_set_ticks(fd: int, ticks: int) -> None:
    """Expirations not yet read; at least 1. Kernels with CONFIG_CHECKPOINT_RESTORE."""
    fcntl.ioctl(fd, TFD_IOC_SET_TICKS, struct.pack("<Q", ticks))


def signalfd(mask: int, flags: int) -> int:
    """A new signalfd for the signals of `mask` (bit n-1 is signal n)."""
    bits = struct.pack("<Q", mask)
    return syscall(SYS_SIGNALFD4, -1, _address(bits), len(bits), flags)


def epoll_create(flags: int) -> int:
    return syscall(SYS_EPOLL_CREATE1, flags)


def epoll_add(epfd: int, fd: int, events: int, data: int) -> None:
    event = struct.pack("<IQ", events, data)  # packed on x86-64
    syscall(SYS_EPOLL_CTL, epfd, EPOLL_CTL_ADD, fd, _address(event))


def kcmp_epoll_target(pid: int, fd: int, epoll_pid: int, epfd: int, target: int, nth: int) -> int:
    """kcmp(2) of descriptor `fd` of `pid` with what epoll set `epfd` of `epoll_pid` watches under number
    `target`.

    `nth` counts the entries of that number, in fdinfo's order. The result is ordered as for KCMP_FILE.
    """
    slot = struct.pack("<III", epfd, target, nth)
    return kcmp(pid, epoll_pid, KCMP_EPOLL_TFD, fd, _address(slot))


def inotify_init(flags: int) -> int:
    return syscall(SYS_INOTIFY_INIT1, flags)


def inotify_add_watch(fd: int, path: str, mask: int) -> int:
    """The watch descriptor; the kernel counts them up from 1 and uses none again (idr_alloc_cyclic)."""
    name = os.fsencode(path) + b"\0"
    return syscall(SYS_INOTIFY_ADD_WATCH, fd, _address(name), mask)


def inotify_rm_watch(fd: int, wd: int) -> None:
    syscall(SYS_INOTIFY_RM_WATCH, fd, wd)


def open_by_handle(mount_fd: int, handle_type: int, handle: bytes, flags: int) -> int:
    """open_by_handle_at(2); `mount_fd` is any descriptor on the file system but an O_PATH one."""
    packed = struct.pack("<Ii", len(handle), handle_type) + handle
    return syscall(SYS_OPEN_BY_HANDLE_AT, mount_fd, _address(packed), flags)


class SignalOwner(NamedTuple):
    """Who gets SIGIO: `type` F_OWNER_*, `pid` in the caller's pid namespace, 0 nobody; ids of who set it."""

    type: int
    pid: int
    signal: int
    uid: int
    euid: int


def signal_owner(fd: int) -> SignalOwner:
    """F_GETOWN_EX, F_GETSIG and F_GETOWNER_UIDS. EBADF for O_PATH descriptors."""
    kind, pid = struct.unpack("<ii", fcntl.fcntl(fd, F_GETOWN_EX, bytes(8)))
    uid, euid = struct.unpack("<II", fcntl.fcntl(fd, F_GETOWNER_UIDS, bytes(8))) if pid else (0, 0)
    return SignalOwner(kind, pid, fcntl.fcntl(fd, F_GETSIG), uid, euid)


def unshare_descriptors() -> None:
    """Give the calling thread a descriptor table of its own: a copy of what it shared so far."""
    syscall(SYS_UNSHARE, CLONE_FILES)


def is_gone(error: OSError) -> bool:
    """Whether a descriptor or process that /proc still listed has been closed or has ended meanwhile."""
    return error.errno in (errno.ENOENT, errno.ESRCH, errno.EBADF)
