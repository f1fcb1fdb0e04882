"""What a task has besides memory and files: signals, timers, limits, credentials, as rows of remote calls."""

from __future__ import annotations

import os
import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile

from lazyproc.events import Listener, Note
from lazyproc.kernel import sys as kernel
from lazyproc.kernel.remote import Bench, Call
from lazyproc.model import Credentials, Fs, PosixTimer, SeccompFilter, Task, Thread
from lazyproc.restore.inherited import Inherited
from lazyproc.restore.limits import give_limits

# include/uapi/linux/prctl.h
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NAME, PR_SET_SECCOMP = 1, 4, 15, 22
PR_CAPBSET_DROP, PR_SET_SECUREBITS, PR_SET_TIMERSLACK = 24, 28, 29
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 36, 38, 47
PR_CAP_AMBIENT_RAISE = 2
PR_MCE_KILL, PR_MCE_KILL_SET, MCE_KILL_DEFAULT = 33, 1, 2
PR_TIMER_CREATE_RESTORE_IDS = 77
CLOCK_THREAD_CPUTIME_ID, THIS_THREAD = 3, -2  # the latter is how /proc/PID/timers calls the former
SECBIT_NO_SETUID_FIXUP = 1 << 2
SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC = 1, 1
CAPABILITY_VERSION_3 = 0x20080522
CAP_SYS_ADMIN = 21
CAP_LAST = 40


# --- process ----------------------------------------------------------------------------------------------------


def signal_calls(task: Task, bench: Bench) -> Iterator[Call]:
    """Signal actions, then what was queued: a process may queue any siginfo to itself (rt_sigqueueinfo(2)).

    Not while programs of other threads run: an action that ignores their ending signal, as the default action does,
    discards it where it is pending (do_sigaction() of kernel/signal.c), and they would run on past their end.
    """
    for action in task.sigactions:
        addr = bench.place(struct.pack("<4Q", action.handler, action.flags, action.restorer, action.mask))
        yield Call("rt_sigaction", (action.signal, addr, 0, 8))
    for info in task.pending:
        yield Call("rt_sigqueueinfo", (task.vpid, _signal_of(info), bench.place(info)))


def _signal_of(info: bytes) -> int:
    return int(struct.unpack_from("<i", info)[0])


def fs_calls(fs: Fs, cwd_fd: int, root_fd: int | None, bench: Bench) -> Iterator[Call]:
    """Root (only where it differs from ours), working directory, umask."""
    if root_fd is not None:
        yield Call("fchdir", (root_fd,))
        yield Call("chroot", (bench.place(b".\0"),))
    yield Call("fchdir", (cwd_fd,))
    yield Call("umask", (fs.umask,))


def flag_calls(task: Task) -> Iterator[Call]:
    if task.child_subreaper:
        yield Call("prctl", (PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))
    for bit in range(task.membarriers.bit_length()):
        if task.membarriers >> bit & 1:
            yield Call("membarrier", (1 << bit, 0, 0))


def timer_makers(task: Task) -> dict[int, list[PosixTimer]]:
    """The POSIX timers by the thread that is to make them. A timer on the time of "this thread" goes by the time of who
    made it, which the kernel does not tell: nearly always it is the one that it signals (SIGEV_THREAD_ID). Pure.
    """
    made = defaultdict(list)
    for timer in task.posix_timers:
        of_thread = timer.clock in (CLOCK_THREAD_CPUTIME_ID, THIS_THREAD) and timer.tid
        made[timer.tid if of_thread else task.vpid].append(timer)
    return made


def timer_create_calls(timers: Sequence[PosixTimer], bench: Bench) -> Iterator[Call]:
    """POSIX timers under their own numbers (kernel 6.16, PR_TIMER_CREATE_RESTORE_IDS), not armed yet."""
    if not timers:
        return
    yield Call("prctl", (PR_TIMER_CREATE_RESTORE_IDS, 1, 0, 0, 0))
    for timer in timers:
        event = struct.pack("<Qiii", timer.value, timer.signal, timer.notify, timer.tid).ljust(64, b"\0")
        number = bench.place(struct.pack("<i", timer.id))
        yield Call("timer_create", (timer.clock, bench.place(event), number))
    yield Call("prctl", (PR_TIMER_CREATE_RESTORE_IDS, 0, 0, 0, 0))


