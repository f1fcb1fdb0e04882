"""Which pages of a lazy restore cannot come later."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from contextlib import suppress

from lazyproc.errors import TraceeError
from lazyproc.kernel import arch_x86_64 as arch
from lazyproc.model import PAGE, Mm, Registers, Thread

Read = Callable[[int, int], bytes]  # so many bytes of the process's memory from an address on

ROBUST_HEAD = struct.Struct("<QqQ")  # struct robust_list_head: next, futex_offset, pending
ROBUST_LIMIT = 2048  # ROBUST_LIST_LIMIT, include/uapi/linux/futex.h
POLLFD, TIMESPEC = 8, 16  # bytes
UINT = (1 << 32) - 1  # of poll's count
POLL_LIMIT = 1 << 20  # fs.nr_open, unless it was raised: poll takes no more than RLIMIT_NOFILE


def eager_pages(mm: Mm, threads: Iterable[Thread], read: Read) -> frozenset[int]:
    """Pages that the kernel touches on a thread's behalf where it cannot wait, or that others read at once.

    A thread that ends while its tid, robust list or held futex page is missing gets no userfaultfd event, and its
    joiner hangs; rseq writes on every return to user space; /proc/PID/cmdline reads the argument pages.
    """
    wanted: set[int] = set()
    for thread in threads:
        registers = thread.registers
        wanted |= {registers.fs_base, registers.sp, registers.sp - arch.RED_ZONE, thread.clear_child_tid}
        if thread.rseq:
            wanted |= {thread.rseq.addr, thread.rseq.addr + thread.rseq.size - 1}
        if thread.robust_list:
            wanted |= {thread.robust_list, *held_futexes(thread.robust_list, read)}
        if thread.restart:  # the call is made once more before the pager works
            wanted |= touched_again(registers, thread.restart.nr)
    for start, end in ((mm.arg_start, mm.arg_end), (mm.env_start, mm.env_end)):
        wanted |= set(range(start & -PAGE, end, PAGE))
    return frozenset(addr & -PAGE for addr in wanted)


def touched_again(registers: Registers, nr: int) -> set[int]:
    """Addresses on every page that the sleep `nr` reads or writes on its way in and out again."""
    if nr == arch.SYS["poll"]:
        end = registers.di + POLLFD * min(registers.si & UINT, POLL_LIMIT)
        return set(range(registers.di & -PAGE, end, PAGE))
    # A word that is waited on, a time that is asked for, a place for what is left of it.
    arguments = (registers.di, registers.si, registers.r10)
    return {addr for start in arguments for addr in (start, start + TIMESPEC - 1)}


def held_futexes(head: int, read: Read) -> set[int]:
    """Addresses of the robust futexes a thread holds (kernel/futex/core.c, exit_robust_list)."""
    found: set[int] = set()
    with suppress(TraceeError):  # a list that leads to where nothing is ends there for the kernel, too
        first, offset, pending = ROBUST_HEAD.unpack(read(head, ROBUST_HEAD.size))
        found |= {pending, pending + offset} if pending else set()
        entry = first & ~1
        for _ in range(ROBUST_LIMIT):
            if entry == head or not entry:
                break
            found |= {entry, entry + offset}
            entry = struct.unpack("<Q", read(entry, 8))[0] & ~1
    return found
