"""One typed function per system call or ioctl. Errors are OSError with the kernel's errno; HostLacks for a call that
is younger than the kernel.
"""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from lazyproc.errors import HostLacks
from lazyproc.kernel._core import ffi, lib
from lazyproc.model import Scheduling

SYS_RT_SIGQUEUEINFO, SYS_TGKILL, SYS_RT_TGSIGQUEUEINFO = 129, 234, 297
SYS_FALLOCATE = 285
SYS_KCMP = 312
SYS_PROCESS_VM_READV = 310
SYS_PIDFD_OPEN = 434
SYS_OPENAT2 = 437
SYS_PIDFD_GETFD = 438
SYS_IOPRIO_SET, SYS_IOPRIO_GET = 251, 252
IOPRIO_WHO_PROCESS = 1
_NO_ARGUMENTS = (0,) * 6
RESOLVE_IN_ROOT = 0x10
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2

# enum kcmp_type, include/uapi/linux/kcmp.h
KCMP_FILE, KCMP_VM, KCMP_FILES, KCMP_FS, KCMP_SIGHAND, KCMP_IO, KCMP_SYSVSEM, KCMP_EPOLL_TFD = range(8)


def check(result: int) -> int:
    """Turn a negative errno into OSError, pass everything else on."""
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result


def syscall(nr: int, *args: int) -> int:
    """syscall(2) with up to six integer arguments."""
    if max(args, default=0) >= 1 << 63:
        args = tuple(map(_signed, args))
    return check(lib.lp_syscall(nr, *args, *_NO_ARGUMENTS[len(args) :]))


@contextmanager
def _since(version: str, name: str) -> Iterator[None]:
    """HostLacks when the kernel does not know the call in the block (ENOSYS) or the ioctl (ENOTTY)."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTTY):
            raise
        raise HostLacks(
            f"this kernel has no {name}",
            remedy=f"use Linux {version} or newer, and in a container a seccomp profile that lets it pass",
        ) from error


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def open_in(root: int, path: str, flags: int) -> int:
    """openat2(2), RESOLVE_IN_ROOT: the directory `root` is the root directory, of absolute symbolic links too."""
    how = ffi.new("uint64_t[3]", [flags, 0, RESOLVE_IN_ROOT])  # struct open_how: flags, mode, resolve
    name = ffi.new("char[]", os.fsencode(path))
    where, what = (int(ffi.cast("uintptr_t", each)) for each in (how, name))
    while True:
        try:
            with _since("5.6", "openat2"):
                return syscall(SYS_OPENAT2, root, what, where, ffi.sizeof(how))
        except BlockingIOError:  # something was renamed or mounted while a ".." was walked
            continue


def pidfd_open(pid: int, flags: int = 0) -> int:
    """pidfd_open(2): a descriptor (close-on-exec) for process `pid`."""
    return syscall(SYS_PIDFD_OPEN, pid, flags)


def pidfd_getfd(pidfd: int, fd: int) -> int:
    """pidfd_getfd(2): our own duplicate (close-on-exec) of the process's descriptor `fd`."""
    with _since("5.6", "pidfd_getfd(2)"):
        return syscall(SYS_PIDFD_GETFD, pidfd, fd, 0)


def tgkill(pid: int, tid: int, signal: int) -> None:
    """tgkill(2)."""
    syscall(SYS_TGKILL, pid, tid, signal)


def queue_signal(pid: int, tid: int | None, signal: int, siginfo: bytes) -> None:
    """rt_sigqueueinfo(2), with a `tid` rt_tgsigqueueinfo(2): of other processes only what sigqueue(3) would send."""
    info = ffi.from_buffer(siginfo)
    address = int(ffi.cast("uintptr_t", info))
    if tid is None:
        syscall(SYS_RT_SIGQUEUEINFO, pid, signal, address)
    else:
        syscall(SYS_RT_TGSIGQUEUEINFO, pid, tid, signal, address)


def kcmp(pid1: int, pid2: int, kind: int, idx1: int = 0, idx2: int = 0) -> int:
    """kcmp(2): 0 equal, 1 less, 2 greater, 3 different without an order."""
    return check(lib.lp_syscall(SYS_KCMP, pid1, pid2, kind, idx1, idx2, 0))


def ioprio_get(tid: int) -> int:
    """ioprio_get(2) of a thread: class << 13 | level, 0 when none was set."""
    return syscall(SYS_IOPRIO_GET, IOPRIO_WHO_PROCESS, tid)


