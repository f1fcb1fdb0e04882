"""Stopping a whole process tree, and letting it go again as if nothing had happened."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial

from lazyproc.dump.asleep import LOOK_S, still_asleep, wants_processor, why_asleep
from lazyproc.dump.reading import let_read
from lazyproc.dump.walk import tree_of
from lazyproc.errors import LazyprocError, NoSuchProcess, PermissionDenied, TraceeError
from lazyproc.facts import dataclass, field
from lazyproc.kernel import proc
from lazyproc.kernel import sys as kernel
from lazyproc.kernel import tracee as ptrace
from lazyproc.kernel.settle import Stopped, settle, settle_again
from lazyproc.kernel.sleeps import SleepBefore
from lazyproc.kernel.tracee import Tracee
from lazyproc.kernel.undertaker import taking_the_dead
from lazyproc.steps import Steps

FREEZE_MS = 2000
STARVED = 5  # times as long is waited for a thread that nothing keeps but the want of a processor
ROUNDS = 64  # a tree that still grows after so many rounds forks faster than it can be stopped
GRACE_MS = 100  # for what is a matter of microseconds
TURN_MS = 10  # after which the next thread is waited for


@dataclass(slots=True)
class FrozenTask:
    """One process of the tree: its stopped threads (leader first), or none for a zombie."""

    pid: int  # in our pid namespace
    stat: proc.Stat = field(init=False)
    threads: list[Tracee] = field(default_factory=list)
    stopped: list[Stopped] = field(default_factory=list)  # the same threads as they were stopped
    pidfd: int = -1
    seized: list[int] = field(default_factory=list)  # threads, whatever became of them
    maps: tuple[proc.MapsEntry, ...] = ()  # once they were read

    @property
    def zombie(self) -> bool:
        return not self.threads

    def shared_pending(self) -> tuple[bytes, ...]:
        """What is pending for the process, whichever of its threads takes it."""
        return self.threads[0].pending(self.stopped[0].status.shared_pending, shared=True)


@dataclass(slots=True)
class FrozenTree:
    """A tree in ptrace stops, parents before children. `frozen_at_ns` is CLOCK_MONOTONIC after the last stop."""

    tasks: dict[int, FrozenTask] = field(default_factory=dict)
    frozen_at_ns: int = 0
    parked: bool = False  # they stay as they are when they are let go

    def tracees(self) -> Iterator[Tracee]:
        for task in self.tasks.values():
            yield from task.threads

    def seized(self) -> list[int]:
        """While it grows, too: for another thread."""
        return [tid for task in list(self.tasks.values()) for tid in list(task.seized)]

    def stop(self) -> None:
        """Leave it stopped, as SIGSTOP does, once it is let go."""
        for task in self.tasks.values():
            if not task.zombie:
                os.kill(task.pid, signal.SIGSTOP)

    def kill(self) -> None:
        """End the whole tree."""
        for task in self.tasks.values():
            if not task.zombie:
                os.kill(task.pid, signal.SIGKILL)
        ptrace.wait_gone(tracee.tid for task in self.tasks.values() for tracee in task.threads)
        for task in self.tasks.values():
            task.threads.clear()
            task.stopped.clear()


@contextmanager
def frozen_tree(
    pid: int,
    *,
    asleep: Mapping[int, SleepBefore] | None = None,
    timeout_ms: int = FREEZE_MS,
    steps: Steps | None = None,
) -> Iterator[FrozenTree]:
    """Freeze the tree under `pid`; on leaving, what has not been killed runs on.

    `asleep` is what `observed_sleeps` saw right before; without it sleeps start anew. `steps` begin when the first
    thread is about to be stopped. Raises NoSuchProcess, PermissionDenied (traced already, not ours), TraceeError (a
    thread that does not stop); in each case everything stopped so far runs on.
    A thread that has fallen into uninterruptible sleep since we looked can only be let go by the end of the
    tracing thread (kernel/exit.c, exit_ptrace): call this in a thread that ends soon.
    """
    tree, steps = FrozenTree(), steps or Steps()
    collected = gc.isenabled()
    gc.disable()  # a collection takes as long as all the rest
    try:
        _demand_awake(tree_of(pid), timeout_ms)
        with taking_the_dead(tree.seized) as enough:
            steps.begin()
            freeze = partial(_freeze, tree, pid, timeout_ms)
            freeze()
            let_read([*tree.tasks.values()], freeze, timeout_ms)
            steps.done("stop")
            enough()
            tree.frozen_at_ns = time.monotonic_ns()
            for task in tree.tasks.values():
                _settle(task, asleep or {}, tree.frozen_at_ns)
            steps.done("settle")
        yield tree
    finally:
        _let_go(tree)
        if collected:
            gc.enable()


def _demand_awake(pids: Iterable[int], timeout_ms: int) -> None:
    """Before anything is stopped: who is asked to in uninterruptible sleep can only be let go when that is over."""
    for pid, tid in still_asleep(pids, timeout_ms / 1000)[:1]:
        raise _does_not_stop(pid, tid, timeout_ms)


def _does_not_stop(pid: int, tid: int, timeout_ms: int) -> TraceeError:
    return TraceeError(
        f"cannot be stopped within {timeout_ms} ms: it {why_asleep(pid, tid)}",
        where=f"thread {tid} of pid {pid}",
        remedy="try again when it is over",
    )


def _freeze(tree: FrozenTree, root: int, timeout_ms: int) -> None:
    """In rounds, until one finds nothing that runs, and then no child that is not stopped: who stands still forks no
    more.
    """
    for _ in range(ROUNDS):
        running = [_stop_process(tree, root, timeout_ms)]
        running += [_stop_child(tree, task.pid, timeout_ms) for task in _members(tree) if task.pid != root]
        if not any(running) and not _stop_children(tree, timeout_ms):
            return
    raise not_whole(tree, root)


def not_whole(tree: FrozenTree, root: int) -> TraceeError:
    """What has kept all rounds from finding that nothing is left to be stopped. Pure."""
    for task in _members(tree):
        if not task.threads:
            what = "is executing a program, or ending, and has no thread that could be stopped"
            return TraceeError(what, where=f"pid {task.pid}", remedy="try again when that is over")
    number = len(tree.tasks)
    what = f"its tree grows faster than it can be stopped: {number} processes, and there are more each time"
    return TraceeError(what, where=f"pid {root}", remedy="try again when it forks less")


def _members(tree: FrozenTree) -> list[FrozenTask]:
    """Those that have not ended; one may have no thread that we know, while it executes a program."""
    return [task for task in tree.tasks.values() if task.stat.state != "Z"]


def _stop_children(tree: FrozenTree, timeout_ms: int) -> bool:
    """Stop the children that are not known yet, and theirs; True when there were any."""
    grown = False
    members = _members(tree)
    for task in members:  # which grows on the way
        for tracee in list(task.threads):
            for child in proc.children_of(task.pid, tracee.tid):
                if child not in tree.tasks:
                    grown |= _stop_child(tree, child, timeout_ms)
                    members += [tree.tasks[child]] if child in tree.tasks else []
    return grown


def _stop_child(tree: FrozenTree, pid: int, timeout_ms: int) -> bool:
    try:
        return _stop_process(tree, pid, timeout_ms)
    except NoSuchProcess:  # it has ended and been reaped
        _close(tree.tasks.pop(pid))
        return True


def _stop_process(tree: FrozenTree, pid: int, timeout_ms: int) -> bool:
    """Stop the threads of `pid` that are not stopped yet; True when there were any."""
    task = tree.tasks.get(pid)
    if task is None:
        task = tree.tasks[pid] = FrozenTask(pid)
        if _is_zombie(task):
            return True
        task.pidfd = _pidfd_of(pid)
    running = _take_running(task)
    known = {tracee.tid for tracee in (*task.threads, *running)}
    new = [tid for tid in proc.task_ids(pid) if tid not in known]
    _stop_threads(task, running, new, timeout_ms)
    task.threads.sort(key=lambda tracee: tracee.tid != pid)
    if (not task.threads or task.threads[0].tid != pid) and _is_zombie(task):
        task.threads.clear()
        return bool(new or running)
    if not task.threads:  # all that we knew have ended, and an exec goes on
        time.sleep(LOOK_S)
    return bool(new or running)


def _pidfd_of(pid: int) -> int:
    """Raises NoSuchProcess: nobody waits for a child whose parent ignores SIGCHLD, it is gone as soon as it ends."""
    try:
        return kernel.pidfd_open(pid)
    except ProcessLookupError:
        raise NoSuchProcess("has ended", where=f"pid {pid}", remedy="check the pid") from None


def _take_running(task: FrozenTask) -> list[Tracee]:
    """Threads that were stopped and are not: a sibling has executed a program, which ends all others and gives it the
    number of the leader (execve(2)). Until we have waited for those, its exec does not come to its end.
    """
    running = [tracee for tracee in task.threads if not tracee.is_stopped()]
    task.threads = [tracee for tracee in task.threads if tracee not in running]
    return running


def _stop_threads(task: FrozenTask, running: list[Tracee], tids: Sequence[int], timeout_ms: int) -> None:
    """All are asked to stop before the first is waited for. One that ends meanwhile is none of the task's threads."""
    asked: list[Tracee] = []
    try:
        for tracee in running:
            with suppress(NoSuchProcess):
                tracee.interrupt()
                asked.append(tracee)
        for tid in tids:
            with suppress(NoSuchProcess):
                tracee = Tracee(tid)
                _seize(task, tracee)
                asked.append(tracee)
                tracee.interrupt()
        _await_stops(task, asked, timeout_ms)
    except LazyprocError:
        for tracee in asked:  # what was asked to stop can only be let go once it has
            with suppress(LazyprocError):
                tracee.wait_stop(GRACE_MS)
                task.threads.append(tracee)
        raise


