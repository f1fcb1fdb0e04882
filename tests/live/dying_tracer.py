"""Run with LD_PRELOAD of dying.c: for every N a child that works on PID and is killed right before its N-th step.

Prints one line for each death, and waits for a line before the next; "whole" when a child came to its end.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

from lazyproc.dump.freeze import FrozenTask, frozen_tree
from lazyproc.dump.question import ask
from lazyproc.dump.tasks import process_questions
from lazyproc.dump.threads import thread_questions
from lazyproc.kernel import proc, remote, tracee


def work(task: FrozenTask) -> None:
    """What a dump does with a process, twice: a second loan finds what the first has left."""
    states = [stopped.state for stopped in task.stopped]
    for _ in range(2):
        maps = proc.maps(proc.read(task.pid, "maps"))
        with (
            tracee.memory(task.pid) as memory,
            remote.borrowed(task.threads, states, memory, maps, ending=signal.SIGURG) as bench,
        ):
            questions = [thread_questions(bench) for _ in task.threads]
            questions[0] += process_questions(bench, ())
            ask(bench, list(zip(task.threads, questions, strict=True)))


def die(pid: int, at: int) -> bool:
    """False when the work was done before the `at`-th step."""
    child = os.fork()
    if child == 0:
        ctypes.c_long.in_dll(ctypes.CDLL(None), "dying_at").value = at
        with frozen_tree(pid) as tree:
            work(tree.tasks[pid])
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or status == 0, status
    return status != 0


def main() -> None:
    pid, at = int(sys.argv[1]), 1
    while die(pid, at):
        print(at, flush=True)
        sys.stdin.readline()
        at += 1
    print("whole", flush=True)


if __name__ == "__main__":
    main()