def ioprio_set(tid: int, priority: int) -> None:
    """ioprio_set(2) of a thread. EPERM for the real-time class without CAP_SYS_ADMIN."""
    syscall(SYS_IOPRIO_SET, IOPRIO_WHO_PROCESS, tid, priority)


def scheduling(tid: int, cpus: int) -> Scheduling:
    """Of a thread; this host has `cpus` processors."""
    allowed = os.sched_getaffinity(tid)
    return Scheduling(
        policy=os.sched_getscheduler(tid),
        priority=os.sched_getparam(tid).sched_priority,
        nice=os.getpriority(os.PRIO_PROCESS, tid),
        ioprio=ioprio_get(tid),
        cpus=() if len(allowed) >= cpus else tuple(sorted(allowed)),
    )


def read_memory(pid: int, addr: int, length: int) -> bytes:
    """process_vm_readv(2): exactly `length` bytes from `addr`. EFAULT where nothing readable is mapped."""
    buffer = bytearray(length)
    local = ffi.new("uint64_t[2]", [int(ffi.cast("uintptr_t", ffi.from_buffer(buffer))), length])
    remote = ffi.new("uint64_t[2]", [addr, length])
    got = syscall(
        SYS_PROCESS_VM_READV,
        pid,
        int(ffi.cast("uintptr_t", local)),
        1,
        int(ffi.cast("uintptr_t", remote)),
        1,
        0,
    )
    if got != length:
        raise OSError(14, f"process_vm_readv of pid {pid} at {addr:#x}: {got} of {length} bytes")
    return bytes(buffer)


# Categories of PAGEMAP_SCAN, include/uapi/linux/fs.h
(
    PAGE_IS_WPALLOWED,
    PAGE_IS_WRITTEN,
    PAGE_IS_FILE,
    PAGE_IS_PRESENT,
    PAGE_IS_SWAPPED,
    PAGE_IS_PFNZERO,
    PAGE_IS_HUGE,
    PAGE_IS_SOFT_DIRTY,
    PAGE_IS_GUARD,  # Linux 6.16
) = (1 << bit for bit in range(9))
PAGEMAP_REGIONS = 1024


def pagemap_scan(
    fd: int, ranges: Iterable[tuple[int, int]], *, required: int = 0, excluded: int = 0, anyof: int = 0
) -> Iterator[tuple[int, int, int]]:
    """ioctl PAGEMAP_SCAN on /proc/PID/pagemap: (start, end, categories) of runs of matching pages, in order, in each of
    `ranges`.

    Kernel 6.7 or newer (fs/proc/task_mmu.c); 2.7 ms for 2 GiB. An end beyond the last user address is EFAULT.
    """
    regions = ffi.new("uint64_t[]", 3 * PAGEMAP_REGIONS)
    walked = ffi.new("uint64_t *")
    with _since("6.7", "PAGEMAP_SCAN"):
        for start, end in ranges:
            while start < end:
                got = check(
                    lib.lp_pagemap_scan(
                        fd, start, end, required, excluded, anyof, regions, PAGEMAP_REGIONS, walked
                    )
                )
                for at in range(0, 3 * got, 3):
                    yield int(regions[at]), int(regions[at + 1]), int(regions[at + 2])
                # walk_end can lie before the last region given (seen on 6.18 with more than 1,000 regions in a walk).
                reached = max(int(walked[0]), int(regions[3 * got - 2]) if got else start)
                if reached == start:
                    break
                start = reached


@functools.cache
def guard_category() -> int:
    """PAGE_IS_GUARD where PAGEMAP_SCAN knows it, else 0: madvise(MADV_GUARD_INSTALL) is of Linux 6.13."""
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        list(pagemap_scan(fd, [(0, 4096)], required=PAGE_IS_GUARD))
    except OSError:
        return 0
    finally:
        os.close(fd)
    return PAGE_IS_GUARD


def cpuid(leaf: int, sub: int = 0) -> tuple[int, int, int, int]:
    """The CPUID instruction: eax, ebx, ecx, edx."""
    out = ffi.new("uint32_t[4]")
    check(lib.lp_cpuid(leaf, sub, out))
    return int(out[0]), int(out[1]), int(out[2]), int(out[3])


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Free these bytes of a file in memory, in every process that maps it."""
    syscall(SYS_FALLOCATE, fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length)
