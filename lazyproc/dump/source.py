"""A dump's pages as a PageSource and as segments for the page server: processes and objects read in place."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from lazyproc.dump.gather import Dump
from lazyproc.model import PAGE, Extent, MemoryObject, ObjectKind
from lazyproc.pages.frozen import FrozenPages, Place, ProcessSegment
from lazyproc.pages.server import FileSegment


class DumpPages:
    """The pages of a frozen tree, shared memory objects by their own descriptors (a hole there is a zero page)."""

    def __init__(self, dump: Dump, processes: FrozenPages) -> None:
        self._dump = dump
        self._processes = processes

    def extents(self) -> Mapping[MemoryObject, Sequence[Extent]]:
        return self._dump.checkpoint.memory

    def read(self, obj: MemoryObject, addr: int, count: int) -> bytes:
        """See PageSource.read."""
        if obj.kind is ObjectKind.TASK:
            return self._processes.read(obj, addr, count)
        return os.pread(self._dump.object_fds[obj.id], count * PAGE, addr).ljust(count * PAGE, b"\0")

    def segments(self) -> list[ProcessSegment | FileSegment]:
        """For PageServer; valid as long as the dump."""
        files = [(s.object.key, s.start, s.end, s.fd, s.addr) for s in self._dump.segments if s.fd >= 0]
        return [*self._processes.segments(), *files]


@contextmanager
def dump_pages(dump: Dump) -> Iterator[DumpPages]:
    """Open the frozen processes of a dump for reading. Raises NoSuchProcess, PermissionDenied."""
    places = [Place(s.object, s.start, s.end, s.pid, s.addr) for s in dump.segments if s.fd < 0]
    with FrozenPages(places, dump.checkpoint.memory) as processes:
        yield DumpPages(dump, processes)
