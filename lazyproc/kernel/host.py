"""Trying what this kernel lets us do. Each probe does the thing itself, changes nothing, raises OSError when it fails.

What has another errno when it works than when it is refused is told apart as the comments say.
"""

from __future__ import annotations

import errno
import mmap
import os
import resource
import socket
import struct
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

from lazyproc.errors import HostLacks
from lazyproc.kernel import sys as kernel
from lazyproc.kernel import tcp
from lazyproc.kernel._core import ffi
from lazyproc.kernel.fds import SYS_UNSHARE
from lazyproc.kernel.tracee import Tracee

SYS_CLONE3 = 435
SYS_MLOCK2, MLOCK_ONFAULT = 325, 1
MAP_NORESERVE = 0x4000
CLONE_NEWPID, CLONE_NEWTIME = 0x20000000, 0x80
MADV_COLLAPSE = 25  # Linux 6.1
MADV_GUARD_INSTALL = 102  # Linux 6.13
SYS_PRCTL = 157
PR_TIMER_CREATE_RESTORE_IDS, PR_TIMER_CREATE_RESTORE_IDS_GET = 77, 2  # include/uapi/linux/prctl.h
HUGE = 2 << 20
STOP_MS = 1000
_CLONE_ARGS = struct.Struct("<11Q")  # struct clone_args, include/uapi/linux/sched.h
_SET_TID = 8  # the fields set_tid and set_tid_size


def pagemap_scan() -> None:
    """PAGEMAP_SCAN of one page of ours (Linux 6.7)."""
    with closing(mmap.mmap(-1, mmap.PAGESIZE)) as memory:
        start = int(ffi.cast("uintptr_t", ffi.from_buffer(memory)))
        fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            list(kernel.pagemap_scan(fd, [(start, start + mmap.PAGESIZE)]))
        finally:
            os.close(fd)


def pidfd_getfd() -> None:
    """A descriptor of ours by way of our own pidfd (Linux 5.6)."""
    pidfd = kernel.pidfd_open(os.getpid())
    try:
        os.close(kernel.pidfd_getfd(pidfd, pidfd))
    finally:
        os.close(pidfd)


def kcmp() -> None:
    """We are ourselves (CONFIG_KCMP)."""
    kernel.kcmp(os.getpid(), os.getpid(), kernel.KCMP_FILES)


def trace() -> None:
    """Seize a child of ours, stop it, let it go. LazyprocError as Tracee raises it."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(writing)
        os.read(reading, 1)
        os._exit(0)
    os.close(reading)
    try:
        tracee = Tracee(child)
        tracee.seize()
        tracee.interrupt()
        tracee.wait_stop(STOP_MS)
        tracee.detach()
    finally:
        os.close(writing)
        os.waitpid(child, 0)


def choose_pid() -> None:
    """clone3(2) with set_tid (Linux 5.5). Our own number is taken: EEXIST when we may choose, EPERM when not."""
    tid = struct.pack("<i", os.getpid())
    fields = [0] * 11
    fields[_SET_TID] = int(ffi.cast("uintptr_t", ffi.from_buffer(tid)))
    fields[_SET_TID + 1] = 1
    arguments = _CLONE_ARGS.pack(*fields)
    try:
        child = kernel.syscall(
            SYS_CLONE3, int(ffi.cast("uintptr_t", ffi.from_buffer(arguments))), len(arguments)
        )
    except FileExistsError:
        return
    if not child:
        os._exit(0)
    os.waitpid(child, 0)


def new_namespace(flag: int) -> None:
    """unshare(2) in a child of ours."""
    _in_child(lambda: kernel.syscall(SYS_UNSHARE, flag))


def join_group(folder: str) -> None:
    """A child of ours in the cgroup whose directory this is."""
    _in_child(lambda: Path(folder, "cgroup.procs").write_text("0"))


def raise_limit(number: int, value: int) -> None:
    """A child of ours with this limit, hard too."""
    _in_child(lambda: resource.setrlimit(number, (value, value)))


def lock(size: int) -> None:
    """A child of ours that locks so much memory (CAP_IPC_LOCK, RLIMIT_MEMLOCK), of which no page is there."""
    _in_child(lambda: _lock(size))


def _lock(size: int) -> None:
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (size, size))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    memory = mmap.mmap(-1, size, flags=flags)
    kernel.syscall(SYS_MLOCK2, int(ffi.cast("uintptr_t", ffi.from_buffer(memory))), size, MLOCK_ONFAULT)


def _in_child(work: Callable[[], object]) -> None:
    """OSError with the errno that `work` got in a forked child."""
    child = os.fork()
    if not child:
        code = 255
        try:
            work()
            code = 0
        except OSError as error:
            code = error.errno or 255
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        raise OSError(code, os.strerror(code))


def repair_tcp() -> None:
    """TCP_REPAIR on a socket of ours (CAP_NET_ADMIN)."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, tcp.TCP_REPAIR, tcp.REPAIR_ON)


def collapse() -> None:
    """MADV_COLLAPSE. EAGAIN and ENOMEM (no huge page free just now) say that the kernel knows it."""
    with closing(mmap.mmap(-1, 2 * HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)) as memory:
        start = -int(ffi.cast("uintptr_t", ffi.from_buffer(memory))) % HUGE
        memory[start] = 1
        try:
            memory.madvise(MADV_COLLAPSE, start, HUGE)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.ENOMEM):
                raise


def timer_ids() -> None:
    """Whether timers may be made under numbers of our choice: PR_TIMER_CREATE_RESTORE_IDS, read (Linux 6.16)."""
    kernel.syscall(SYS_PRCTL, PR_TIMER_CREATE_RESTORE_IDS, PR_TIMER_CREATE_RESTORE_IDS_GET, 0, 0, 0)


def guard() -> None:
    """MADV_GUARD_INSTALL on a page of ours (Linux 6.13)."""
    with closing(mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)) as memory:
        memory.madvise(MADV_GUARD_INSTALL)


def map_files() -> None:
    """Open a mapped file by its address (CONFIG_PROC_CHILDREN is next to it). Raises HostLacks (fs/proc/base.c,
    proc_map_files_get_link).
    """
    name = os.listdir("/proc/self/map_files")[0]
    try:
        os.close(os.open(f"/proc/self/map_files/{name}", os.O_RDONLY | os.O_CLOEXEC))
    except PermissionError:
        raise HostLacks(
            "only root may open what is mapped (CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE)",
            where="/proc/PID/map_files",
            remedy="run as root; in a container, privileged",
        ) from None


def children() -> None:
    """/proc/PID/task/TID/children (CONFIG_PROC_CHILDREN)."""
    with open("/proc/thread-self/children", "rb"):
        pass
