"""Stopping a whole process tree, and letting it go again as if nothing had happened."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from lazyproc.errors import LazyprocError, NoSuchProcess, TraceeError
from lazyproc.kernel import proc
from lazyproc.kernel import sys as kernel
from lazyproc.kernel.tracee import Tracee

FREEZE_MS = 2000  # bounded: a task in D state or a vfork parent does not stop for PTRACE_INTERRUPT
ROUNDS = 64  # a tree that still grows after so many rounds forks faster than it can be stopped


@dataclass(slots=True)
class FrozenTask:
    """One process of the tree: its stopped threads (leader first), or none for a zombie."""

    pid: int  # in our pid namespace
    stat: proc.Stat
    threads: list[Tracee] = field(default_factory=list)
    pidfd: int = -1

    @property
    def zombie(self) -> bool:
        return not self.threads


@dataclass(slots=True)
class FrozenTree:
    """A tree in ptrace stops, parents before children."""

    tasks: dict[int, FrozenTask] = field(default_factory=dict)

    def tracees(self) -> Iterator[Tracee]:
        for task in self.tasks.values():
            yield from task.threads

    def stop_for_good(self) -> None:
        """Queue a SIGSTOP for every process: it stays stopped when it is let go (a stray SIGCONT releases it)."""
        for task in self.tasks.values():
            if not task.zombie:
                os.kill(task.pid, signal.SIGSTOP)

    def kill(self) -> None:
        """End the whole tree. A leader is reaped only when the tracer has waited for all its threads (ptrace(2))."""
        for task in self.tasks.values():
            if not task.zombie:
                os.kill(task.pid, signal.SIGKILL)
        for task in self.tasks.values():
            for tracee in (*task.threads[1:], *task.threads[:1]):
                _wait_gone(tracee.tid)
            task.threads.clear()


def _wait_gone(tid: int) -> None:
    while True:
        try:
            _, status = os.waitpid(tid, 0x40000000)  # __WALL
        except ChildProcessError:
            return
        if not os.WIFSTOPPED(status):
            return


@contextmanager
def frozen_tree(pid: int, *, timeout_ms: int = FREEZE_MS) -> Iterator[FrozenTree]:
    """Freeze the tree under `pid`; on leaving, what has not been killed runs on.

    Raises NoSuchProcess, PermissionDenied (traced already, not ours), TraceeError (a thread that does not stop);
    in each case everything stopped so far runs on.
    """
    tree = FrozenTree()
    try:
        _freeze(tree, pid, timeout_ms)
        yield tree
    finally:
        _let_go(tree)


def _freeze(tree: FrozenTree, root: int, timeout_ms: int) -> None:
    for _ in range(ROUNDS):
        grown = _stop_threads(tree, root, timeout_ms)
        for task in list(tree.tasks.values()):
            for tracee in task.threads:
                for child in proc.children_of(task.pid, tracee.tid):
                    grown |= child not in tree.tasks and _stop_threads(tree, child, timeout_ms)
        for task in list(tree.tasks.values()):
            grown |= not task.zombie and _stop_threads(tree, task.pid, timeout_ms)
        if not grown:
            return
    raise TraceeError("the tree grows faster than it can be stopped", where=f"pid {root}", remedy="try again")


def _stop_threads(tree: FrozenTree, pid: int, timeout_ms: int) -> bool:
    """Stop the threads of `pid` that are not stopped yet; True when there were any."""
    task = tree.tasks.get(pid)
    if task is None:
        stat = proc.stat(proc.read(pid, "stat"))
        task = tree.tasks[pid] = FrozenTask(pid, stat)
        if stat.state == "Z":
            if stat.num_threads > 1:
                raise TraceeError(
                    "its first thread has ended and others run on", where=f"pid {pid}", remedy="cannot be moved"
                )
            return True
        task.pidfd = kernel.pidfd_open(pid)
    known = {tracee.tid for tracee in task.threads}
    new = [Tracee(tid) for tid in proc.task_ids(pid) if tid not in known]
    seized = []
    for tracee in new:
        try:
            tracee.seize()
        except NoSuchProcess:
            if tracee.tid == pid:
                raise
            continue  # a thread that ended meanwhile
        seized.append(tracee)
        task.threads.append(tracee)
        tracee.interrupt()
    for tracee in seized:
        try:
            tracee.wait_stop(timeout_ms)
        except NoSuchProcess:
            task.threads.remove(tracee)
            if tracee.tid == pid:
                raise
    return bool(new)


def _let_go(tree: FrozenTree) -> None:
    """Detach everything that is still there. A thread that never stopped cannot be detached: it is let go when
    the tracing thread ends (kernel/exit.c, exit_ptrace)."""
    for task in tree.tasks.values():
        for tracee in reversed(task.threads):
            try:
                tracee.detach()
            except LazyprocError:
                continue
        if task.pidfd >= 0:
            os.close(task.pidfd)
            task.pidfd = -1