def timer_start_calls(task: Task, bench: Bench) -> Iterator[Call]:
    """All timers run on with the time they had left."""
    for itimer in task.itimers:
        value = (*divmod(itimer.interval_us, 1_000_000), *divmod(itimer.value_us, 1_000_000))
        yield Call("setitimer", (itimer.which, bench.place(struct.pack("<4q", *value)), 0))
    for timer in task.posix_timers:
        if timer.value_ns or timer.interval_ns:
            spec = (*divmod(timer.interval_ns, 10**9), *divmod(timer.value_ns, 10**9))
            yield Call("timer_settime", (timer.id, 0, bench.place(struct.pack("<4q", *spec)), 0))


def set_from_outside(task: Task, pid: int, listener: Listener) -> None:
    """Limits, the OOM score and what a core dump has, which are set by number. What this host does not allow is said,
    not fatal.
    """
    give_limits(task, pid, listener)
    try:
        _write(pid, "oom_score_adj", task.oom_score_adj)
    except PermissionError:
        listener(Note(f"pid {task.vpid}: oom_score_adj could not be lowered to {task.oom_score_adj}"))
    coredump_filter = task.mm.flags.coredump_filter if task.mm else None
    if coredump_filter is not None:
        try:
            _write(pid, "coredump_filter", coredump_filter)
        except OSError:  # a kernel without CONFIG_ELF_CORE dumps nothing
            listener(Note(f"pid {task.vpid}: coredump_filter is not {coredump_filter:#x} here"))


def _write(pid: int, name: str, value: int) -> None:
    with open(f"/proc/{pid}/{name}", "w") as file:
        file.write(str(value))


# --- thread -----------------------------------------------------------------------------------------------------


def thread_calls(thread: Thread, bench: Bench, inherited: Inherited, shared: int) -> Iterator[Call]:
    """Everything of one thread that it sets itself, but for the `shared` first filters."""
    yield Call("prctl", (PR_SET_NAME, bench.place(os.fsencode(thread.comm)[:15] + b"\0")))
    if thread.altstack:
        stack = struct.pack("<QiIQ", thread.altstack.sp, thread.altstack.flags & ~1, 0, thread.altstack.size)
        yield Call("sigaltstack", (bench.place(stack), 0))
    if thread.robust_list:
        yield Call("set_robust_list", (thread.robust_list, thread.robust_list_len))
    if thread.rseq:
        yield Call("rseq", (thread.rseq.addr, thread.rseq.size, 0, thread.rseq.signature))
    yield Call("prctl", (PR_SET_TIMERSLACK, thread.timer_slack_ns))
    if may_filter(inherited):
        yield from filter_calls(thread.seccomp[shared:], bench)
    if thread.credentials != inherited.credentials:
        yield from credential_calls(thread.credentials, bench, inherited.credentials.cap_permitted)
    if thread.pdeath_signal:  # cleared by every change of credentials
        yield Call("prctl", (PR_SET_PDEATHSIG, thread.pdeath_signal))


