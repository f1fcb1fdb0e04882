"""One process: what its threads share, without memory and descriptors."""

from __future__ import annotations

import errno
import struct
from collections.abc import Mapping, Sequence
from typing import cast

from lazyproc.dump.freeze import FrozenTask
from lazyproc.dump.question import Question
from lazyproc.errors import NoSuchProcess
from lazyproc.facts import replace
from lazyproc.kernel import proc, xfeatures
from lazyproc.kernel.remote import Bench, Call
from lazyproc.model import (
    PAGE,
    IntervalTimer,
    Limit,
    MmFlags,
    PosixTimer,
    SigAction,
    Task,
    TaskState,
    Thread,
)

PR_GET_DUMPABLE, PR_MCE_KILL_GET, PR_GET_CHILD_SUBREAPER, PR_GET_THP_DISABLE = 3, 34, 37, 42
PR_GET_MDWE, PR_GET_MEMORY_MERGE = 66, 68
KERNEL_SIGACTION = struct.Struct("<QQQQ")  # handler, flags, restorer, mask
ITIMERVAL = struct.Struct("<qqqq")  # interval s, us; value s, us
ITIMERSPEC = struct.Struct("<qqqq")  # interval s, ns; value s, ns
SIGEV_NONE, SIGEV_THREAD_ID = 1, 4
MEMBARRIER_CMD_GET_REGISTRATIONS = 1 << 9  # include/uapi/linux/membarrier.h
MS_INVALIDATE = 2
MCL_FUTURE, MCL_ONFAULT = 2, 4
SIGKILL, SIGSTOP = 9, 19
TASK_ANSWERS = 7  # of `process_questions`, for `gather_task`; the others are of the address space


def process_questions(
    pid: int, bench: Bench, timers: Sequence[proc.PosixTimerInfo]
) -> list[Question[object]]:
    """Asked of the leader, in the order `gather_task` and `gather_mm` take the answers."""
    return [
        _sigactions(bench),
        _interval_timers(bench),
        _posix_timers(bench, timers),
        _flag(bench, PR_GET_CHILD_SUBREAPER),
        _permitted(bench),
        _membarriers(),
        Question((Call("prctl", (PR_MCE_KILL_GET,)),), lambda results: results[0]),
        Question((Call("prctl", (PR_GET_DUMPABLE,)),), lambda results: results[0]),
        _mm_flags(pid),
        Question((Call("brk", (0,)),), lambda results: results[0]),
        _future_locks(pid, bench),
    ]


def _flag(bench: Bench, option: int) -> Question[bool]:
    addr = bench.room(4)
    return Question((Call("prctl", (option, addr)),), lambda _: bench.read(addr, 4) != bytes(4))


def _permitted(bench: Bench) -> Question[int]:
    """The vector state it has asked for; none where the kernel knows no asking (before 5.16)."""
    addr = bench.room(8)
    calls = (Call("arch_prctl", (xfeatures.ARCH_GET_XCOMP_PERM, addr), may_fail=True),)
    return Question(calls, lambda _: int.from_bytes(bench.read(addr, 8), "little") & xfeatures.ON_REQUEST)


def _future_locks(pid: int, bench: Bench) -> Question[int]:
    """mlockall(2) with MCL_FUTURE shows nowhere but in what is mapped from then on, as the bench was: msync(2) refuses
    to invalidate locked memory. Only then is it worth the walk of smaps to tell MCL_ONFAULT.
    """

    def answer(results: Sequence[int]) -> int:
        if results[0] != -errno.EBUSY:
            return 0
        entries = proc.smaps(proc.read(pid, "smaps"))
        flags = next(each.vm_flags for each in entries if each.entry.end > bench.data)
        return MCL_FUTURE | (MCL_ONFAULT if "lf" in flags else 0)

    return Question((Call("msync", (bench.data, PAGE, MS_INVALIDATE), may_fail=True),), answer)


def _mm_flags(pid: int) -> Question[MmFlags]:
    """Those that the kernel has: MDWE from 6.3 on, merging from 6.4 on and with CONFIG_KSM."""
    calls = (
        Call("prctl", (PR_GET_THP_DISABLE,)),
        Call("prctl", (PR_GET_MDWE,), may_fail=True),
        Call("prctl", (PR_GET_MEMORY_MERGE,), may_fail=True),
    )

    def answer(results: Sequence[int]) -> MmFlags:
        thp, mdwe, merges = results
        return MmFlags(bool(thp), thp & ~1, max(0, mdwe), merges > 0, _coredump_filter(pid))

    return Question(calls, answer)


def _coredump_filter(pid: int) -> int | None:
    try:
        return int(proc.read(pid, "coredump_filter"), 16)
    except NoSuchProcess:  # a kernel without CONFIG_ELF_CORE has no such file
        return None


def _membarriers() -> Question[int]:
    """None where the kernel does not tell (before 6.3)."""
    calls = (Call("membarrier", (MEMBARRIER_CMD_GET_REGISTRATIONS, 0, 0), may_fail=True),)
    return Question(calls, lambda results: max(0, results[0]))


