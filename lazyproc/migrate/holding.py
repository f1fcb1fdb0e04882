"""What the source holds after the commit: a parked tree whose pages are still needed, and how it is ended.

Everything is known by numbers, so that another process can go on when the one that froze the tree is gone: ptrace is
not needed to read a parked process, nor to end it.
"""

from __future__ import annotations

import os
import signal
import socket
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from lazyproc.dump.memory import lazy_extents, runs_of, shared_extents
from lazyproc.dump.tcp import silence
from lazyproc.errors import LazyprocError, NoSuchProcess
from lazyproc.facts import dataclass, field
from lazyproc.kernel import park, proc, sysvipc
from lazyproc.kernel import sys as kernel
from lazyproc.kernel.park import ParkedProcess, ParkedThread
from lazyproc.kernel.ready import readable
from lazyproc.migrate.locks import Locks, take_again
from lazyproc.model import (
    Extent,
    FileLock,
    LockKind,
    MemoryObject,
    ObjectKind,
    Registers,
    SharedKind,
    VmaKind,
)
from lazyproc.pages.frozen import FrozenPages, Place

TYPE_CHECKING = False
if TYPE_CHECKING:
    from lazyproc.dump.gather import Dump  # all of a dump: who goes on with one that is done does without

GONE_S = 10.0


@dataclass(frozen=True, slots=True)
class Holding:
    """A parked tree. `lazy` are the ranges (start, end) of each object that may be asked for, by vpid or object id."""

    processes: tuple[ParkedProcess, ...]  # the root first
    places: tuple[Place, ...]
    lazy: Mapping[MemoryObject, tuple[tuple[int, int], ...]]
    sysv: tuple[int, ...]  # ids of SysV segments that go with the tree
    locks: Locks = field(default_factory=dict)  # its file locks

    @property
    def root_pid(self) -> int:
        return self.processes[0].pid

    def extents(self) -> dict[MemoryObject, tuple[Extent, ...]]:
        """Every page with content in the lazy ranges; some may be at the destination already. Grows with memory."""
        pids = {place.obj: place.pid for place in self.places}
        found = {}
        for obj, ranges in self.lazy.items():
            if obj.kind is ObjectKind.TASK:
                found[obj] = lazy_extents(pids[obj], ranges, frozenset())
            else:
                place = next(place for place in self.places if place.obj == obj)
                with mapped_object(place) as fd:
                    found[obj] = shared_extents(fd, ranges[-1][1], lazy=True)
        return found

    def end(self) -> None:
        """The tree goes; its connections, which live at the destination now, without FIN or RST."""
        for process in self.processes:
            with suppress(ProcessLookupError, NoSuchProcess):
                if park.is_there(process):
                    with _connections(process.pid) as connections:
                        silence(connections)
        for process in self.processes:
            _kill(process)
        attached = sysvipc.segments()
        for number in self.sysv:
            if number in attached and not attached[number].attachments:
                sysvipc.remove_segment(number)

    def stands(self) -> bool:
        """Whether all of it is parked: COMMIT was sent only then."""
        return all(park.stands(process) for process in self.processes)

    def ended(self) -> int | None:
        """The pid of a process of it that somebody has killed."""
        return next((process.pid for process in self.processes if not park.is_there(process)), None)

    def demand_there(self) -> None:
        """Raises NoSuchProcess when one of it has been killed."""
        if (pid := self.ended()) is not None:
            raise NoSuchProcess("the parked process has ended", where=f"pid {pid}")

    def let_run(self) -> None:
        """The tree goes on here, with its file locks: raises LockTaken, and nothing of it runs, when one is not to be
        had. Raises what park.let_run does, for the first process that cannot, after the others; NoSuchProcess when all
        have ended: one may have, when our end let it run before it was parked.
        """
        if self.locks and self._may_lack_locks():
            take_again(self.processes, self.locks, traced=False)
        errors: list[LazyprocError] = []
        ended: list[LazyprocError] = []
        for process in self.processes:
            try:
                park.let_run(process)
            except NoSuchProcess as error:
                ended.append(error)
            except LazyprocError as error:
                errors.append(error)
        if errors or len(ended) == len(self.processes):
            raise (errors or ended)[0]

    def _may_lack_locks(self) -> bool:
        """They are let go of when all of it is parked, and taken again before any of it runs: who runs had them."""
        return all(park.stands(process) for process in self.processes if park.is_there(process))

    def open(self) -> FrozenPages:
        """The pages where they lie. Raises NoSuchProcess, PermissionDenied."""
        self.demand_there()
        return FrozenPages(self.places, {})


