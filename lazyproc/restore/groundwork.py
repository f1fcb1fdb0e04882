"""The processes of a tree and their address spaces, with nothing in them yet. A tree that migrates has them before it
is stopped at its source, made of a forecast; when that has not come true they are thrown away
(docs/adr/0021-forecast.md).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from lazyproc.events import ignore
from lazyproc.facts import dataclass, field, replace
from lazyproc.images.forecast import Forecast, Room
from lazyproc.kernel import proc
from lazyproc.kernel import tracee as ptrace
from lazyproc.kernel.nursery import TRANSPORT_FD, Nursery
from lazyproc.kernel.sys import open_in
from lazyproc.model import PAGE, Checkpoint, Epoll, Mm, SharedMemory, Task
from lazyproc.restore import memory, pages
from lazyproc.restore.creation import Maker, ending_for
from lazyproc.restore.files import NONE_YET, make_files
from lazyproc.restore.groups import Birth
from lazyproc.restore.plan import creation_steps
from lazyproc.restore.site import Site
from lazyproc.restore.terminals import made_masters, masters_of
from lazyproc.restore.workshop import OpenPath
from lazyproc.uffd.pager import Pager

BYTES_PER_CALL = 256
ANY_CASE = 1 << 17
SLACK = Room(64, 64, 16)  # what a process may open and start between the forecast and the freeze


@dataclass(slots=True)
class Groundwork:
    """`maker` has the processes; `clocks` is a time namespace that they do not live in yet. Of the processes whose
    memory is mapped it has the `ranges` and the `userfaultfds`. `files` by id are open already. All descriptors are
    ours. `masters` closes those of its terminals.
    """

    birth: Birth
    forecast: Forecast
    pager: Pager | None
    handed: bool
    maker: Maker
    clocks: int
    stack: ExitStack  # closes what it opens
    masters: ExitStack
    files: Mapping[int, int] = field(default=NONE_YET)
    ranges: dict[int, tuple[pages.LazyRange, ...]] = field(default_factory=dict)
    userfaultfds: dict[int, int] = field(default_factory=dict)

    @property
    def sites(self) -> Mapping[int, Site]:
        return self.maker.sites

    def map_memory(
        self, shared: Mapping[int, SharedMemory], files: Mapping[int, int], objects: Mapping[int, int]
    ) -> None:
        """Of every process whose mappings are known and not there yet; the arguments are those of memory.map_all."""
        for vpid, site in self.sites.items():  # one after the other: see Site.receive_later
            if site.task.mm is None or vpid in self.ranges:
                continue
            lazy = tuple(pages.lazy_ranges(site.task, shared)) if self.handed or self.pager else ()
            memory.move_in(
                site, _bench_size(site.task, site.task.mm, self.forecast.tree, self.forecast.rooms[vpid])
            )
            memory.map_all(site, shared, files, objects)
            if self.handed:
                pages.lend_userfaultfd(site)
            elif self.pager and lazy:
                pages.keep_userfaultfd(site, self.pager)
            site.run()
            memory.check_vdso(site)
            if self.handed or lazy:
                self.userfaultfds[vpid] = pages.register(site, lazy, self.stack)
            if self.handed:
                pages.take_back(site)
            self.ranges[vpid] = lazy

    def suits(self, checkpoint: Checkpoint) -> bool:
        """Whether it is one for this tree, whose mappings are the very ones of the forecast where that had them."""
        mapped, files = self.forecast.tree, checkpoint.files
        return (
            not masters_of(files)
            and creation_steps(mapped.tasks) == creation_steps(checkpoint.tasks)
            and all(self._suits(task, checkpoint) for task in checkpoint.tasks)
            and all(files.get(number) == file for number, file in mapped.files.items())
        )

    def _suits(self, task: Task, checkpoint: Checkpoint) -> bool:
        site, room = self.sites[task.vpid], Room.of(task)
        if site.task.exit_signal != task.exit_signal or task.mm is None:
            return False
        if site.task.mm is None:
            return _free_number(room, task.mm) <= site.transport_fd
        needed = _bench_size(task, task.mm, checkpoint, room)
        fits = needed <= site.bench.size and room.highest_fd < site.transport_fd
        return fits and site.task.mm.vmas is task.mm.vmas

    def adopt(self, checkpoint: Checkpoint) -> None:
        """It becomes that of this tree."""
        self.forecast = Forecast.of(checkpoint)
        for task in checkpoint.tasks:
            if task.vpid in self.sites:
                site = self.sites[task.vpid]
                site.task, site.bench.ending = task, ending_for(task)


@contextmanager
def begun(
    forecast: Forecast, birth: Birth, pager: Pager | None, *, handed: bool = False
) -> Iterator[Groundwork]:
    """The processes alone: forks of the nursery, in their sessions and groups, killed with it at the end unless they
    were let go. Memory comes lazily by `pager` or by whom the userfaultfds are `handed` to, or is there at once. Raises
    PidTaken, RestoreError, HostLacks.
    """
    nursery = birth.nursery
    with ExitStack() as stack, killed_at_end(nursery):
        nursery.move_transport(
            max(_free_number(forecast.rooms[task.vpid], task.mm) for task in forecast.tree.tasks)
        )
        masters, files = stack.enter_context(ExitStack()), forecast.tree.files
        made = masters.enter_context(made_masters(files, opener(nursery)))
        terminals = [(each, made[number]) for number, each in masters_of(files).items() if each.session]
        maker = Maker(nursery, forecast.tree.tasks, stack, terminals)
        maker.make()
        clocks = stack.enter_context(nursery.new_clocks())
        yield Groundwork(birth, forecast, pager, handed, maker, clocks, stack, masters, made)


@contextmanager
def laid(forecast: Forecast, birth: Birth, pager: Pager | None) -> Iterator[Groundwork]:
    """Processes and address spaces by a forecast. Raises RestoreError, PidTaken, HostLacks, and whatever the kernel
    refuses.
    """
    rooms = {vpid: _with_slack(room) for vpid, room in forecast.rooms.items()}
    with begun(replace(forecast, rooms=rooms), birth, pager) as ground:
        made = ground.stack.enter_context(
            make_files(forecast.tree, open_path=opener(birth.nursery), listener=ignore)
        )
        ground.files = made.files
        ground.map_memory({}, made.files, {})
        yield ground


def opener(nursery: Nursery) -> OpenPath:
    """Opens paths from the root directory of the tree; where that is not ours symbolic links stay within it."""
    root = f"/proc/{nursery.pid}/root"
    if not nursery.has_root:
        return lambda path, flags, mode: os.open(root + path, flags, mode)

    def open_inside(path: str, flags: int, _mode: int) -> int:
        directory = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return open_in(directory, path, flags)
        finally:
            os.close(directory)

    return open_inside


def _with_slack(room: Room) -> Room:
    return Room(
        room.highest_fd + SLACK.highest_fd, room.descriptors + SLACK.descriptors, room.threads + SLACK.threads
    )


def _bench_size(task: Task, mm: Mm, checkpoint: Checkpoint, room: Room) -> int:
    return memory.bench_size(mm.vmas, room.descriptors, room.threads) + _further(task, checkpoint)


def _further(task: Task, checkpoint: Checkpoint) -> int:
    """Bytes for calls, with their arguments, of which a process may need any number. There is room for some hundred in
    any case: those spoil no forecast, which does not know of them.
    """
    resources = (checkpoint.files[each.file_id].resource for each in task.descriptors)
    watched = sum(len(each.targets) for each in resources if isinstance(each, Epoll))
    queued = len(task.pending) + sum(len(thread.pending) for thread in task.threads)
    filters = [each for thread in task.threads for each in thread.seccomp]
    calls = watched + queued + len(task.posix_timers) + len(task.locks) + len(filters)
    size = calls * BYTES_PER_CALL + sum(len(each.program) for each in filters)
    return -(-max(0, size - ANY_CASE) // PAGE) * PAGE


def _free_number(room: Room, mm: Mm | None) -> int:
    """A descriptor number that a process does not use, for the socket that brings descriptors."""
    return max(room.highest_fd, _mapped(mm) if mm else 0, TRANSPORT_FD - 1) + 1


def _mapped(mm: Mm) -> int:
    """How many files and objects its mappings may need at the same time, with its program."""
    return len({vma.file_id for vma in mm.vmas}) + len({vma.object_id for vma in mm.vmas}) + 1


@contextmanager
def killed_at_end(nursery: Nursery) -> Iterator[None]:
    try:
        yield
    finally:
        if nursery.spare:
            kill(nursery)


def kill(nursery: Nursery) -> None:
    """Kill it and everything forked from it, and take what they leave."""
    nursery.spare = False
    pids = _descendants(nursery.pid)
    tids = [tid for pid in pids for tid in proc.task_ids(pid)]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    ptrace.wait_gone(tids)


def _descendants(pid: int) -> list[int]:
    """Children before their parents: in a new pid namespace the death of `pid` is everybody's."""
    children = [child for tid in proc.task_ids(pid) for child in proc.children_of(pid, tid)]
    return [*(p for child in children for p in _descendants(child)), pid]
