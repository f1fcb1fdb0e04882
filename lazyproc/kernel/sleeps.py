"""How much time is left in a sleep that the freeze interrupted (docs/adr/0003-sleep-restarts.md).

A relative sleep ends in ERESTART_RESTARTBLOCK: its deadline lies in the kernel's restart_block, which nobody
can read. Where the caller asked for the rest (nanosleep's `rem`), the kernel has written it to the caller's
memory. Otherwise we need to know when the sleep began: `observe`, before the freeze, asks the scheduler. What
comes out may be too long, within the bounds in the note, and is not too short: a sleep does not end early.
"""

from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from lazyproc.errors import NoSuchProcess
from lazyproc.facts import dataclass
from lazyproc.kernel import arch_x86_64 as arch
from lazyproc.kernel import proc
from lazyproc.model import Registers, Restart

ReadMemory = Callable[[int, int], bytes]  # address, length

_NANOSLEEP, _CLOCK_NANOSLEEP = arch.SYS["nanosleep"], arch.SYS["clock_nanosleep"]
_POLL, _FUTEX, _AGAIN = arch.SYS["poll"], arch.SYS["futex"], arch.SYS["restart_syscall"]
_EPOLL_IN_MS = frozenset((arch.SYS["epoll_wait"], arch.SYS["epoll_pwait"]))
_RESTARTED = frozenset((_NANOSLEEP, _CLOCK_NANOSLEEP, _POLL, _FUTEX, _AGAIN))

_TIMESPEC = struct.Struct("<qq")
_TIMER_ABSTIME = 1
_FUTEX_WAIT, _FUTEX_COMMAND = 0, 0x7F
_CLOCK_PROCESS_CPUTIME, _CLOCK_THREAD_CPUTIME = 2, 3


@dataclass(frozen=True, slots=True)
class SleepBefore:
    """A thread seen asleep before the freeze. `began_ns` (CLOCK_MONOTONIC) is not before the true begin."""

    call: proc.BlockedIn
    began_ns: int
    voluntary_switches: int


class _Timeout(NamedTuple):
    """A relative one: where the caller put it, or its length."""

    request_addr: int = 0
    ns: int = 0
    rest_addr: int = 0  # where the kernel writes what is left, 0 nowhere
    wall: bool = True  # passes with time, not with CPU time


# --- before the freeze --------------------------------------------------------------------------------------


def observe(pid: int, tids: Iterable[int]) -> dict[int, SleepBefore]:
    """The threads among `tids` whose sleep has a restart block that only its begin can tell.

    Runs the calling thread for a moment on every CPU they went to sleep on. A thread that ends meanwhile, or
    whose CPU is closed to us, is left out.
    """
    seen = {}
    for tid in tids:
        try:
            sleeper = _look(pid, tid)
        except NoSuchProcess:
            continue
        if sleeper is not None:
            seen[tid] = sleeper
    offsets = _clock_offsets({cpu for _, _, cpu in seen.values()})
    return {
        tid: SleepBefore(call, times.exec_start_ns + offsets[cpu], times.voluntary)
        for tid, (call, times, cpu) in seen.items()
        if cpu in offsets
    }


def _look(pid: int, tid: int) -> tuple[proc.BlockedIn, proc.SchedTimes, int] | None:
    """What the thread sleeps in, when it last ran, and on which CPU that was.

    Three reads, one sleep: if by the freeze it was switched out just once more, it has not slept anew since.
    """
    call = proc.syscall(proc.read(pid, f"task/{tid}/syscall"))
    if call is None or not _needs_its_begin(call):
        return None
    times = proc.sched(proc.read(pid, f"task/{tid}/sched"))
    return call, times, proc.stat(proc.read(pid, f"task/{tid}/stat")).processor


def _needs_its_begin(call: proc.BlockedIn) -> bool:
    timeout = _timeout(call.nr, call.args)
    return call.nr == _AGAIN or (timeout is not None and timeout.wall and not timeout.rest_addr)


