"""`--release`: the source's memory is freed as the destination acknowledges it (docs/adr/0014-release.md).

Only after the commit, when the parked tree never runs again; the journal says so, on disk, before the first page goes.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from itertools import islice
from typing import Self

from lazyproc.errors import LazyprocError, NoSuchProcess
from lazyproc.events import Listener, Note
from lazyproc.kernel.discard import Discarder, discarding
from lazyproc.kernel.park import ParkedProcess
from lazyproc.kernel.parked import unfiltered
from lazyproc.kernel.sys import punch_hole
from lazyproc.migrate.holding import Holding, mapped_object
from lazyproc.migrate.journal import RELEASING, Journal
from lazyproc.model import PAGE, Extent, MemoryObject, ObjectKind
from lazyproc.pages.frozen import Place, without_overlaps
from lazyproc.pages.server import PageServer
from lazyproc.wire.native import MapEntry, memory_object


class LazyPlaces:
    """Where the lazy memory of a parked tree lies, each byte once: only that may be freed."""

    def __init__(self, holding: Holding) -> None:
        self._places: dict[MemoryObject, list[Place]] = defaultdict(list)
        for place in without_overlaps(holding.places):
            for start, end in holding.lazy.get(place.obj, ()):
                if part := _part(place, start, end):
                    self._places[place.obj].append(part)
        for places in self._places.values():
            places.sort(key=lambda place: place.start)

    def of(self, entries: Iterable[MapEntry]) -> Iterator[Place]:
        """What of these pages it is."""
        for entry in entries:
            places = self._places.get(memory_object(entry.object), [])
            end = entry.addr + entry.pages * PAGE
            for place in islice(places, bisect_right(places, entry.addr, key=lambda place: place.end), None):
                if place.start >= end:
                    break
                if part := _part(place, entry.addr, end):
                    yield part


def _part(place: Place, start: int, end: int) -> Place | None:
    first, last = max(place.start, start), min(place.end, end)
    if first >= last:
        return None
    return place._replace(start=first, end=last, addr=place.addr + first - place.start)


def gaps(ranges: Sequence[tuple[int, int]], extents: Sequence[Extent]) -> Iterator[tuple[int, int]]:
    """(start, end) of what is in the ranges and in no extent; both sorted."""
    at = 0
    for start, end in ranges:
        while at < len(extents) and extents[at].end <= start:
            at += 1
        while at < len(extents) and extents[at].addr < end:
            if start < extents[at].addr:
                yield start, extents[at].addr
            start = extents[at].end
            if start >= end:  # it may reach into the next range
                break
            at += 1
        if start < end:
            yield start, end


class Releaser:
    """Of one parked tree. A context manager, to be left before the tree is ended. One thread, the tracer's.

    `traced`: its threads are stopped by us already.
    """

    def __init__(
        self, holding: Holding, server: PageServer, journal: Journal, listener: Listener, *, traced: bool
    ) -> None:
        self._holding = holding
        self._places = LazyPlaces(holding)
        self._server = server
        self._journal = journal
        self._listener = listener
        self._traced = traced
        self._stack = ExitStack()
        self._discarders: dict[int, Discarder | None] = {}
        self._objects: dict[MemoryObject, int] = {}
        self._told = False  # that nothing is freed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """The threads stand, or are, in their parking code again; but for those of a process that was killed."""
        with suppress(NoSuchProcess):
            self._stack.close()

    def take_over(self) -> None:
        """A predecessor has freed pages: what has no content any more is not there, and must not be read as zeros. The
        destination knows the map since before the first was freed, and asks for nothing else.
        """
        for process in self._holding.processes:
            self._discarder(process.pid)  # a thread may be in a predecessor's program still
        extents = self._holding.extents()
        for obj, ranges in self._holding.lazy.items():
            for start, end in gaps(ranges, extents.get(obj, ())):
                self._server.release(obj, start, (end - start) // PAGE)

    def release(self, entries: Sequence[MapEntry]) -> None:
        """Free what was acknowledged. The server knows it before it is gone. Raises NoSuchProcess."""
        if not self._is_recorded():
            return
        private: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for part in self._places.of(entries):
            length = part.end - part.start
            self._server.release(part.obj, part.start, length // PAGE)
            if part.obj.kind is ObjectKind.TASK:
                private[part.pid].append((part.addr, length))
            else:
                self._punch(part)
        for pid, ranges in private.items():
            if (discarder := self._discarder(pid)) is not None:
                discarder.discard(ranges)

    def _is_recorded(self) -> bool:
        """That it never runs here again. While that cannot be written down its memory stays, until the end at worst."""
        if self._journal.facts["state"] == RELEASING:
            return True
        try:
            self._journal.write(RELEASING)
        except LazyprocError as error:
            if not self._told:
                self._told = True
                self._listener(Note(f"its memory is not freed for now: {error}"))
            return False
        return True

    def _discarder(self, pid: int) -> Discarder | None:
        if pid not in self._discarders:
            self._discarders[pid] = self._begin(next(p for p in self._holding.processes if p.pid == pid))
        return self._discarders[pid]

    def _begin(self, process: ParkedProcess) -> Discarder | None:
        thread = unfiltered(process)
        if thread is None:
            self._listener(
                Note(f"pid {process.pid}: has seccomp filters, its memory is freed at the end only")
            )
            return None
        return self._stack.enter_context(discarding(process, thread, self._traced))

    def _punch(self, part: Place) -> None:
        """Shared memory is the object's, not a process's. It may be sealed against writing, which this is."""
        if part.obj not in self._objects:
            place = next(place for place in self._holding.places if place.obj == part.obj)
            self._objects[part.obj] = self._stack.enter_context(mapped_object(place, os.O_RDWR))
        with suppress(PermissionError):
            punch_hole(self._objects[part.obj], part.start, part.end - part.start)
