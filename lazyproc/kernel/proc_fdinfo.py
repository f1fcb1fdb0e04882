"""/proc/PID/fdinfo/FD: what the kernel tells about one descriptor, bytes in, plain facts out.

Formats: proc(5), and the show_fdinfo functions of fs/eventfd.c, fs/eventpoll.c, fs/timerfd.c, fs/signalfd.c,
fs/notify/fdinfo.c, fs/pidfs.c and fs/locks.c. Devices are (major, minor).
"""

from __future__ import annotations

from lazyproc.facts import dataclass
from lazyproc.kernel.proc import Device, parser


@dataclass(frozen=True, slots=True)
class LockInfo:
    """A lock held through the descriptor: flock(2), fcntl(2) record lock or lease."""

    kind: str  # "FLOCK", "POSIX", "OFDLCK", "LEASE", "DELEG"
    mode: str  # "READ", "WRITE", "UNLCK"
    pid: int  # its owner, -1 for OFDLCK
    dev: Device
    inode: int
    start: int  # bytes
    end: int | None  # the last byte locked, None for the end of the file wherever that is
    breaking: bool = False  # a lease that somebody waits for


@dataclass(frozen=True, slots=True)
class EventFdInfo:
    count: int
    id: int
    semaphore: bool


@dataclass(frozen=True, slots=True)
class EpollInfo:
    """One watched file. `pos`, `inode` and `dev` are the file's, which may be open no longer under `fd`."""

    fd: int  # the number it was added under
    events: int
    data: int  # unsigned 64 bits
    pos: int
    inode: int
    dev: Device


@dataclass(frozen=True, slots=True)
class TimerFdInfo:
    """Times in ns; `value_ns` is what is left, 0 for a disarmed timer."""

    clock: int
    ticks: int  # expirations not yet read
    settime_flags: int
    value_ns: int
    interval_ns: int


@dataclass(frozen=True, slots=True)
class InotifyInfo:
    """One watch. The handle is for open_by_handle_at(2); None where the file system has none."""

    wd: int
    inode: int
    dev: Device
    mask: int
    ignored_mask: int
    handle_type: int | None
    handle: bytes | None


@dataclass(frozen=True, slots=True)
class FdInfo:
    """The common lines, and those of the kinds of file that have more to say."""

    pos: int
    flags: int  # O_*, O_CLOEXEC included
    mnt_id: int
    inode: int
    locks: tuple[LockInfo, ...] = ()
    eventfd: EventFdInfo | None = None
    epoll: tuple[EpollInfo, ...] = ()  # in the order of the kernel's tree, not of epoll_ctl
    timerfd: TimerFdInfo | None = None
    signalfd_mask: int | None = None  # bit n-1 is signal n
    inotify: tuple[InotifyInfo, ...] = ()  # newest first
    pidfd: int | None = None  # the pid in the reader's namespace, 0 not in it, -1 reaped


@parser("fdinfo/FD")
def fdinfo(data: bytes) -> FdInfo:
    """/proc/PID/fdinfo/FD; lines of kinds of file that are not listed in FdInfo are passed over."""
    lines = [line for line in data.split(b"\n") if line]
    text = dict(_pair(line) for line in lines)
    return FdInfo(
        pos=int(text[b"pos"]),
        flags=int(text[b"flags"], 8),
        mnt_id=int(text[b"mnt_id"]),
        inode=int(text[b"ino"]),
        locks=tuple(lock_info(line.split()[2:]) for line in lines if line.startswith(b"lock:")),
        eventfd=_eventfd(text) if b"eventfd-count" in text else None,
        epoll=tuple(_epoll(line) for line in lines if line.startswith(b"tfd:")),
        timerfd=_timerfd(text) if b"clockid" in text else None,
        signalfd_mask=int(text[b"sigmask"], 16) if b"sigmask" in text else None,
        inotify=tuple(_inotify(line) for line in lines if line.startswith(b"inotify ")),
        pidfd=int(text[b"Pid"]) if b"Pid" in text else None,
    )


def _pair(line: bytes) -> tuple[bytes, bytes]:
    key, _, value = line.partition(b":")
    return key, value.strip()


def lock_info(words: list[bytes]) -> LockInfo:
    """ "POSIX  ADVISORY  WRITE 6102 fe:00:2146398 5 14", word by word."""
    kind, state, mode, pid, file, start, end = words
    major, minor, inode = file.split(b":")
    return LockInfo(
        kind=kind.decode("ascii"),
        mode=mode.decode("ascii"),
        pid=int(pid),
        dev=(int(major, 16), int(minor, 16)),
        inode=int(inode),
        start=int(start),
        end=None if end == b"EOF" else int(end),
        breaking=state == b"BREAKING",
    )


def _eventfd(text: dict[bytes, bytes]) -> EventFdInfo:
    return EventFdInfo(
        count=int(text[b"eventfd-count"], 16),
        id=int(text[b"eventfd-id"]),
        semaphore=text[b"eventfd-semaphore"] == b"1",
    )


def _epoll(line: bytes) -> EpollInfo:
    """ "tfd:        5 events:       1c data:                5  pos:0 ino:26b4 sdev:f"."""
    _tfd, fd, _events, events, _data, data, pos, inode, dev = line.split()
    return EpollInfo(
        fd=int(fd),
        events=int(events, 16),
        data=int(data, 16),
        pos=int(pos.removeprefix(b"pos:")),
        inode=int(inode.removeprefix(b"ino:"), 16),
        dev=_kernel_device(dev.removeprefix(b"sdev:")),
    )


def _timerfd(text: dict[bytes, bytes]) -> TimerFdInfo:
    return TimerFdInfo(
        clock=int(text[b"clockid"]),
        ticks=int(text[b"ticks"]),
        settime_flags=int(text[b"settime flags"], 8),
        value_ns=_timespec(text[b"it_value"]),
        interval_ns=_timespec(text[b"it_interval"]),
    )


def _timespec(text: bytes) -> int:
    """ "(9, 998613360)"."""
    seconds, nanoseconds = text.removeprefix(b"(").removesuffix(b")").split(b",")
    return int(seconds) * 10**9 + int(nanoseconds)


def _inotify(line: bytes) -> InotifyInfo:
    """ "inotify wd:1 ino:3f7e8 sdev:fe00000 mask:100 ignored_mask:0 fhandle-bytes:2 fhandle-type:1 ...".

    All numbers are hexadecimal, the watch descriptor too (proc(5) calls it decimal).
    """
    fields = dict(_pair(field) for field in line.split()[1:])
    has_handle = b"f_handle" in fields
    return InotifyInfo(
        wd=int(fields[b"wd"], 16),
        inode=int(fields[b"ino"], 16),
        dev=_kernel_device(fields[b"sdev"]),
        mask=int(fields[b"mask"], 16),
        ignored_mask=int(fields[b"ignored_mask"], 16),
        handle_type=int(fields[b"fhandle-type"], 16) if has_handle else None,
        handle=bytes.fromhex(fields[b"f_handle"].decode("ascii")) if has_handle else None,
    )


def _kernel_device(text: bytes) -> Device:
    """The kernel's own dev_t: 12 bits of major above 20 of minor (include/linux/kdev_t.h)."""
    number = int(text, 16)
    return number >> 20, number & 0xFFFFF
