"""Threads in uninterruptible sleep (state D): who wakes up now and then stops when asked to, others may not."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import suppress

from lazyproc.errors import LazyprocError, NoSuchProcess
from lazyproc.kernel import proc
from lazyproc.kernel.sys import KCMP_VM, kcmp

LOOK_S = 0.001

Asleep = Mapping[tuple[int, int], int]  # by pid and tid: how often it has fallen asleep so far


def still_asleep(pids: Iterable[int], seconds: float) -> list[tuple[int, int]]:
    """The threads (pid, tid) of these processes that sleep uninterruptibly and did not wake up within so many seconds.

    One that is in state D whenever we look need not be stuck: who writes to a disk in a loop sleeps nearly always,
    each time anew.
    """
    asleep: Asleep = {(pid, tid): _sleeps(pid, tid) for pid in pids for tid in _in_d(pid)}
    until = time.monotonic() + seconds
    while asleep:
        asleep = {each: count for each, count in asleep.items() if _sleeps_on(*each, count)}
        if time.monotonic() > until:
            break
        time.sleep(LOOK_S)
    return list(asleep)


def _in_d(pid: int) -> list[int]:
    with suppress(NoSuchProcess):
        return [tid for tid in proc.task_ids(pid) if is_uninterruptible(proc.read(pid, f"task/{tid}/stat"))]
    return []


def is_uninterruptible(stat: bytes) -> bool:
    """All the parser would tell is too much: this is asked of every thread."""
    return stat.startswith(b") D ", stat.rindex(b")"))


def _sleeps(pid: int, tid: int) -> int:
    """-1 when it is gone."""
    try:
        return proc.status(proc.read(pid, f"task/{tid}/status")).voluntary_switches
    except NoSuchProcess:
        return -1


def _sleeps_on(pid: int, tid: int, count: int) -> bool:
    try:
        return is_uninterruptible(proc.read(pid, f"task/{tid}/stat")) and _sleeps(pid, tid) == count
    except NoSuchProcess:
        return False


def wants_processor(pid: int, tid: int) -> bool:
    """Whether it runs, or would if it were let: on a busy host, or in a cgroup whose quota is used up, it may take
    seconds until it comes to its stop.
    """
    try:
        return proc.stat(proc.read(pid, f"task/{tid}/stat")).state == "R"
    except NoSuchProcess:
        return False


def why_asleep(pid: int, tid: int) -> str:
    """What keeps a thread from stopping, as far as can be seen."""
    with suppress(LazyprocError, OSError):
        for child in proc.children_of(pid, tid):
            if kcmp(pid, child, KCMP_VM) == 0:
                return (
                    f"waits, state D, until process {child} calls exec or ends, which it has made by vfork(2)"
                )
        state = proc.stat(proc.read(pid, f"task/{tid}/stat")).state
        where = proc.read(pid, f"task/{tid}/wchan").decode()
        if state == "D":
            return f"sleeps in the kernel without taking signals (state D, in {where})"
        if state == "R":
            return "got no processor for so long (state R)"
        return f"does not come out of the kernel (state {state}, in {where})"
    return "does not stop"