def _seize(task: FrozenTask, tracee: Tracee) -> None:
    """An exec gives a thread the number of its leader: it may have been seized by the number that it had before, and
    have looked like one that has ended since. Raises as Tracee.seize.
    """
    try:
        tracee.seize()
    except PermissionDenied:
        tracer = proc.status(proc.read(tracee.tid, "status")).tracer_pid
        ours = tracer == threading.get_native_id()  # a tracer is a thread
        if not (task.seized and ours):
            raise
    task.seized.append(tracee.tid)


def _await_stops(task: FrozenTask, asked: list[Tracee], timeout_ms: int) -> None:
    """Moves threads from `asked` to the task as they stop; those that exec has renumbered are asked again."""
    began, bound = time.monotonic(), timeout_ms / 1000
    while asked:
        tracee = asked.pop(0)
        try:
            tracee.wait_stop(TURN_MS)
            task.threads.append(tracee)
        except NoSuchProcess:
            continue
        except TraceeError:
            if tracee.is_stopped():  # and we were told so under another number
                task.threads.append(tracee)
                continue
            with suppress(NoSuchProcess):  # its number is that of a thread which we do not trace yet
                tracee.interrupt()
                asked.append(tracee)
            waited = time.monotonic() - began
            starved = waited < STARVED * bound and wants_processor(task.pid, tracee.tid)
            if waited > bound and not starved:
                raise _does_not_stop(task.pid, tracee.tid, round(waited * 1000)) from None