def _clock_offsets(cpus: set[int]) -> dict[int, int]:
    """CLOCK_MONOTONIC minus the clock of each CPU's run queue, in ns, rounded up.

    Each run queue leaves out its own stolen and interrupt time (rq_clock_task in kernel/sched/core.c), so the
    clocks of two CPUs drift apart. Waking up there sets our exec_start to that clock's "now".
    """
    offsets = {}
    with _own_affinity_kept():
        for cpu in cpus:
            try:
                os.sched_setaffinity(0, {cpu})
            except OSError:
                continue
            time.sleep(1e-6)
            ours = proc.sched(proc.read(os.getpid(), f"task/{threading.get_native_id()}/sched"))
            offsets[cpu] = time.monotonic_ns() - ours.exec_start_ns
    return offsets


@contextmanager
def _own_affinity_kept() -> Iterator[None]:
    mask = os.sched_getaffinity(0)
    try:
        yield
    finally:
        os.sched_setaffinity(0, mask)


# --- after the freeze ---------------------------------------------------------------------------------------


def interrupted_number(registers: Registers, read_memory: ReadMemory) -> int:
    """The number of the interrupted system call, the original one if it had been restarted before.

    A call that was interrupted once already stands in restart_syscall, with its own arguments but without its
    number, which is then read from the code. Where it is not there the answer is restart_syscall itself: in
    a process that has no restart block it returns EINTR, as these calls may at any time.
    """
    if registers.orig_ax != _AGAIN:
        return registers.orig_ax
    number = arch.number_in_code(read_memory(registers.ip - arch.CALL_LENGTH, arch.CALL_LENGTH))
    return number if number in _RESTARTED else _AGAIN


def remaining(
    before: SleepBefore | None,
    registers: Registers,
    voluntary_switches: int,
    frozen_at_ns: int,
    read_memory: ReadMemory,
) -> Restart | None:
    """How long a thread stopped with ERESTART_RESTARTBLOCK, or in an epoll_wait, has still to sleep.

    `before` is what `observe` saw of it, `registers` and `voluntary_switches` (proc.status) are those at the
    stop, before any remote call; `frozen_at_ns` is CLOCK_MONOTONIC after it. None when re-issuing
    `interrupted_number` with the same arguments is right as it is: the timeout is absolute, or there is none.
    """
    nr, args = interrupted_number(registers, read_memory), arch.call_arguments(registers)
    timeout = _timeout(nr, args)
    if timeout is None:
        return None
    if timeout.rest_addr:
        return Restart(nr, _timespec(timeout.rest_addr, read_memory))
    full = _timespec(timeout.request_addr, read_memory) if timeout.request_addr else timeout.ns
    seen = proc.BlockedIn(registers.orig_ax, args)
    if before is None or before.call != seen or not timeout.wall:
        return Restart(nr, full)
    if (
        voluntary_switches != before.voluntary_switches + 1
    ):  # one is the freeze's own, more: it ran in between
        return Restart(nr, full)
    left = full - (frozen_at_ns - before.began_ns)
    # A sleep that was over is not interrupted: this is the next one, caught on its way in.
    return Restart(nr, left if left > 0 else full)


def _timeout(nr: int, args: tuple[int, ...]) -> _Timeout | None:
    """None for calls that last until a point in time, or for ever."""
    if nr == _NANOSLEEP:
        return _Timeout(args[0], rest_addr=args[1])
    if nr == _CLOCK_NANOSLEEP and not args[1] & _TIMER_ABSTIME:
        return _Timeout(args[2], rest_addr=args[3], wall=not _counts_cpu_time(args[0]))
    if nr == _POLL or nr in _EPOLL_IN_MS:
        milliseconds = args[2 if nr == _POLL else 3] & 0xFFFFFFFF  # an int: negative is for ever
        return None if milliseconds >> 31 else _Timeout(ns=milliseconds * 10**6)
    if nr == _FUTEX and args[1] & _FUTEX_COMMAND == _FUTEX_WAIT and args[3]:
        return _Timeout(args[3])
    return None


def _counts_cpu_time(clock: int) -> bool:
    """CPU-time clocks of a process or thread named by its pid are negative (clock_getcpuclockid(3))."""
    return clock in (_CLOCK_PROCESS_CPUTIME, _CLOCK_THREAD_CPUTIME) or bool(clock & 0x80000000)


def _timespec(addr: int, read_memory: ReadMemory) -> int:
    seconds, nanoseconds = _TIMESPEC.unpack(read_memory(addr, _TIMESPEC.size))
    return int(seconds) * 10**9 + int(nanoseconds)
