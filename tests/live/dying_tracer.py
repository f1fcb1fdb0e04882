"""Run with LD_PRELOAD of dying.c: for every N a child that works on PID and is killed right before its N-th step.

WORK is "dump", on a process that runs, or "discard", on one that is parked until the end.

Prints one line for each death, and waits for a line before the next; "whole" when a child came to its end.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

from lazyproc.dump.freeze import FrozenTask, frozen_tree
from lazyproc.dump.park import park_tree, parking
from lazyproc.dump.question import Question, ask
from lazyproc.dump.tasks import process_questions
from lazyproc.dump.threads import thread_question
from lazyproc.kernel import park, proc, remote, tracee
from lazyproc.kernel.discard import discarding
from lazyproc.kernel.park import ParkedProcess


def dump(task: FrozenTask) -> None:
    """What a dump does with a process, twice: a second loan finds what the first has left."""
    states = [stopped.state for stopped in task.stopped]
    for _ in range(2):
        maps = proc.maps(proc.read(task.pid, "maps"))
        with (
            tracee.memory(task.pid) as memory,
            remote.borrowed(task.threads, states, memory, maps, ending=signal.SIGURG) as bench,
        ):
            questions: list[list[Question[object]]] = [[thread_question(bench)] for _ in task.threads]
            questions[0] += process_questions(task.pid, bench, ())
            ask(bench, list(zip(task.threads, questions, strict=True)))


def discard(process: ParkedProcess) -> None:
    """Twice, as well; of addresses at which there is nothing, so that it can be let run afterwards."""
    for _ in range(2):
        with discarding(process, process.threads[0], traced=False) as discarder:
            for _ in range(2):
                discarder.discard([(0x10000, 4096), (0x20000, 4096)])


def die(pid: int, at: int, process: ParkedProcess | None) -> bool:
    """False when the work was done before the `at`-th step."""
    child = os.fork()
    if child == 0:
        preloaded = ctypes.CDLL(None)
        done = ctypes.c_long.in_dll(preloaded, "dying_steps").value  # parking it
        ctypes.c_long.in_dll(preloaded, "dying_at").value = done + at
        if process is not None:
            discard(process)
            os._exit(0)
        with frozen_tree(pid) as tree:
            dump(tree.tasks[pid])
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or status == 0, status
    return status != 0


def parked(pid: int) -> ParkedProcess:
    with frozen_tree(pid) as tree:
        (process,) = parking(tree)
        park_tree(tree, (process,))
    return process


def main() -> None:
    pid, at = int(sys.argv[1]), 1
    process = parked(pid) if sys.argv[2] == "discard" else None
    while die(pid, at, process):
        print(at, flush=True)
        sys.stdin.readline()
        at += 1
    if process is not None:
        park.let_run(process)
    print("whole", flush=True)


if __name__ == "__main__":
    main()