def holding_of(dump: Dump, processes: tuple[ParkedProcess, ...]) -> Holding:
    """Of a tree that was just parked."""
    tree = dump.checkpoint
    lazy: dict[MemoryObject, tuple[tuple[int, int], ...]] = {}
    places = [Place(s.object, s.start, s.end, s.pid, s.addr) for s in dump.segments if s.fd < 0]
    for task in tree.tasks:
        vmas = task.mm.vmas if task.mm else ()
        if ranges := tuple(runs_of(vma for vma in vmas if vma.may_be_lazy)):
            lazy[MemoryObject(ObjectKind.TASK, task.vpid)] = ranges
        for vma in vmas:
            if vma.kind is VmaKind.SHARED and tree.shared[vma.object_id].lazy:
                obj = MemoryObject(ObjectKind.SHARED, vma.object_id)
                lazy[obj] = ((0, tree.shared[vma.object_id].size),)
                end = vma.offset + vma.length
                places.append(Place(obj, vma.offset, end, dump.pids[task.vpid], vma.start))
    sysv = tuple(s.sysv_shmid for s in tree.shared.values() if s.kind is SharedKind.SYSV)
    locks = {dump.pids[task.vpid]: task.locks for task in tree.tasks if task.locks}
    return Holding(processes, tuple(places), lazy, sysv, locks)


@contextmanager
def mapped_object(place: Place, flags: int = os.O_RDONLY) -> Iterator[int]:
    """A descriptor of the shared object that lies at a place (proc(5), map_files)."""
    for entry in proc.maps(proc.read(place.pid, "maps")):
        if entry.start == place.addr:
            name = f"/proc/{place.pid}/map_files/{entry.start:x}-{entry.end:x}"
            fd = os.open(name, flags | os.O_CLOEXEC)
            try:
                yield fd
            finally:
                os.close(fd)
            return
    raise NoSuchProcess("maps a shared object no more", where=f"pid {place.pid} at {place.addr:#x}")


@contextmanager
def _connections(pid: int) -> Iterator[list[socket.socket]]:
    """Duplicates of the TCP connections a process has."""
    found: list[socket.socket] = []
    pidfd = kernel.pidfd_open(pid)
    try:
        for number in proc.descriptor_numbers(pid):
            with suppress(OSError):
                if os.readlink(f"/proc/{pid}/fd/{number}").startswith("socket:"):
                    sock = socket.socket(fileno=kernel.pidfd_getfd(pidfd, number))
                    found.append(sock)
        yield [sock for sock in found if _is_connection(sock)]
    finally:
        os.close(pidfd)
        for sock in found:
            sock.close()


def _is_connection(sock: socket.socket) -> bool:
    if sock.family not in (socket.AF_INET, socket.AF_INET6) or sock.type != socket.SOCK_STREAM:
        return False
    with suppress(OSError):
        return bool(sock.getpeername())
    return False


def _kill(process: ParkedProcess) -> None:
    """SIGKILL, and wait until its memory is free. Whoever traces it takes what it leaves."""
    try:
        pidfd = kernel.pidfd_open(process.pid)
    except ProcessLookupError:  # with its parent (PR_SET_PDEATHSIG), or it was somebody else's work
        return
    try:
        if park.is_there(process):  # it is the same, now that it cannot be another one's number
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            readable([pidfd], GONE_S)
    finally:
        os.close(pidfd)


# --- for the journal --------------------------------------------------------------------------------------------


def to_facts(holding: Holding) -> dict[str, object]:
    """What `from_facts` takes; JSON has it as it is."""
    return {
        "processes": [
            [
                p.pid,
                p.started,
                p.at,
                [[t.tid, t.registers, t.blocked, t.ended_by_stop] for t in p.threads],
            ]
            for p in holding.processes
        ],
        "places": [[p.obj.kind, p.obj.id, p.start, p.end, p.pid, p.addr] for p in holding.places],
        "lazy": [[obj.kind, obj.id, ranges] for obj, ranges in holding.lazy.items()],
        "sysv": holding.sysv,
        "locks": [
            [pid, lock.fd, lock.kind, lock.exclusive, lock.start, lock.length]
            for pid, locks in holding.locks.items()
            for lock in locks
        ],
    }


def from_facts(facts: Mapping[str, Any]) -> Holding:
    """Raises KeyError, TypeError, ValueError for what is no holding."""
    return Holding(
        tuple(_process(*row) for row in facts["processes"]),
        tuple(Place(_object(kind, number), *map(int, rest)) for kind, number, *rest in facts["places"]),
        {
            _object(kind, number): tuple((int(start), int(end)) for start, end in ranges)
            for kind, number, ranges in facts["lazy"]
        },
        tuple(map(int, facts["sysv"])),
        _locks(facts.get("locks", ())),  # an earlier lazyproc, which moved no locks, says nothing
    )


def _locks(rows: Any) -> Locks:
    found: dict[int, list[FileLock]] = defaultdict(list)
    for pid, fd, kind, exclusive, start, length in rows:
        lock = FileLock(int(fd), LockKind(int(kind)), exclusive is True, int(start), int(length))
        found[int(pid)].append(lock)
    return found


def _process(pid: Any, started: Any, at: Any, threads: Any) -> ParkedProcess:
    return ParkedProcess(int(pid), int(started), int(at), tuple(_thread(*row) for row in threads))


def _thread(tid: Any, registers: Any, blocked: Any, epoll: Any) -> ParkedThread:
    return ParkedThread(
        int(tid),
        Registers(*map(int, registers)),
        int(blocked),
        None if epoll is None else Registers(*map(int, epoll)),
    )


def _object(kind: Any, number: Any) -> MemoryObject:
    return MemoryObject(ObjectKind(int(kind)), int(number))
