"""The order of a dump: settle, ask, take descriptors, map memory; one frozen tree becomes one Checkpoint."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import cast

from lazyproc.dump.aio import unfetched
from lazyproc.dump.descriptors import Gathered, gather_descriptors
from lazyproc.dump.files import LINKS, gather_link
from lazyproc.dump.freeze import FrozenTask, FrozenTree
from lazyproc.dump.locks import awaited
from lazyproc.dump.mappings import Objects, gather_mm, open_memfds, rings_of, settled
from lazyproc.dump.memory import (
    eager_extents,
    lazy_extents,
    runs_of,
    shared_extents,
    with_guards,
)
from lazyproc.dump.permits import MOVED, Permits
from lazyproc.dump.question import Question, ask
from lazyproc.dump.registry import Registry, TaskRef
from lazyproc.dump.room import room_to_ask
from lazyproc.dump.space import NOTHING, Seen, space_now
from lazyproc.dump.tasks import TASK_ANSWERS, gather_task, gather_zombie, process_questions
from lazyproc.dump.threads import ThreadAnswers, gather_thread, thread_question
from lazyproc.errors import CannotBeDone, Obstacle
from lazyproc.facts import dataclass, replace
from lazyproc.kernel import proc, remote, sysvipc
from lazyproc.kernel import tracee as ptrace
from lazyproc.kernel.netfilter import Flow
from lazyproc.kernel.proc_fdinfo import LockInfo
from lazyproc.kernel.proc_locks import awaited_locks
from lazyproc.model import (
    PAGE,
    Checkpoint,
    Clocks,
    Descriptor,
    Extent,
    Fs,
    MemFd,
    MemoryObject,
    MmFlags,
    ObjectKind,
    SharedKind,
    SigAction,
    Task,
    Thread,
    VmaKind,
)
from lazyproc.pages.eager import eager_pages
from lazyproc.steps import Steps


@dataclass(frozen=True, slots=True)
class Segment:
    """Where pages of an object lie on this host: in process `pid` (at `addr`), or in file `fd` (at offset `addr`)."""

    object: MemoryObject
    start: int
    end: int
    pid: int
    fd: int
    addr: int


@dataclass(frozen=True, slots=True)
class Dump:
    """A frozen tree as a Checkpoint whose `memory` has the eager pages; the lazy ones are found by `lazy_extents`."""

    checkpoint: Checkpoint
    segments: tuple[Segment, ...]
    pids: Mapping[int, int]  # vpid -> pid
    object_fds: Mapping[int, int]
    connections: Sequence[socket.socket]  # TCP, to be silenced once the other side has them
    given_up: Sequence[socket.socket]  # TCP that the other side does not get, to be hung up
    outside: Sequence[Flow]  # the packets of those connections that lead out of the tree
    locked: Mapping[LockInfo, tuple[int, int]]  # its file locks, with pid and fd

    def demand_idle_rings(self) -> None:
        """Right before the hand-over: an AIO request may have been completed while the tree was frozen, which neither
        it nor the copy would be told. Raises CannotBeDone.
        """
        found: list[Obstacle] = []
        for task in self.checkpoint.tasks:
            pid = self.pids.get(task.vpid, 0)
            rings = rings_of(pid, task.mm.vmas) if task.mm else []
            if rings:
                with ptrace.memory(pid) as memory:
                    found += unfetched(rings, memory)
        if found:
            raise CannotBeDone(tuple(found))

    def demand_no_waiter(self) -> None:
        """Who waits for one of its file locks, and is none of it, gets that when it lets go. Raises CannotBeDone."""
        if self.locked and (found := tuple(awaited(self.locked, awaited_locks()))):
            raise CannotBeDone(found)

    def remove_segments(self) -> None:
        """The tree was killed here: its SysV segments that nobody has attached any more go with it."""
        attached = sysvipc.segments()
        for shared in self.checkpoint.shared.values():
            segment = attached.get(shared.sysv_shmid) if shared.kind is SharedKind.SYSV else None
            if segment is not None and not segment.attachments:
                sysvipc.remove_segment(segment.id)

    def lazy_extents(self) -> dict[MemoryObject, tuple[Extent, ...]]:
        """Every page with content that may come after the process runs. Grows with memory: not for the blackout."""
        found = {}
        eager = self.checkpoint.memory
        for task in self.checkpoint.tasks:
            if task.mm is None:
                continue
            obj = MemoryObject(ObjectKind.TASK, task.vpid)
            known = frozenset(page for e in eager.get(obj, ()) for page in range(e.addr, e.end, PAGE))
            ranges = runs_of(vma for vma in task.mm.vmas if vma.may_be_lazy)
            found[obj] = lazy_extents(self.pids[task.vpid], ranges, known)
        for number, shared in self.checkpoint.shared.items():
            if shared.lazy:
                obj = MemoryObject(ObjectKind.SHARED, number)
                found[obj] = shared_extents(self.object_fds[number], shared.size, lazy=True)
        return found

    def for_images(self) -> Checkpoint:
        """The checkpoint with all its pages listed, and those that only CRIU reads: the symbols of the old vdso, and
        the heads of AIO rings.
        """
        whole = self.whole()
        memory = dict(whole.memory)
        for task in whole.tasks:
            obj = MemoryObject(ObjectKind.TASK, task.vpid)
            read = [
                vma for vma in (task.mm.vmas if task.mm else ()) if vma.kind in (VmaKind.VDSO, VmaKind.AIO)
            ]
            more = (Extent(vma.start, vma.length // PAGE, lazy=False) for vma in read)
            memory[obj] = tuple(sorted((*memory.get(obj, ()), *more), key=lambda extent: extent.addr))
        return replace(whole, memory=memory)

    def whole(self) -> Checkpoint:
        """The checkpoint with all its pages listed."""
        memory = dict(self.checkpoint.memory)
        for obj, extents in self.lazy_extents().items():
            memory[obj] = tuple(sorted((*memory.get(obj, ()), *extents), key=lambda extent: extent.addr))
        return replace(self.checkpoint, memory=memory)


@contextmanager
def dumped(
    tree: FrozenTree,
    *,
    seen: Seen = NOTHING,
    tcp_close: bool = False,
    permits: Permits = MOVED,
    hold: Callable[[Sequence[Flow]], None] | None = None,
    steps: Steps | None = None,
) -> Iterator[Dump]:
    """Describe a frozen tree. The tree is as before on leaving; descriptors of ours into it are closed.

    `seen` is what was there before the freeze: of it is used what is still so.
    `hold` is told which packets to hold back
    before the queues of sockets are read. CannotBeDone lists all obstacles.
    """
    steps = steps or Steps()
    alive = [task for task in tree.tasks.values() if not task.zombie]
    tids = {
        t.tid: s.status.ns_pid[-1] for task in alive for t, s in zip(task.threads, task.stopped, strict=True)
    }
    refs = [TaskRef(task.pid, tids[task.pid], task.pidfd) for task in alive]
    with ExitStack() as stack:
        gathered = gather_descriptors(refs, tcp_close=tcp_close, permits=permits, hold=hold, seen=seen.files)
        stack.enter_context(gathered.sockets)
        steps.done("descriptors")
        objects = Objects(stack)
        tasks, eager = [], {}
        for frozen in tree.tasks.values():
            if frozen.zombie:
                tasks.append(gather_zombie(frozen, _ids(frozen, tree)))
                continue
            task, pages = _one_task(frozen, tree, gathered, objects, tids, seen, steps)
            tasks.append(task)
            eager[MemoryObject(ObjectKind.TASK, task.vpid)] = pages
        _take_unmapped_memfds(gathered.registry, gathered.descriptors, objects)
        shared_memory = settled(gathered.registry, tasks)
        if gathered.obstacles:
            raise CannotBeDone(tuple(gathered.obstacles))
        for number, shared in shared_memory.items():
            if not shared.lazy:
                obj = MemoryObject(ObjectKind.SHARED, number)
                eager[obj] = shared_extents(objects.fds[number], shared.size, lazy=False)
        clocks, since = _clocks(tree), time.monotonic_ns() - tree.frozen_at_ns
        checkpoint = Checkpoint(
            tasks=tuple(_sleeping(task, since) for task in tasks),
            files=gathered.files,
            pipes=gathered.pipes,
            shared=shared_memory,
            contents=gathered.contents,
            memory=eager,
            clocks=clocks,
            hostname=socket.gethostname(),
        )
        pids = {ref.vpid: ref.pid for ref in refs}
        segments = tuple(_segments(checkpoint, pids, objects.fds))
        sockets = gathered.sockets
        steps.done("objects")
        connections, given_up = sockets.connections(), sockets.given_up()
        outside, locked = sockets.outside_flows(), gathered.registry.locked
        yield Dump(checkpoint, segments, pids, objects.fds, connections, given_up, outside, locked)


def _one_task(
    frozen: FrozenTask,
    tree: FrozenTree,
    gathered: Gathered,
    objects: Objects,
    tids: Mapping[int, int],
    seen: Seen,
    steps: Steps,
) -> tuple[Task, tuple[Extent, ...]]:
    """One process, and its pages that have to be there before it runs."""
    pid, registry = frozen.pid, gathered.registry
    before = seen.spaces.get(pid)
    space = space_now(pid, frozen.stopped[0].status.locked_kib, before)
    frozen.maps = space.maps
    steps.done("maps")
    with ptrace.memory(pid) as memory:
        threads, answers = _ask(frozen, memory, space.maps, steps)
        ids = (tids[pid], *_ids(frozen, tree)[1:])
        task = gather_task(frozen, ids, threads, answers, tids)
        steps.done("task")
        of_mm = cast(tuple[int, MmFlags, int, int], tuple(answers[TASK_ANSWERS:]))
        exe, cwd, root = (gather_link(registry, pid, name) for name in LINKS)
        mm = gather_mm(registry, frozen, space, exe, of_mm, memory, objects)
        if space is not before or pid in seen.guarded:
            mm = replace(mm, vmas=with_guards(pid, mm.vmas))
        steps.done("memory")
        pages = eager_pages(mm, threads, memory.read)
    task = replace(
        task,
        mm=mm,
        fs=Fs(cwd, root, frozen.stopped[0].status.umask or 0),
        descriptors=gathered.descriptors[task.vpid],
        locks=tuple(registry.locks.get(task.vpid, ())),
    )
    extents = eager_extents(pid, mm.vmas, pages)
    steps.done("pagemap")
    return task, extents


def _ask(
    frozen: FrozenTask, memory: ptrace.Memory, maps: Sequence[proc.MapsEntry], steps: Steps
) -> tuple[tuple[Thread, ...], list[object]]:
    """Threads, and the process's answers: one remote program in every thread, all at the same time."""
    timers = proc.timers(proc.read(frozen.pid, "timers"))
    pending = 0
    for tracee, stopped in zip(frozen.threads, frozen.stopped, strict=True):
        pending |= stopped.status.sig_pending | stopped.status.shared_pending
        if stopped.status.seccomp:
            tracee.set_options(ptrace.PTRACE_O_TRACESYSGOOD | ptrace.PTRACE_O_SUSPEND_SECCOMP)
    ending = remote.ending_signal(frozen.stopped[0].status.sig_caught, pending)
    states = [stopped.state for stopped in frozen.stopped]
    size = room_to_ask(len(states), len(timers))
    with remote.borrowed(frozen.threads, states, memory, maps, ending=ending, size=size) as bench:
        questions: list[list[Question[object]]] = [[thread_question(bench)] for _ in frozen.threads]
        questions[0] += process_questions(frozen.pid, bench, timers)
        steps.done("bench")
        answers = ask(bench, list(zip(frozen.threads, questions, strict=True)))
        steps.done("ask")
    steps.done("bench")
    of_process = answers[0][1:]
    sigactions = cast(tuple[SigAction, ...], of_process[0])
    cpus, shared = os.cpu_count() or 1, frozen.shared_pending()
    threads = tuple(
        gather_thread(cpus, tracee, stopped, cast(ThreadAnswers, row[0]), sigactions, memory, shared)
        for tracee, stopped, row in zip(frozen.threads, frozen.stopped, answers, strict=True)
    )
    steps.done("threads")
    return threads, of_process