def _is_zombie(task: FrozenTask) -> bool:
    """Whether the process has ended. TraceeError when just its first thread has, and not for the moment of an exec."""
    until = time.monotonic() + GRACE_MS / 1000
    while True:
        task.stat = proc.stat(proc.read(task.pid, "stat"))
        if task.stat.state != "Z" or task.stat.num_threads == 1:
            return task.stat.state == "Z"
        if time.monotonic() > until:
            raise TraceeError(
                "its first thread has ended and others run on",
                where=f"pid {task.pid}",
                remedy="it cannot be moved until it ends or executes a program",
            )
        time.sleep(LOOK_S)


def _settle(task: FrozenTask, asleep: Mapping[int, SleepBefore], frozen_at_ns: int) -> None:
    if task.zombie:
        return
    task.stat = proc.stat(
        proc.read(task.pid, "stat")
    )  # exec may have come between the first look and the stop
    statuses = [proc.status(proc.read(task.pid, f"task/{tracee.tid}/status")) for tracee in task.threads]
    states = ptrace.states(task.threads)
    with ptrace.memory(task.pid) as memory:
        for tracee, state, status in zip(task.threads, states, statuses, strict=True):
            seen = asleep.get(tracee.tid)
            task.stopped.append(settle(tracee, state, status, memory, seen, frozen_at_ns))


def _let_go(tree: FrozenTree) -> None:
    """Detach everything that is still there."""
    for task in tree.tasks.values():
        for tracee, stopped in zip(task.threads, task.stopped, strict=False):
            if not tree.parked:
                _settle_again(tracee, stopped)
        for tracee in reversed(task.threads):
            with suppress(LazyprocError):
                tracee.detach()
        _close(task)


def _settle_again(tracee: Tracee, stopped: Stopped) -> None:
    with suppress(LazyprocError):
        settle_again(tracee, stopped.ended_by_stop, stopped.status, stopped.state.blocked)


def _close(task: FrozenTask) -> None:
    if task.pidfd >= 0:
        os.close(task.pidfd)
        task.pidfd = -1
