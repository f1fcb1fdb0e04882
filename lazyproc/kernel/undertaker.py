"""Takes tracees that have died while the thread that traces them cannot: it waits in PTRACE_SEIZE for one that executes
a program.

execve(2) holds a lock that PTRACE_SEIZE waits for (cred_guard_mutex), and in it waits for the end of all other threads.
One that is traced has ended when its tracer has waited for it (de_thread, fs/exec.c), or any other thread of the
tracer's process has.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

from lazyproc.kernel.tracee import WALL

LOOK_S = 0.01
WAITING = os.WEXITED | os.WNOHANG | WALL
DEAD = (os.CLD_EXITED, os.CLD_KILLED, os.CLD_DUMPED)


@contextmanager
def taking_the_dead(tids: Callable[[], Iterable[int]]) -> Iterator[Callable[[], None]]:
    """Of these, which may become more: another thread asks for them. Until what is yielded is called, or to the end."""
    over = threading.Event()
    thread = threading.Thread(target=_take, args=(tids, over), name="undertaker")
    thread.start()
    try:
        yield over.set
    finally:
        over.set()
        thread.join()


def _take(tids: Callable[[], Iterable[int]], over: threading.Event) -> None:
    while not over.wait(LOOK_S):
        for tid in tids():
            with suppress(ChildProcessError):  # it was waited for, or is none of our tracees any more
                # Of a tracee a stop is told as well, asked for or not (wait_task_stopped), and that is the tracer's.
                found = os.waitid(os.P_PID, tid, WAITING | os.WNOWAIT)
                if found is not None and found.si_code in DEAD:
                    os.waitid(os.P_PID, tid, WAITING)
