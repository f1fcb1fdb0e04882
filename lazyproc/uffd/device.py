"""The userfaultfd object: one method per ioctl, and names for its outcomes.

Constants and structures are those of include/uapi/linux/userfaultfd.h of Linux 6.18, defined here because the headers
of a distribution may be older.
"""

from __future__ import annotations

import enum
import errno
import fcntl
import os
import struct
from typing import Self

from lazyproc.errors import HostLacks, PermissionDenied
from lazyproc.facts import dataclass
from lazyproc.uffd._pager import ffi

DEVICE = "/dev/userfaultfd"
SYS_USERFAULTFD = 323
USER_MODE_ONLY = 1
UFFD_API = 0xAA


class Feature(enum.IntFlag):
    """UFFD_FEATURE_*"""

    PAGEFAULT_FLAG_WP = 1 << 0
    EVENT_FORK = 1 << 1  # needs CAP_SYS_PTRACE
    EVENT_REMAP = 1 << 2
    EVENT_REMOVE = 1 << 3
    MISSING_HUGETLBFS = 1 << 4
    MISSING_SHMEM = 1 << 5
    EVENT_UNMAP = 1 << 6
    SIGBUS = 1 << 7
    THREAD_ID = 1 << 8
    MINOR_HUGETLBFS = 1 << 9
    MINOR_SHMEM = 1 << 10
    EXACT_ADDRESS = 1 << 11
    WP_HUGETLBFS_SHMEM = 1 << 12
    WP_UNPOPULATED = 1 << 13
    POISON = 1 << 14
    WP_ASYNC = 1 << 15
    MOVE = 1 << 16


PAGER_FEATURES = (
    Feature.EVENT_FORK
    | Feature.EVENT_REMAP
    | Feature.EVENT_REMOVE
    | Feature.EVENT_UNMAP
    | Feature.MISSING_SHMEM
    | Feature.THREAD_ID
)
"""What a Pager needs to know of a process; without an EVENT_* memory would go wrong in silence."""


class Mode(enum.IntFlag):
    """UFFDIO_REGISTER_MODE_*"""

    MISSING = 1 << 0
    WP = 1 << 1
    MINOR = 1 << 2


class Outcome(enum.Enum):
    """What became of a request to put a page somewhere. In the order of the C core's `enum outcome`."""

    INSTALLED = "installed"
    PRESENT = "present"  # EEXIST: there is a page already, and nobody was woken
    DEFERRED = "deferred"  # EAGAIN: the address space is changing; read the events, then try again
    GONE = "gone"  # ESRCH the process, ENOENT the mapping (ENOSPC: ESRCH before Linux 4.13)


def outcome_of(error: int) -> Outcome | None:
    """The name of what errno `error` (0: none) says of UFFDIO_COPY, ZEROPAGE or POISON; None: a real error."""
    match error:
        case 0:
            return Outcome.INSTALLED
        case errno.EEXIST:
            return Outcome.PRESENT
        case errno.EAGAIN:
            return Outcome.DEFERRED
        case errno.ESRCH | errno.ENOENT | errno.ENOSPC:
            return Outcome.GONE
        case _:
            return None


@dataclass(frozen=True, slots=True)
class Placed:
    """How a request ended, and how many bytes from its start are in place (all of them when INSTALLED)."""

    outcome: Outcome
    length: int


def _request(direction: int, number: int, size: int) -> int:
    """_IOC(direction, UFFDIO, number, size); direction 2 is _IOR, 3 _IOWR."""
    return direction << 30 | size << 16 | UFFD_API << 8 | number


_API = struct.Struct("=QQQ")  # api, features, ioctls
_RANGE = struct.Struct("=QQ")  # start, len
_REGISTER = struct.Struct("=QQQQ")  # range, mode, ioctls
_COPY = struct.Struct("=QQQQq")  # dst, src, len, mode, copy: signed
_FILL = struct.Struct("=QQQq")  # zeropage and poison: range, mode, done: signed

USERFAULTFD_IOC_NEW = UFFD_API << 8
_UFFDIO_API = _request(3, 0x3F, _API.size)
_UFFDIO_REGISTER = _request(3, 0x00, _REGISTER.size)
_UFFDIO_UNREGISTER = _request(2, 0x01, _RANGE.size)
_UFFDIO_WAKE = _request(2, 0x02, _RANGE.size)
_UFFDIO_COPY = _request(3, 0x03, _COPY.size)
_UFFDIO_ZEROPAGE = _request(3, 0x04, _FILL.size)
_UFFDIO_POISON = _request(3, 0x08, _FILL.size)


def opened_device() -> int | None:
    """The device (Linux 6.1), None where it is missing or not ours to open."""
    try:
        return os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except (FileNotFoundError, PermissionError):
        return None


def _open_device(flags: int) -> int | None:
    """A userfaultfd from the device, None where there is none."""
    device = opened_device()
    if device is None:
        return None
    try:
        return fcntl.ioctl(device, USERFAULTFD_IOC_NEW, flags)
    finally:
        os.close(device)


def _open_syscall(flags: int) -> int:
    from lazyproc.kernel import sys

    try:
        return sys.syscall(SYS_USERFAULTFD, flags)
    except PermissionError as error:
        raise PermissionDenied(
            "the kernel refuses a userfaultfd that sees the kernel's own faults",
            where=DEVICE,
            remedy=f"run as root, `setfacl -m u:$USER:rw {DEVICE}`, or `sysctl vm.unprivileged_userfaultfd=1`",
        ) from error
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
        raise HostLacks(
            "this kernel has no userfaultfd(2)",
            remedy="use one with CONFIG_USERFAULTFD, and in a container a seccomp profile that lets it pass",
        ) from error


