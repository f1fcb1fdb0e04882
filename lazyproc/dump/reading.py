"""Bytes in a terminal cannot travel. So who has a master runs for a moment longer than who writes to the slave, until
it has read what was on its way.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from lazyproc.errors import NoSuchProcess
from lazyproc.kernel import proc, terminal
from lazyproc.kernel.sys import pidfd_getfd

if TYPE_CHECKING:
    from lazyproc.dump.freeze import FrozenTask

ROUNDS = 3
READS_S = 0.02  # within which a program reads, mostly
LOOK_S = 0.0002


def let_read(tasks: Sequence[FrozenTask], again: Callable[[], None], timeout_ms: int) -> None:
    """Of a stopped tree, which is stopped when this returns; `again` stops what it has started meanwhile. Raises as
    `again`, and TraceeError.
    """
    if not any(task.threads and task.stat.tty for task in tasks):
        return
    with _masters(tasks) as masters:
        for _ in range(ROUNDS):
            readers = [task for task, master in masters if terminal.unread(master) and _may_run(task)]
            if not readers:
                return
            _run(readers, [master for _, master in masters], timeout_ms)
            again()


@contextmanager
def _masters(tasks: Iterable[FrozenTask]) -> Iterator[list[tuple[FrozenTask, int]]]:
    """Those of the tree with who has them, as descriptors of ours."""
    found: list[tuple[FrozenTask, int]] = []
    try:
        for task in tasks:
            for fd in proc.descriptor_numbers(task.pid) if task.threads else ():
                with suppress(OSError):
                    if os.stat(f"/proc/{task.pid}/fd/{fd}").st_rdev == terminal.PTMX:
                        found.append((task, pidfd_getfd(task.pidfd, fd)))
        yield found
    finally:
        for _, master in found:
            os.close(master)


def _may_run(task: FrozenTask) -> bool:
    """Not when it was stopped as by SIGSTOP."""
    return not any(tracee.stop_signal for tracee in task.threads)


def _run(tasks: Iterable[FrozenTask], masters: Sequence[int], timeout_ms: int) -> None:
    """Until nothing is unread. A signal that comes meanwhile stops a thread, and is delivered when that is asked to
    stop (wait_stop).
    """
    tracees = {tracee.tid: tracee for task in tasks for tracee in task.threads}.values()
    for tracee in tracees:
        with suppress(NoSuchProcess):  # ended in the round before
            tracee.cont()
    until = time.monotonic() + READS_S
    while time.monotonic() < until and any(map(terminal.unread, masters)):
        time.sleep(LOOK_S)
    for tracee in tracees:
        with suppress(NoSuchProcess):
            tracee.interrupt()
    for tracee in tracees:
        with suppress(NoSuchProcess):
            tracee.wait_stop(timeout_ms)
