"""Sleeps that the freeze interrupted go on with the time they had left.

A restart block cannot be set from outside: the call is made once more in the new thread, with the remaining time,
and interrupted at its entry. The kernel arms the block, and resumes to that absolute time with the old registers.
"""

from __future__ import annotations

import os
import struct
import time

from lazyproc.errors import RestoreError
from lazyproc.kernel import arch_x86_64 as arch
from lazyproc.kernel import proc
from lazyproc.kernel.arch_x86_64 import SYS
from lazyproc.kernel.remote import SYSCALL, step
from lazyproc.model import Clocks, Registers, Restart, Task, Thread, VmaKind
from lazyproc.restore.site import Site

TIME_ARGUMENT = {SYS["nanosleep"]: 0, SYS["clock_nanosleep"]: 2, SYS["poll"]: 2, SYS["futex"]: 3}
MS_NS = 1_000_000


def resume(site: Site, clocks: Clocks) -> dict[int, Registers]:
    """Re-issue the interrupted sleeps of a task; the registers to resume those threads with, by tid.

    What is left counts from when the tree was frozen at `clocks`; its own clock runs since its time namespace began.
    """
    sleepers = [(t, t.restart) for t in site.task.threads if t.restart and not _waits_in_shared(site.task, t)]
    if not sleepers:
        return {}
    passed_ns = max(0, _monotonic_ns(site.pid) - clocks.monotonic_ns)
    return {thread.tid: _reissue(site, thread, restart, passed_ns) for thread, restart in sleepers}


def _waits_in_shared(task: Task, thread: Thread) -> bool:
    """What a call reads must be there before the pager works; of private memory it is (dump/memory.py), of a shared
    object it may not be. Such a futex or poll waits anew, with all its time.
    """
    shared = [vma for vma in task.mm.vmas if vma.kind is VmaKind.SHARED] if task.mm else []
    return any(vma.start <= arg < vma.end for vma in shared for arg in arch.call_arguments(thread.registers))


def _monotonic_ns(pid: int) -> int:
    """CLOCK_MONOTONIC as the process sees it."""
    theirs = proc.timens_offsets(proc.read(pid, "timens_offsets")).monotonic_ns
    ours = proc.timens_offsets(proc.read(os.getpid(), "timens_offsets")).monotonic_ns
    return time.monotonic_ns() + theirs - ours


def _reissue(site: Site, thread: Thread, restart: Restart, passed_ns: int) -> Registers:
    if restart.nr not in TIME_ARGUMENT:
        raise RestoreError(
            f"system call {restart.nr} cannot be resumed", where=f"thread {thread.tid}", remedy="report it"
        )
    old = thread.registers  # rewound: ip at the `syscall` instruction
    args = list(arch.call_arguments(old))
    args[TIME_ARGUMENT[restart.nr]] = _time(site, restart.nr, max(0, restart.remaining_ns - passed_ns))
    tracee = site.threads[thread.tid]
    call = arch.calling(tracee.registers(), site.bench.code + SYSCALL, restart.nr, tuple(args))
    result = step(tracee, call, interrupted=True)
    return old._replace(
        ax=result & arch.MASK64, orig_ax=restart.nr, ip=old.ip + len(arch.SYSCALL_INSTRUCTION)
    )


def _time(site: Site, nr: int, left_ns: int) -> int:
    """poll takes milliseconds, the others a pointer to a timespec, which is read at the call's entry only."""
    if nr == SYS["poll"]:
        return -(-left_ns // MS_NS)
    site.memory.write(site.bench.data, struct.pack("<qq", *divmod(left_ns, 10**9)))
    return site.bench.data
