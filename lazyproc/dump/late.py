"""Signals that come to a frozen tree after it was described. Nobody takes them here, so its copy is to have them."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator, Sequence

from lazyproc.dump.freeze import FrozenTask, FrozenTree
from lazyproc.kernel import tracee as ptrace
from lazyproc.kernel.settle import resumed
from lazyproc.late import Late, LateSignal
from lazyproc.model import Checkpoint, Registers, Task

_HEAD = struct.Struct("<iii")  # si_signo, si_errno, si_code begin a siginfo
# By kill, sigqueue, tgkill (include/uapi/asm-generic/siginfo.h). What timers send here the copy's own timers send.
SI_USER, SI_QUEUE, SI_TKILL = 0, -1, -6


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
    shared = frozen.threads[0].queued(shared=True)
    yield from (LateSignal(task.vpid, 0, info) for info in _new(shared, task.pending))
    for tracee, thread in zip(frozen.threads, task.threads, strict=True):
        own = tracee.queued(shared=False)
        yield from (LateSignal(task.vpid, thread.tid, info) for info in _new(own, thread.pending))


def _new(queued: Sequence[bytes], known: Sequence[bytes]) -> Iterator[bytes]:
    """A stop signal takes SIGCONT out of the queue and SIGCONT stop signals (prepare_signal, kernel/signal.c): what is
    known need not be its beginning.
    """
    left = Counter(known)
    for info in queued:
        if left[info]:
            left[info] -= 1
        elif _HEAD.unpack_from(info)[2] in (SI_USER, SI_QUEUE, SI_TKILL):
            yield info


def _ended(frozen: FrozenTask, task: Task, late: Sequence[LateSignal]) -> Iterator[tuple[int, Registers]]:
    """The threads whose call the late signals end, and how they run on."""
    shared = [*task.pending, *(each.siginfo for each in late if not each.tid)]
    with ptrace.memory(frozen.pid) as memory:
        for stopped, thread in zip(frozen.stopped, task.threads, strict=True):
            own = [*thread.pending, *(each.siginfo for each in late if each.tid == thread.tid)]
            registers, _ = resumed(stopped, (*own, *shared), task.sigactions, memory)
            if registers != thread.registers:
                yield thread.tid, registers
