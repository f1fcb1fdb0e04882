"""Gatherers of pipes and FIFOs: contents are copied out with tee(2), so the tree still has them."""

from __future__ import annotations

import fcntl
import os
import select
import stat as st
import struct
import termios
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress

from lazyproc.dump.files import fifo_path
from lazyproc.dump.look import Look, attempt
from lazyproc.dump.registry import Refused, Registry
from lazyproc.facts import dataclass, field, replace
from lazyproc.kernel import fds
from lazyproc.model import Pipe, PipeEnd

_REMEDY = (
    "move that process too (give the pid that started both), or start the program with its input and output "
    "redirected to files"
)


def gather_pipe_end(registry: Registry, look: Look, taken: int) -> PipeEnd:
    status = os.fstat(taken)
    number = _number(registry, look, status)
    if number not in registry.pipes:
        path = fifo_path(registry, look.link, taken) if look.link.startswith("/") else ""
        capacity = fcntl.fcntl(taken, fcntl.F_GETPIPE_SZ)
        packets = _packets(taken, look, capacity) if registry.contents_wanted else ()
        capacity = _room_for(sum(map(len, packets)), capacity)
        lengths = tuple(map(len, packets)) if len(packets) > 1 else ()  # a plain pipe is read in one go
        registry.pipes[number] = Pipe(number, capacity, b"".join(packets), path, lengths)
    return PipeEnd(number)


def _number(registry: Registry, look: Look, status: os.stat_result) -> int:
    """A pipe has that of its inode, by which --inherit-fd names it. FIFOs, which come later, have what is left."""
    inode = (status.st_dev, status.st_ino)
    if inode not in registry.pipe_numbers:
        number = 1 if look.link.startswith("/") else status.st_ino
        while number in registry.pipes:
            number += 1
        registry.pipe_numbers[inode] = number
    return registry.pipe_numbers[inode]


def _room_for(length: int, capacity: int) -> int:
    """What was spliced from a socket into a pipe lies there in pieces larger than a page, in more than its capacity
    (skb_splice_bits, net/core/skbuff.c). Written it takes a pipe of that size.
    """
    return capacity if length <= capacity else 1 << (length - 1).bit_length()


def _packets(taken: int, look: Look, capacity: int) -> tuple[bytes, ...]:
    """What lies in the pipe, as successive reads would give it."""
    length = unread(taken)
    if not length:
        return ()
    with _reading_end(taken, look) as source, _copy(source, capacity, length) as copy:
        packets = tuple(iter(lambda: _read(copy, length), b""))
    if sum(map(len, packets)) != length:
        raise Refused(
            f"its pipe holds {length} bytes in a buffer of {capacity}, more than may be copied here",
            f"raise fs.pipe-max-size to {capacity}",
        )
    return packets


def unread(fd: int) -> int:
    """Bytes that could be read: FIONREAD, on either end of a pipe."""
    return int(struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))[0])


@contextmanager
def _reading_end(taken: int, look: Look) -> Iterator[int]:
    """tee(2) wants a descriptor open for reading."""
    if look.access != os.O_WRONLY:
        yield taken
        return
    fd = os.open(f"/proc/self/fd/{taken}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _copy(source: int, capacity: int, length: int) -> Iterator[int]:
    """The reading end of a pipe of ours with the same contents as `source`, `length` bytes."""
    reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        with suppress(PermissionError):  # beyond fs.pipe-max-size: the caller sees that bytes are missing
            fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, capacity)
        fds.tee(source, writing, length)
        yield reading
    finally:
        os.close(reading)
        os.close(writing)


def _read(fd: int, length: int) -> bytes:
    try:
        return os.read(fd, length)
    except BlockingIOError:
        return b""


# --- ends held by others ------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Ends:
    """The descriptors of the tree on one pipe."""

    reading: list[Look] = field(default_factory=list)
    writing: list[Look] = field(default_factory=list)


def finish_pipes(registry: Registry, looks: Mapping[int, Look]) -> None:
    """What only all ends of a pipe together tell; `looks` holds a descriptor for each file.

    A pipe of which only a process outside the tree has the other end is an obstacle, or stays outside where that is
    permitted. Nobody at all having it is fine: that is EOF, or EPIPE.
    """
    ends: dict[int, _Ends] = {}
    for number, file in registry.files.items():
        if isinstance(file.resource, PipeEnd):
            look = looks[number]
            pipe = ends.setdefault(file.resource.pipe_id, _Ends())
            if look.access != os.O_WRONLY:
                pipe.reading.append(look)
            if look.access != os.O_RDONLY:
                pipe.writing.append(look)
    for number, pipe in ends.items():
        if any(look.info.flags & os.O_DIRECT for look in pipe.writing):
            _mark_single_packet(registry, number)
        if (not pipe.reading or not pipe.writing) and not registry.unread:
            _see_outside(registry, number, pipe)


def _mark_single_packet(registry: Registry, number: int) -> None:
    pipe = registry.pipes[number]
    if pipe.data and not pipe.packets:
        registry.pipes[number] = replace(pipe, packets=(len(pipe.data),))


def _see_outside(registry: Registry, number: int, ends: _Ends) -> None:
    look = (ends.reading or ends.writing)[0]
    with attempt(registry, look.pid, f"fd {look.fd}"):
        if not _held_outside(registry, look):
            return
        if not registry.permits.outside or registry.pipes[number].path:
            other = "reading" if ends.writing else "writing"
            raise Refused(f"the {other} end of {look.link} is open in a process outside the tree", _REMEDY)
        if ends.writing:  # what lies in it is for the process outside
            registry.pipes[number] = replace(registry.pipes[number], data=b"", packets=())
        for file in list(registry.files.values()):
            if file.resource == PipeEnd(number):
                registry.files[file.id] = replace(file, outside=True)


def _held_outside(registry: Registry, look: Look) -> bool:
    with registry.taken(look.pid, look.fd) as fd:
        # poll(2) of a FIFO's reading end is silent until a first writer has come (fs/pipe.c, w_counter).
        if look.link.startswith("/"):
            return _open_elsewhere(registry, os.fstat(fd))
        poll = select.poll()
        poll.register(fd, 0)  # POLLHUP: no writer is left; POLLERR: no reader
        return not poll.poll(0)


def _open_elsewhere(registry: Registry, status: os.stat_result) -> bool:
    """Whether a process that is neither of the tree nor ourselves has the file open."""
    ours = {os.getpid(), *(task.pid for task in registry.tasks)}
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        if pid not in ours and any(found == (status.st_dev, status.st_ino) for found in _open_inodes(pid)):
            return True
    return False


def _open_inodes(pid: int) -> Iterator[tuple[int, int]]:
    with suppress(OSError), closing(os.scandir(f"/proc/{pid}/fd")) as entries:
        for entry in entries:
            with suppress(OSError):
                status = entry.stat()
                if st.S_ISFIFO(status.st_mode):
                    yield status.st_dev, status.st_ino
