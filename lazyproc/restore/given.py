"""Descriptors of whoever restores, in the place of what the tree had open: criu(8), --inherit-fd."""

from __future__ import annotations

import fcntl
import os
import stat as st
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from lazyproc.errors import RestoreError
from lazyproc.events import Listener, Note
from lazyproc.facts import replace
from lazyproc.model import Checkpoint, InetSocket, OpenFile, Pipe, PipeEnd, UnixSocket
from lazyproc.outside import name_of
from lazyproc.restore.pipes import holds_data, refill
from lazyproc.restore.workshop import finish, reopen, words

_ACCESS = {os.O_RDONLY: "reading", os.O_WRONLY: "writing"}


@contextmanager
def stand_ins(
    checkpoint: Checkpoint, given: Mapping[str, int], listener: Listener
) -> Iterator[dict[int, int]]:
    """By file id: duplicates of the `given` descriptors, which have the names of lazyproc/outside.py; the ends of pipes
    are opened anew, each for its own direction. Closed on leaving. Raises RestoreError for what stays outside of the
    tree when nothing is given in its place.
    """
    made: dict[int, int] = {}
    held = {each.file_id for task in checkpoint.tasks for each in task.descriptors}
    names = {file.id: name_of(file, checkpoint) for file in checkpoint.files.values()}
    for name in given.keys() - names.values():
        listener(Note(f"no file of the tree is called {name}: descriptor {given[name]} is of no use"))
    with ExitStack() as stack:
        for file in checkpoint.files.values():
            name = names[file.id]
            if name in given and (file.id in held or file.outside):
                made[file.id] = stack.enter_context(_stand_in(given[name], file, name))
            elif file.outside:
                raise RestoreError(
                    "was shared with a process outside of the tree, and nothing is given in its place",
                    where=name,
                    remedy=f"give one with lazyproc-criu restore --inherit-fd 'fd[N]:{name}'",
                )
        for number, end in _pipes(checkpoint, made).items():
            _refill(checkpoint.pipes[number], end, listener)
        yield made


@contextmanager
def _stand_in(fd: int, file: OpenFile, name: str) -> Iterator[int]:
    with words(name, f"descriptor {fd} cannot take its place", "give another one"):
        taken = _taken(fd, file, name)
    try:
        finish(taken, replace(file, pos=0))  # it has a place in its file already
        yield taken
    finally:
        os.close(taken)


def _taken(fd: int, file: OpenFile, name: str) -> int:
    if _is_kept(file):
        raise RestoreError(
            "is a connection that the tree has kept", where=name, remedy="leave out its --inherit-fd"
        )
    wanted = file.flags & os.O_ACCMODE
    if isinstance(file.resource, PipeEnd) and st.S_ISFIFO(os.fstat(fd).st_mode):
        return reopen(fd, file.flags & ~os.O_DIRECT | os.O_NONBLOCK)  # which finish() takes back
    has = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    if has not in (wanted, os.O_RDWR):
        raise RestoreError(
            f"descriptor {fd} is open for {_ACCESS[has]} only, and the program had it for more",
            where=name,
            remedy="give one that is open for the same",
        )
    return os.dup(fd)


def _is_kept(file: OpenFile) -> bool:
    """Whether another process of the tree, or a host elsewhere, would wait for this very end."""
    match file.resource:
        case UnixSocket() as unix:
            inside = unix.peer > 0 and not file.outside and not unix.peer_name
            return inside or bool(unix.pending)
        case InetSocket() as inet:
            return inet.tcp is not None
        case _:
            return False


def _pipes(checkpoint: Checkpoint, made: Mapping[int, int]) -> dict[int, int]:
    """An end of each pipe, by the pipe's number."""
    resources = {number: checkpoint.files[number].resource for number in made}
    return {each.pipe_id: made[number] for number, each in resources.items() if isinstance(each, PipeEnd)}


def _refill(pipe: Pipe, end: int, listener: Listener) -> None:
    """What the tree had not read yet is there again, unless it is the very pipe of before, which still has it."""
    if not pipe.data or not st.S_ISFIFO(os.fstat(end).st_mode):
        return
    if os.fstat(end).st_ino == pipe.id and holds_data(end):
        return
    if holds_data(end):
        raise RestoreError(
            "there is data in the pipe that is given in its place, and the tree has not read all of the old one",
            where=f"pipe:[{pipe.id}]",
            remedy="give an empty pipe",
        )
    writing = reopen(end, os.O_WRONLY | os.O_NONBLOCK)
    try:
        refill(pipe, writing, listener)
    finally:
        os.close(writing)