def _sigactions(bench: Bench) -> Question[tuple[SigAction, ...]]:
    signals = [sig for sig in range(1, 65) if sig not in (SIGKILL, SIGSTOP)]
    addr = bench.room(KERNEL_SIGACTION.size * len(signals))
    calls = tuple(
        Call("rt_sigaction", (sig, 0, addr + KERNEL_SIGACTION.size * index, 8))
        for index, sig in enumerate(signals)
    )

    def answer(_: Sequence[int]) -> tuple[SigAction, ...]:
        rows = KERNEL_SIGACTION.iter_unpack(bench.read(addr, KERNEL_SIGACTION.size * len(signals)))
        return tuple(SigAction(sig, *row) for sig, row in zip(signals, rows, strict=True))

    return Question(calls, answer)


def _interval_timers(bench: Bench) -> Question[tuple[IntervalTimer, ...]]:
    addr = bench.room(ITIMERVAL.size * 3)
    calls = tuple(Call("getitimer", (which, addr + ITIMERVAL.size * which)) for which in range(3))

    def answer(_: Sequence[int]) -> tuple[IntervalTimer, ...]:
        rows = ITIMERVAL.iter_unpack(bench.read(addr, ITIMERVAL.size * 3))
        return tuple(
            IntervalTimer(which, value_s * 1_000_000 + value_us, every_s * 1_000_000 + every_us)
            for which, (every_s, every_us, value_s, value_us) in enumerate(rows)
            if value_s or value_us
        )

    return Question(calls, answer)


def _posix_timers(bench: Bench, timers: Sequence[proc.PosixTimerInfo]) -> Question[tuple[PosixTimer, ...]]:
    addr = bench.room(ITIMERSPEC.size * max(1, len(timers)))
    calls = tuple(
        call
        for index, timer in enumerate(timers)
        for call in (
            Call("timer_gettime", (timer.id, addr + ITIMERSPEC.size * index)),
            Call("timer_getoverrun", (timer.id,)),
        )
    )

    def answer(results: Sequence[int]) -> tuple[PosixTimer, ...]:
        rows = ITIMERSPEC.iter_unpack(bench.read(addr, ITIMERSPEC.size * len(timers)))
        return tuple(
            PosixTimer(
                timer.id,
                timer.clock,
                timer.signal,
                timer.notify,
                timer.value,
                timer.target if timer.notify & SIGEV_THREAD_ID else 0,
                overrun,
                value_s * 1_000_000_000 + value_ns,
                every_s * 1_000_000_000 + every_ns,
            )
            for timer, overrun, (every_s, every_ns, value_s, value_ns) in zip(
                timers, results[1::2], rows, strict=True
            )
        )

    return Question(calls, answer)


def gather_task(
    frozen: FrozenTask,
    ids: tuple[int, int, int, int],
    threads: tuple[Thread, ...],
    answers: Sequence[object],
    tids: Mapping[int, int],
) -> Task:
    """The process-wide part of a Task; `ids` are vpid, ppid, pgid, sid, `tids` maps our tids to its own."""
    vpid, ppid, pgid, sid = ids
    sigactions, itimers, timers, subreaper, permitted, membarriers, mce_kill = answers[:TASK_ANSWERS]
    pid, leader = frozen.pid, frozen.threads[0]
    return Task(
        vpid=vpid,
        ppid=ppid,
        pgid=pgid,
        sid=sid,
        state=TaskState.STOPPED if leader.stop_signal else TaskState.ALIVE,
        comm=frozen.stat.comm,
        exit_signal=frozen.stat.exit_signal,
        stop_signal=leader.stop_signal,
        threads=threads,
        sigactions=cast(tuple[SigAction, ...], sigactions),
        pending=frozen.shared_pending(),
        itimers=cast(tuple[IntervalTimer, ...], itimers),
        posix_timers=tuple(_own_tid(timer, tids) for timer in cast(tuple[PosixTimer, ...], timers)),
        limits=tuple(
            Limit(resource, soft, hard)
            for resource, (soft, hard) in enumerate(proc.limits(proc.read(pid, "limits")))
        ),
        personality=int(proc.read(pid, "personality"), 16),
        oom_score_adj=int(proc.read(pid, "oom_score_adj")),
        loginuid=_loginuid(pid),
        child_subreaper=cast(bool, subreaper),
        xfeatures=cast(int, permitted),
        membarriers=cast(int, membarriers),
        mce_kill=cast(int, mce_kill),
        cgroups=proc.cgroup(proc.read(pid, "cgroup")),
    )


def _own_tid(timer: PosixTimer, tids: Mapping[int, int]) -> PosixTimer:
    """That of a thread which has ended runs on and signals nobody (kernel/time/posix-timers.c): like a silent one."""
    if not timer.tid:
        return timer
    if timer.tid not in tids:
        return replace(timer, notify=SIGEV_NONE, tid=0)
    return replace(timer, tid=tids[timer.tid])


def _loginuid(pid: int) -> int:
    try:
        return int(proc.read(pid, "loginuid"))
    except NoSuchProcess:  # a kernel without CONFIG_AUDITSYSCALL has no such file
        return 0xFFFFFFFF


def gather_zombie(frozen: FrozenTask, ids: tuple[int, int, int, int]) -> Task:
    vpid, ppid, pgid, sid = ids
    return Task(
        vpid=vpid,
        ppid=ppid,
        pgid=pgid,
        sid=sid,
        state=TaskState.ZOMBIE,
        comm=frozen.stat.comm,
        exit_code=frozen.stat.exit_code,
        exit_signal=frozen.stat.exit_signal,
    )
