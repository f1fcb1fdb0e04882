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
from lazyproc.kernel.remote import SYSCALL, fall_asleep
from lazyproc.model import Clocks, Registers, Restart, Task, Thread, Vma, VmaKind
from lazyproc.restore.site import Site

TIME_ARGUMENT = {SYS["nanosleep"]: 0, SYS["clock_nanosleep"]: 2, SYS["poll"]: 2, SYS["futex"]: 3}
MS_NS = 1_000_000


def resume(site: Site, clocks: Clocks) -> dict[int, Registers]:
    """Re-issue the interrupted sleeps of a task; the registers to resume those threads with, by tid.

    What is left counts from `clocks`, when it was described; its own clock runs since its time namespace began.
    """
    shared = _shared(site.task)
    sleepers = [(t, t.restart) for t in site.task.threads if t.restart and not _waits_in(shared, t)]
    if not sleepers:
        return {}
    passed_ns = max(0, _monotonic_ns(site.pid) - clocks.monotonic_ns)
    times, calls = bytearray(), []
    for thread, restart in sleepers:
        registers = _call_again(site, thread, restart, max(0, restart.remaining_ns - passed_ns), times)
        calls.append((site.threads[thread.tid], registers))
    site.memory.write(site.bench.data, bytes(times))
    results = fall_asleep(calls)
    return {
        thread.tid: _asleep(thread.registers, restart.nr, result)
        for (thread, restart), result in zip(sleepers, results, strict=True)
    }


def _shared(task: Task) -> list[Vma]:
    return [vma for vma in task.mm.vmas if vma.kind is VmaKind.SHARED] if task.mm else []


def _waits_in(shared: list[Vma], thread: Thread) -> bool:
    """What a call reads must be there before the pager works; of private memory it is (dump/memory.py), of a shared
    object it may not be. Such a futex or poll waits anew, with all its time.
    """
    return any(vma.start <= arg < vma.end for vma in shared for arg in arch.call_arguments(thread.registers))


def _monotonic_ns(pid: int) -> int:
    """CLOCK_MONOTONIC as the process sees it."""
    theirs = proc.timens_offsets(proc.read(pid, "timens_offsets")).monotonic_ns
    ours = proc.timens_offsets(proc.read(os.getpid(), "timens_offsets")).monotonic_ns
    return time.monotonic_ns() + theirs - ours


def _call_again(site: Site, thread: Thread, restart: Restart, left_ns: int, times: bytearray) -> Registers:
    """Registers for the call with what is left of its time. poll takes milliseconds, the others a pointer to a
    timespec, which is read at the call's entry only; `times` is what will lie at the bench's data.
    """
    if restart.nr not in TIME_ARGUMENT:
        raise RestoreError(
            f"system call {restart.nr} cannot be resumed", where=f"thread {thread.tid}", remedy="report it"
        )
    args = list(arch.call_arguments(thread.registers))
    if restart.nr == SYS["poll"]:
        args[TIME_ARGUMENT[restart.nr]] = -(-left_ns // MS_NS)
    else:
        args[TIME_ARGUMENT[restart.nr]] = site.bench.data + len(times)
        times += struct.pack("<qq", *divmod(left_ns, 10**9))
    return arch.calling(thread.registers, site.bench.code + SYSCALL, restart.nr, tuple(args))


def _asleep(old: Registers, nr: int, result: int) -> Registers:
    """`old` are rewound: ip is at the `syscall` instruction."""
    return old._replace(ax=result & arch.MASK64, orig_ax=nr, ip=old.ip + len(arch.SYSCALL_INSTRUCTION))
