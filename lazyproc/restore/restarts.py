"""Sleeps that the freeze interrupted go on with the time they had left.

A restart block cannot be set from outside: the call is made once more in the new thread, with the remaining time,
and interrupted at its entry. The kernel arms the block, and resumes to that absolute time with the old registers.
"""

from __future__ import annotations

import struct

from lazyproc.errors import RestoreError
from lazyproc.kernel import arch_x86_64 as arch
from lazyproc.kernel._core import lib
from lazyproc.kernel.arch_x86_64 import SYS
from lazyproc.kernel.remote import enter_and_interrupt
from lazyproc.model import Registers, Restart, Thread
from lazyproc.restore.site import Site

TIME_ARGUMENT = {SYS["nanosleep"]: 0, SYS["clock_nanosleep"]: 2, SYS["poll"]: 2, SYS["futex"]: 3}
MS_NS = 1_000_000


def resume(site: Site) -> dict[int, Registers]:
    """Re-issue the interrupted sleeps of a task; the registers to resume those threads with, by tid."""
    return {
        thread.tid: _reissue(site, thread, thread.restart) for thread in site.task.threads if thread.restart
    }


def _reissue(site: Site, thread: Thread, restart: Restart) -> Registers:
    if restart.nr not in TIME_ARGUMENT:
        raise RestoreError(
            f"system call {restart.nr} cannot be resumed", where=f"thread {thread.tid}", remedy="report it"
        )
    old = thread.registers  # rewound: ip at the `syscall` instruction
    args = [old.di, old.si, old.dx, old.r10, old.r8, old.r9]
    args[TIME_ARGUMENT[restart.nr]] = _time(site, restart)
    stub = site.bench.code + int(lib.lp_blob_stub())
    tracee = site.threads[thread.tid]
    tracee.set_blocked(arch.MASK64)
    call = arch.calling(tracee.registers(), stub, site.bench.data, restart.nr, tuple(args))
    result = enter_and_interrupt(tracee, call)
    return old._replace(ax=result, orig_ax=restart.nr, ip=old.ip + len(arch.SYSCALL_INSTRUCTION))


def _time(site: Site, restart: Restart) -> int:
    """poll takes milliseconds, the others a pointer to a timespec, which is read at the call's entry only."""
    if restart.nr == SYS["poll"]:
        return -(-restart.remaining_ns // MS_NS)
    site.memory.write(site.bench.data, struct.pack("<qq", *divmod(max(restart.remaining_ns, 1), 10**9)))
    return site.bench.data
