"""Signals that come to a frozen tree after it was described. Nobody takes them here, so its copy is to have them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from lazyproc.dump.freeze import FrozenTask, FrozenTree
from lazyproc.kernel import tracee as ptrace
from lazyproc.kernel.settle import resumed
from lazyproc.late import SI_QUEUE, SI_TKILL, SI_USER, Late, LateSignal
from lazyproc.model import Checkpoint, Registers, Task

BY_PROCESSES = {SI_USER, SI_QUEUE, SI_TKILL}  # what timers send here the copy's own timers send


def late_signals(tree: FrozenTree, checkpoint: Checkpoint) -> Late:
    """Those that processes have sent since; it may be parked meanwhile. By the thread that traces it."""
    signals: list[LateSignal] = []
    registers: dict[int, Registers] = {}
    for frozen, task in zip(tree.tasks.values(), checkpoint.tasks, strict=True):
        if not frozen.zombie and (late := list(_of_task(frozen, task))):
            signals += late
            registers.update(_ended(frozen, task, late))
    return Late(tuple(signals), registers)


def _of_task(frozen: FrozenTask, task: Task) -> Iterator[LateSignal]:
    yield from _new(task.vpid, 0, frozen.threads[0].queued(shared=True), task.pending)
    for tracee, thread in zip(frozen.threads, task.threads, strict=True):
        yield from _new(task.vpid, thread.tid, tracee.queued(shared=False), thread.pending)


def _new(vpid: int, tid: int, queued: Sequence[bytes], known: Sequence[bytes]) -> Iterator[LateSignal]:
    """A stop signal takes SIGCONT out of the queue and SIGCONT stop signals (prepare_signal, kernel/signal.c): what is
    known need not be its beginning.
    """
    left = Counter(known)
    for info in queued:
        if left[info]:
            left[info] -= 1
        elif (signal := LateSignal(vpid, tid, info)).code in BY_PROCESSES:
            yield signal


def _ended(frozen: FrozenTask, task: Task, late: Sequence[LateSignal]) -> Iterator[tuple[int, Registers]]:
    """The threads whose call the late signals end, and how they run on."""
    shared = [*task.pending, *(each.siginfo for each in late if not each.tid)]
    with ptrace.memory(frozen.pid) as memory:
        for stopped, thread in zip(frozen.stopped, task.threads, strict=True):
            own = [*thread.pending, *(each.siginfo for each in late if each.tid == thread.tid)]
            registers, _ = resumed(stopped, (*own, *shared), task.sigactions, memory)
            if registers != thread.registers:
                yield thread.tid, registers