def demand_for_tasks() -> None:
    """Raises HostLacks or PermissionDenied unless a process that has our rights can serve as a lazy one.

    A restored task makes its userfaultfd by the system call; that we may open the device is of no use to it.
    """
    try:
        with Userfaultfd(_open_syscall(os.O_CLOEXEC | os.O_NONBLOCK)) as device:
            device.api()
    except PermissionDenied as error:
        raise PermissionDenied(
            "lazy memory is refused", where="userfaultfd", remedy="run as root with CAP_SYS_PTRACE"
        ) from error


class Userfaultfd:
    """A userfaultfd: userfaultfd(2), ioctl_userfaultfd(2). A context manager that closes it.

    Closing the last descriptor of a userfaultfd wakes who waits on it, and they read zeros.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @classmethod
    def open(cls, *, user_mode_only: bool = False) -> Self:
        """A new one for this process, close-on-exec and non-blocking; `api` comes next.

        `user_mode_only` needs no privilege, but a system call that touches missing memory then fails with EFAULT.
        Raises PermissionDenied or HostLacks.
        """
        flags = os.O_CLOEXEC | os.O_NONBLOCK | (USER_MODE_ONLY if user_mode_only else 0)
        fd = _open_device(flags)
        return cls(_open_syscall(flags) if fd is None else fd)

    @classmethod
    def from_fd(cls, fd: int) -> Self:
        """Wraps a descriptor that came from elsewhere (pidfd_getfd, SCM_RIGHTS) and owns it from now on."""
        return cls(fd)

    def fileno(self) -> int:
        return self._fd

    def detach(self) -> int:
        """The descriptor, which is the caller's from now on."""
        fd, self._fd = self._fd, -1
        return fd

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self.detach())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def api(self, features: Feature = PAGER_FEATURES) -> int:
        """UFFDIO_API, once: the bits 1 << _UFFDIO_* of the ioctls to be had.

        Raises HostLacks when the kernel lacks a feature (EINVAL), PermissionDenied when EVENT_FORK is refused.
        """
        argument = bytearray(_API.pack(UFFD_API, features, 0))
        try:
            fcntl.ioctl(self._fd, _UFFDIO_API, argument)
        except PermissionError as error:
            raise PermissionDenied(
                "userfaultfd events of fork are refused", remedy="needs CAP_SYS_PTRACE: run as root"
            ) from error
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            raise HostLacks(f"userfaultfd lacks one of {features!r}", remedy="use a newer kernel") from error
        return int(_API.unpack(argument)[2])

    def register(self, start: int, length: int, mode: Mode = Mode.MISSING) -> int:
        """UFFDIO_REGISTER of whole pages: the bits 1 << _UFFDIO_* of the ioctls that work on them."""
        argument = bytearray(_REGISTER.pack(start, length, mode, 0))
        fcntl.ioctl(self._fd, _UFFDIO_REGISTER, argument)
        return int(_REGISTER.unpack(argument)[3])

    def unregister(self, start: int, length: int) -> None:
        """UFFDIO_UNREGISTER: later faults are the kernel's own, and who waits there is woken."""
        fcntl.ioctl(self._fd, _UFFDIO_UNREGISTER, bytearray(_RANGE.pack(start, length)))

    def wake(self, start: int, length: int) -> None:
        """UFFDIO_WAKE: who waits in the range faults anew."""
        fcntl.ioctl(self._fd, _UFFDIO_WAKE, bytearray(_RANGE.pack(start, length)))

    def copy(self, dst: int, data: bytes | bytearray | memoryview) -> Placed:
        """UFFDIO_COPY of whole pages to `dst`, and wakes who waits there. Raises OSError for a real error."""
        src = int(ffi.cast("uintptr_t", ffi.from_buffer(data)))
        return self._place(_UFFDIO_COPY, _COPY, (dst, src, len(data), 0, 0), len(data))

    def zeropage(self, start: int, length: int) -> Placed:
        """UFFDIO_ZEROPAGE, likewise."""
        return self._place(_UFFDIO_ZEROPAGE, _FILL, (start, length, 0, 0), length)

    def poison(self, start: int, length: int) -> Placed:
        """UFFDIO_POISON (Linux 6.6): who touches the pages gets SIGBUS from now on."""
        return self._place(_UFFDIO_POISON, _FILL, (start, length, 0, 0), length)

    def _place(self, request: int, layout: struct.Struct, fields: tuple[int, ...], length: int) -> Placed:
        argument = bytearray(layout.pack(*fields))
        try:
            fcntl.ioctl(self._fd, request, argument)
        except OSError as error:
            outcome = outcome_of(error.errno or 0)
            if outcome is None:
                raise
            return Placed(outcome, max(0, int(layout.unpack(argument)[-1])))
        return Placed(Outcome.INSTALLED, length)


def demand_poison() -> None:
    """Raises HostLacks unless the kernel can mark a page as lost."""
    with Userfaultfd.open() as device:
        try:
            device.api(Feature.POISON)
        except HostLacks as error:
            raise HostLacks(
                "the kernel cannot mark pages as lost", where="UFFDIO_POISON", remedy="use Linux 6.6 or newer"
            ) from error