def credential_calls(creds: Credentials, bench: Bench, available: int) -> Iterator[Call]:
    """Ids first with capabilities kept (SECBIT_NO_SETUID_FIXUP), then the sets: capabilities(7). `available` are those
    that this host can give.

    The inheritable set before the bounding set, which limits what may be added to it; the ambient set while nothing
    forbids it yet; the last capset takes away what the steps before it needed.
    """
    inheritable, permitted, effective, ambient = (
        bits & available
        for bits in (creds.cap_inheritable, creds.cap_permitted, creds.cap_effective, creds.cap_ambient)
    )
    groups = bench.place(struct.pack(f"<{len(creds.groups)}I", *creds.groups), align=4)
    yield Call("prctl", (PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP))
    yield Call("setgroups", (len(creds.groups), groups))
    yield Call("setresgid", (creds.gid, creds.egid, creds.sgid))
    yield Call("setfsgid", (creds.fsgid,))
    yield Call("setresuid", (creds.uid, creds.euid, creds.suid))
    yield Call("setfsuid", (creds.fsuid,))
    yield _capset(available, available, inheritable, bench)
    for cap in range(CAP_LAST + 1):
        if not creds.cap_bounding >> cap & 1:
            yield Call("prctl", (PR_CAPBSET_DROP, cap, 0, 0, 0))
        if ambient >> cap & 1:
            yield Call("prctl", (PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, cap, 0, 0))
    yield Call("prctl", (PR_SET_SECUREBITS, creds.securebits))
    yield _capset(effective, permitted, inheritable, bench)
    if creds.no_new_privs:
        yield Call("prctl", (PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def _capset(effective: int, permitted: int, inheritable: int, bench: Bench) -> Call:
    sets = (effective, permitted, inheritable)
    low, high = (value & 0xFFFFFFFF for value in sets), (value >> 32 for value in sets)
    header = bench.place(struct.pack("<Ii", CAPABILITY_VERSION_3, 0))
    return Call("capset", (header, bench.place(struct.pack("<6I", *low, *high))))


def may_filter(inherited: Inherited) -> bool:
    """Whether a thread may install filters before it gets its own credentials, which may not allow it any more."""
    return bool(inherited.credentials.cap_effective >> CAP_SYS_ADMIN & 1)


def shared_filters(threads: Sequence[Thread], inherited: Inherited) -> int:
    """How many of their first filters all threads have in common. Only what is one filter to the kernel too can be
    added to in all threads at once (SECCOMP_FILTER_FLAG_TSYNC). Pure.
    """
    if len(threads) == 1 or not may_filter(inherited):
        return 0
    ranks = zip(*(thread.seccomp for thread in threads), strict=False)
    return sum(1 for _ in takewhile(lambda rank: len(set(rank)) == 1, ranks))


def filter_calls(filters: Iterable[SeccompFilter], bench: Bench, flags: int = 0) -> Iterator[Call]:
    """Seccomp filters, oldest first. They are suspended (PTRACE_O_SUSPEND_SECCOMP) until the thread is let go."""
    for filter_ in filters:
        program = bench.place(filter_.program)
        fprog = bench.place(struct.pack("<HxxxxxxQ", len(filter_.program) // 8, program))
        yield Call("seccomp", (SECCOMP_SET_MODE_FILTER, filter_.flags | flags, fprog))


def seccomp_calls(thread: Thread, bench: Bench, inherited: Inherited) -> Iterator[Call]:
    """What is left of it when the thread has its credentials."""
    if not may_filter(inherited):
        yield from filter_calls(thread.seccomp, bench)
    if thread.seccomp_mode == 1:
        yield Call("prctl", (PR_SET_SECCOMP, 1))


def late_calls(task: Task, thread: Thread, bench: Bench, inherited: Inherited) -> Iterator[Call]:
    """What a thread gets when its process has its signal actions: filters, and what is pending for it alone; and what
    all threads are given alike.
    """
    if task.mce_kill != MCE_KILL_DEFAULT:
        yield Call("prctl", (PR_MCE_KILL, PR_MCE_KILL_SET, task.mce_kill, 0, 0))
    yield from seccomp_calls(thread, bench, inherited)
    for info in thread.pending:
        yield Call("rt_tgsigqueueinfo", (task.vpid, thread.tid, _signal_of(info), bench.place(info)))


def schedule(thread: Thread, tid: int, inherited: Inherited, listener: Listener) -> None:
    """Policy, nice value and processors, set from outside while the thread still has our privileges."""
    wanted, given = thread.scheduling, inherited.scheduling
    if wanted == given:
        return
    try:
        os.sched_setscheduler(tid, wanted.policy, os.sched_param(wanted.priority))
        os.setpriority(os.PRIO_PROCESS, tid, wanted.nice)
        if wanted.ioprio != given.ioprio:
            kernel.ioprio_set(tid, wanted.ioprio)
    except PermissionError:
        listener(Note(f"thread {thread.tid}: {wanted} is not allowed here"))
    if wanted.cpus == given.cpus:
        return
    everywhere = range(os.sysconf("SC_NPROCESSORS_CONF"))
    try:
        os.sched_setaffinity(tid, wanted.cpus or everywhere)
    except OSError:  # this host, or our part of it, has none of them
        os.sched_setaffinity(tid, everywhere)
        listener(Note(f"thread {thread.tid}: may run on all CPUs here, for there is none of {wanted.cpus}"))
