"""The pages of a frozen tree, read where they lie: no copy, no pipe, no image on disk."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import NamedTuple, Self

from lazyproc.errors import ImageError, NoSuchProcess, PermissionDenied
from lazyproc.model import PAGE, Extent, MemoryObject

_PIDFD_THREAD = os.O_EXCL  # Linux 6.9, include/uapi/linux/pidfd.h


class Place(NamedTuple):
    """Bytes [start, end) of an object are mapped at `addr` of the thread group that thread `pid` belongs to.

    Any thread will do that is alive: a leader that called pthread_exit has no memory to read.
    """

    obj: MemoryObject
    start: int
    end: int
    pid: int
    addr: int


class ProcessSegment(NamedTuple):
    """A Place as the page server takes it; the descriptors belong to the FrozenPages."""

    object: int  # MemoryObject.key
    start: int
    end: int
    pid: int
    addr: int
    pidfd: int
    mem: int  # /proc/PID/mem


class FrozenPages:
    """A PageSource over processes that stand still; the caller sees to that. A context manager.

    `extents` says which pages have content; it may name less than the places hold. Where two places show
    the same part of an object, as they do with shared memory, one of them is read.

    Raises NoSuchProcess or PermissionDenied when a process cannot be opened.
    """

    def __init__(self, places: Iterable[Place], extents: Mapping[MemoryObject, Sequence[Extent]]) -> None:
        self._extents = extents
        arranged = without_overlaps(places)
        with ExitStack() as stack:
            opened = {pid: _open_process(pid, stack) for pid in {place.pid for place in arranged}}
            self._segments = [_segment(place, *opened[place.pid]) for place in arranged]
            self._descriptors = stack.pop_all()
        self._ends = [(segment.object, segment.end) for segment in self._segments]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop every page server over the segments first."""
        self._descriptors.close()

    def segments(self) -> Sequence[ProcessSegment]:
        """Sorted and without overlaps; valid until `close`."""
        return self._segments

    def extents(self) -> Mapping[MemoryObject, Sequence[Extent]]:
        return self._extents

    def read(self, obj: MemoryObject, addr: int, count: int) -> bytes:
        """`count` pages of `obj` from `addr`.

        Raises ImageError when a page is in no place or cannot be read (a guard page), NoSuchProcess when the
        process has ended.
        """
        data = bytearray(count * PAGE)
        view = memoryview(data)
        done = 0
        while done < len(data):
            segment = self._find(obj, addr + done)
            length = min(len(data) - done, segment.end - (addr + done))
            _read_exactly(segment, segment.addr + addr + done - segment.start, view[done : done + length])
            done += length
        return bytes(data)

    def _find(self, obj: MemoryObject, addr: int) -> ProcessSegment:
        index = bisect_right(self._ends, (obj.key, addr))
        if index < len(self._segments):
            segment = self._segments[index]
            if segment.object == obj.key and segment.start <= addr:
                return segment
        where = f"{obj.kind.name.lower()} {obj.id} at {addr:#x}"
        raise ImageError("no frozen process maps this page", where=where)


def without_overlaps(places: Iterable[Place]) -> list[Place]:
    """Sorted by object and start; what an earlier place covers is cut off the front of a later one."""
    result: list[Place] = []
    for place in sorted(places, key=lambda place: (place.obj.key, place.start)):
        covered = result[-1].end if result and result[-1].obj == place.obj else 0
        skip = max(0, covered - place.start)
        if place.start + skip < place.end:
            result.append(place._replace(start=place.start + skip, addr=place.addr + skip))
    return result


def _segment(place: Place, pidfd: int, mem: int) -> ProcessSegment:
    return ProcessSegment(place.obj.key, place.start, place.end, place.pid, place.addr, pidfd, mem)


def _open_process(pid: int, stack: ExitStack) -> tuple[int, int]:
    """(pidfd, /proc/PID/mem) of the thread, closed by `stack`."""
    try:
        pidfd = _pidfd_open(pid)
        stack.callback(os.close, pidfd)
        mem = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, mem)
    except (ProcessLookupError, FileNotFoundError):
        raise NoSuchProcess("the process has ended", where=f"pid {pid}") from None
    except PermissionError as error:
        raise PermissionDenied(
            f"its memory may not be read ({error.strerror})",
            where=f"pid {pid}",
            remedy="run as root or with CAP_SYS_PTRACE",
        ) from None
    return pidfd, mem


def _pidfd_open(pid: int) -> int:
    """Of the thread; before Linux 6.9 only a group leader can have one."""
    try:
        return os.pidfd_open(pid, _PIDFD_THREAD)
    except OSError:
        return os.pidfd_open(pid)


def _read_exactly(segment: ProcessSegment, addr: int, view: memoryview) -> None:
    """By /proc/PID/mem: it stays with the address space it was opened on, so no reused pid can answer, and it
    reads what the process itself may not (PROT_NONE)."""
    done = 0
    while done < len(view):
        try:
            got = os.preadv(segment.mem, [view[done:]], addr + done)
        except OSError as error:
            raise ImageError(
                f"the page at {addr + done:#x} cannot be read ({error.strerror})", where=f"pid {segment.pid}"
            ) from None
        if got == 0:
            raise NoSuchProcess("the process ended while its pages were read", where=f"pid {segment.pid}")
        done += got
