"""Pipes and FIFOs: made once, refilled, and opened anew for each end."""

from __future__ import annotations

import fcntl
import os
import stat as st
import termios

from lazyproc.errors import RestoreError
from lazyproc.events import Listener, Note
from lazyproc.model import OpenFile, Pipe, PipeEnd
from lazyproc.restore.workshop import LARGEFILE, Workshop, probe, reopen


def make_pipe_end(workshop: Workshop, file: OpenFile, resource: PipeEnd) -> int:
    pipe = workshop.checkpoint.pipes[resource.pipe_id]
    if pipe.id not in workshop.pipes:
        workshop.pipes[pipe.id] = _make_fifo(workshop, pipe) if pipe.path else _make_pipe(workshop, pipe)
    # open(2) sets O_LARGEFILE, and pipe(2) does not: an end without it is one of the pipe's own.
    original = None if file.flags & LARGEFILE else workshop.original(pipe, file.flags)
    if original is not None:
        return os.dup(original)
    return reopen(workshop.pipes[pipe.id], file.flags & ~os.O_DIRECT)  # which finish() sets


def _make_pipe(workshop: Workshop, pipe: Pipe) -> int:
    """Both ends stay open until the workshop closes, so that opening one end does not wait for the other."""
    reading, writing = (workshop.keep(fd) for fd in os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK))
    refill(pipe, writing, workshop.listener)
    workshop.originals |= {(Pipe, pipe.id, os.O_RDONLY): reading, (Pipe, pipe.id, os.O_WRONLY): writing}
    return reading


def _make_fifo(workshop: Workshop, pipe: Pipe) -> int:
    with probe(workshop.open_path, pipe.path) as found:
        check_fifo(pipe.path, found)
        fifo = workshop.keep(reopen(found, os.O_RDWR | os.O_NONBLOCK))
    if holds_data(fifo):
        raise RestoreError(
            "is in use on this host: there is data in it",
            where=f"file {pipe.path}",
            remedy="end what uses it",
        )
    refill(pipe, fifo, workshop.listener)
    return fifo


def holds_data(fd: int) -> bool:
    """Whether something could be read: FIONREAD, on either end."""
    return any(fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))


def check_fifo(path: str, probe: int) -> None:
    """Raise RestoreError unless the O_PATH descriptor is of a FIFO."""
    if not st.S_ISFIFO(os.fstat(probe).st_mode):
        raise RestoreError("is no FIFO on this host", where=f"file {path}", remedy=f"mkfifo {path}")


def refill(pipe: Pipe, writing: int, listener: Listener) -> None:
    """What lies in a pipe, and how much may, through an end for writing. Raises RestoreError."""
    if fcntl.fcntl(writing, fcntl.F_GETPIPE_SZ) != pipe.capacity:
        try:
            fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, pipe.capacity)
        except PermissionError:
            listener(Note(f"a pipe of {pipe.capacity} bytes is smaller now: raise fs.pipe-max-size"))
    if pipe.packets:  # with O_DIRECT each write is a packet
        fcntl.fcntl(writing, fcntl.F_SETFL, os.O_NONBLOCK | os.O_DIRECT)
    at = 0
    for length in pipe.packets or [len(pipe.data)]:
        if not _written(writing, pipe.data[at : at + length]):
            raise RestoreError(
                f"{len(pipe.data)} bytes do not fit into it here",
                where=f"pipe {pipe.path or pipe.id}",
                remedy=f"raise fs.pipe-max-size to {pipe.capacity}",
            )
        at += length


def _written(writing: int, data: bytes) -> bool:
    try:
        return not data or os.write(writing, data) == len(data)
    except BlockingIOError:
        return False
