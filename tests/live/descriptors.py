"""Processes with open files, gathered and made again: shared by test_descriptors_*."""

from __future__ import annotations

import os
import signal
import struct
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

from lazyproc.dump.descriptors import Gathered, gather_descriptors
from lazyproc.dump.registry import TaskRef
from lazyproc.kernel.sys import pidfd_open
from lazyproc.model import Checkpoint, Clocks, Task, TaskState
from lazyproc.restore.epolls import EpollRow, add_orphans, epoll_rows
from lazyproc.restore.files import make_files

REPORT = 900  # where a child says who it is; its own descriptors start at 10, and 0, 1, 2 are /dev/null
NO_CLOCKS = Clocks(0, 0, 0)


@contextmanager
def stopped(*bodies: Callable[[], object]) -> Iterator[list[TaskRef]]:
    """A chain of stopped processes, each the child of the one before; each has run its own body first.

    They start with nothing but /dev/null open, and a child has what its parent opened.
    """
    reading, writing = os.pipe()
    first = os.fork()
    if first == 0:
        _run(bodies, writing, reading)
    os.close(writing)
    pids = [first]
    try:
        pids = _pids(reading, len(bodies), first)
        os.close(reading)
        with ExitStack() as stack:
            refs = []
            for pid in pids:
                pidfd = pidfd_open(pid)
                stack.callback(os.close, pidfd)
                refs.append(TaskRef(pid, pid, pidfd))
            yield refs
    finally:
        for pid in pids[1:]:
            os.kill(pid, signal.SIGKILL)
        with suppress(ProcessLookupError, ChildProcessError):  # its body failed, and _pids has waited for it
            os.kill(first, signal.SIGKILL)
            os.waitpid(first, 0)


def _pids(reading: int, count: int, first: int) -> list[int]:
    """Who is in the chain; the last one stops before its parents do, so the first one's stop tells all."""
    _, status = os.waitpid(first, os.WUNTRACED)
    data = b""
    while piece := os.read(reading, 4096):
        data += piece
    assert os.WIFSTOPPED(status), data.decode()
    return list(struct.unpack(f"{count}i", data))


def _run(bodies: Sequence[Callable[[], object]], writing: int, reading: int) -> None:
    """The child: never returns."""
    try:
        os.dup2(writing, 3)
        os.closerange(4, 4096)
        null = os.open("/dev/null", os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(null, number)
        os.close(null)
        os.dup2(3, REPORT)
        os.close(3)
        for depth, body in enumerate(bodies):
            os.write(REPORT, struct.pack("i", os.getpid()))
            body()
            if depth + 1 < len(bodies):
                child = os.fork()
                if child:
                    os.waitpid(child, os.WUNTRACED)
                    break
        os.close(REPORT)
        os.kill(os.getpid(), signal.SIGSTOP)
    except BaseException:
        os.write(REPORT, traceback.format_exc().encode())
    finally:
        os._exit(1)


def at(number: int, fd: int) -> None:
    """Move a descriptor to the number the test knows it by."""
    os.dup2(fd, number)
    os.close(fd)


def checkpoint_of(gathered: Gathered, clocks: Clocks = NO_CLOCKS) -> Checkpoint:
    """A checkpoint of nothing but descriptors."""
    tasks = tuple(
        Task(vpid, 0, vpid, vpid, TaskState.ALIVE, "t", descriptors=rows)
        for vpid, rows in gathered.descriptors.items()
    )
    return Checkpoint(tasks, gathered.files, gathered.pipes, gathered.shared, gathered.contents, {}, clocks)


@contextmanager
def gathered_from(*bodies: Callable[[], object]) -> Iterator[Gathered]:
    """The descriptors of a stopped chain; the chain is gone inside, as it would be on another host."""
    with stopped(*bodies) as tasks:
        gathered = gather_descriptors(tasks)
    with gathered.sockets:
        yield gathered


@contextmanager
def made_from(*bodies: Callable[[], object]) -> Iterator[dict[int, int]]:
    """Numbers in the first process of the chain to our descriptors made from them."""
    with gathered_from(*bodies) as gathered, made(checkpoint_of(gathered)) as files:
        yield files


@contextmanager
def made(checkpoint: Checkpoint) -> Iterator[dict[int, int]]:
    with make_files(checkpoint, open_path=os.open) as files:
        add_orphans(checkpoint, files.files)
        yield {
            row.fd: files.files[row.file_id]
            for row in checkpoint.root.descriptors
            if row.file_id in files.files  # the others are obstacles
        }


def rows_of(checkpoint: Checkpoint) -> list[EpollRow]:
    return epoll_rows(checkpoint, checkpoint.root)


def obstacle_words(*bodies: Callable[[], object]) -> list[str]:
    """What stops the dump of such a chain, without the pid and the remedy's end."""
    with gathered_from(*bodies) as gathered:
        return [f"{obstacle.where}: {obstacle.why}; {obstacle.remedy}" for obstacle in gathered.obstacles]