def _ids(frozen: FrozenTask, tree: FrozenTree) -> tuple[int, int, int, int]:
    """vpid, ppid (0 for the root), pgid, sid as the process itself sees them."""
    status = proc.status(proc.read(frozen.pid, "status"))
    parent = tree.tasks.get(status.ppid)
    root = frozen is next(iter(tree.tasks.values()))
    ppid = 0 if root or parent is None else proc.status(proc.read(parent.pid, "status")).ns_pid[-1]
    return status.ns_pid[-1], ppid, status.ns_pgid[-1], status.ns_sid[-1]


def _take_unmapped_memfds(
    registry: Registry, descriptors: Mapping[int, Sequence[Descriptor]], objects: Objects
) -> None:
    for task in registry.tasks:
        for descriptor in descriptors[task.vpid]:
            file = registry.files.get(descriptor.file_id)
            if file is not None and isinstance(file.resource, MemFd):
                with registry.taken(task.pid, descriptor.fd) as own:
                    open_memfds(registry, {file.resource.object_id: own}, objects)


def _segments(
    checkpoint: Checkpoint, pids: Mapping[int, int], object_fds: Mapping[int, int]
) -> Iterator[Segment]:
    for task in checkpoint.tasks:
        if task.mm is not None:
            obj = MemoryObject(ObjectKind.TASK, task.vpid)
            for start, end in runs_of(task.mm.vmas):
                yield Segment(obj, start, end, pids[task.vpid], -1, start)
    for number, shared in checkpoint.shared.items():
        size = -(-shared.size // PAGE) * PAGE
        if size:  # a memfd may be empty
            yield Segment(MemoryObject(ObjectKind.SHARED, number), 0, size, 0, object_fds[number], 0)


def _clocks(tree: FrozenTree) -> Clocks:
    """The clocks as the tree would see them now, when the last of its timers has been read: from an earlier moment on,
    what a timer had left when it was read would end before its time. They are ours, moved by the difference of the
    time namespaces.
    """
    root = next(iter(tree.tasks.values())).pid
    ours = proc.timens_offsets(proc.read(os.getpid(), "timens_offsets"))
    theirs = proc.timens_offsets(proc.read(root, "timens_offsets"))
    return Clocks(
        monotonic_ns=time.monotonic_ns() + theirs.monotonic_ns - ours.monotonic_ns,
        boottime_ns=time.clock_gettime_ns(time.CLOCK_BOOTTIME) + theirs.boottime_ns - ours.boottime_ns,
        realtime_ns=time.time_ns(),
    )


def _sleeping(task: Task, since: int) -> Task:
    """What was left of its sleeps when the tree was frozen is `since` (ns) less now."""
    if not any(thread.restart for thread in task.threads):
        return task
    return replace(task, threads=tuple(_less(thread, since) for thread in task.threads))


def _less(thread: Thread, since: int) -> Thread:
    restart = thread.restart
    if restart is None:
        return thread
    return replace(thread, restart=replace(restart, remaining_ns=max(0, restart.remaining_ns - since)))
