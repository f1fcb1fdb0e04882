"""The order of a restore on one screen: a checkpoint becomes a stopped tree, and the stopped tree runs.

Everything is driven from outside by remote calls; no code of ours stays in a restored process. Until `outlive_us`
every process is a tracee with PTRACE_O_EXITKILL, so a failure, or our death, leaves nothing half-built behind.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Literal

from lazyproc.errors import NoSuchProcess, PidTaken, RestoreError
from lazyproc.events import Listener, Note, StepClock
from lazyproc.facts import dataclass, field, replace
from lazyproc.kernel import arch_x86_64 as arch
from lazyproc.kernel import proc
from lazyproc.kernel import tracee as ptrace
from lazyproc.kernel.arch_x86_64 import SYS
from lazyproc.kernel.netfilter import DUMPED, Hold, release_session
from lazyproc.kernel.nursery import TRANSPORT_FD, Nursery, nursery
from lazyproc.kernel.remote import Call, step
from lazyproc.model import Checkpoint, Clocks, Mm, Task, TaskState, VmaKind
from lazyproc.pages import PageSource
from lazyproc.restore import descriptors, memory, objects, pages, restarts, state, vectors
from lazyproc.restore.creation import Maker, make_threads, meet_threads, stop
from lazyproc.restore.epolls import add_orphans
from lazyproc.restore.files import make_files
from lazyproc.restore.groups import Birth, nursery_in_group
from lazyproc.restore.inherited import Inherited
from lazyproc.restore.lazytree import LazyTask, LazyTree
from lazyproc.restore.memfds import seal_memfds
from lazyproc.restore.site import Site
from lazyproc.restore.sockets import MadeSockets, flows_to_hold, make_sockets
from lazyproc.restore.users import Users
from lazyproc.uffd.device import demand_for_tasks
from lazyproc.uffd.pager import Pager

# "same": as it was dumped, a root that was pid 1 in a new one, any other here
Pidns = Literal["auto", "host", "new", "same"]


@dataclass(slots=True)
class BuiltTree:
    """A complete tree that has not run an instruction. `userfaultfds` are ours, by vpid."""

    checkpoint: Checkpoint
    nursery: Nursery
    sites: Mapping[int, Site]
    userfaultfds: Mapping[int, int]
    lazy: Sequence[pages.LazyRange]
    lazy_tree: LazyTree  # what is needed to complete it when it runs
    _sockets: MadeSockets
    _made: ExitStack  # our descriptors of everything the tasks opened
    _hold: Hold
    released: bool = field(default=False)

    @property
    def root_pid(self) -> int:
        return self.sites[self.checkpoint.root.vpid].pid

    def outlive_us(self) -> None:
        """From here on the tree is never killed for our sake: whatever becomes of us, it runs. The nursery goes first,
        as its end would be that of its pid namespace.
        """
        if self.checkpoint.root.vpid != 1:
            self.nursery.become_parent_of(self.checkpoint.root.vpid)
        self.released, self.nursery.spare = True, False
        for tracee in (self.nursery.tracee, *self._tracees()):
            with suppress(NoSuchProcess):  # somebody has killed it
                tracee.set_options(0)

    def release(self) -> None:
        """Let it run. From here on it is nobody's tracee. Raises what went wrong after everything else was done.

        Packets come through before TCP leaves repair mode: until then they are taken without an answer, and what
        is sent on leaving it must not be dropped.
        """
        if not self.released:
            self.outlive_us()
        with ExitStack() as last_first:  # each is done whatever becomes of the others
            if self.checkpoint.root.vpid != 1:
                last_first.callback(self.nursery.tracee.detach)
            for tracee in reversed(self._tracees()):
                last_first.callback(tracee.detach)
            last_first.callback(self._made.close)
            last_first.callback(self._sockets.leave_repair)
            last_first.callback(self._hold.release)
            if self.checkpoint.held.startswith(DUMPED):
                last_first.callback(release_session, self.checkpoint.held)

    def _tracees(self) -> list[ptrace.Tracee]:
        return [tracee for site in self.sites.values() for tracee in site.threads.values()]


def _lazy_tree(
    checkpoint: Checkpoint, birth: Birth, sites: Mapping[int, Site], ranges: Sequence[pages.LazyRange]
) -> LazyTree:
    anchored = [site for site in sites.values() if site.anchor >= 0]
    return LazyTree(
        root_pid=sites[checkpoint.root.vpid].pid,
        root_vpid=checkpoint.root.vpid,
        nursery_pid=birth.nursery.pid,
        tasks=tuple(
            LazyTask(site.task.vpid, site.pid, _started(site.pid), site.anchor, site.ledger, site.cradle)
            for site in anchored
        ),
        huge=tuple((sites[r.vpid].pid, r.addr, r.length) for r in ranges if r.huge),
        groups=tuple(birth.groups),
        cradle=_inode(anchored[0].pid, anchored[0].cradle) if anchored else 0,
    )


def _inode(pid: int, fd: int) -> int:
    return os.stat(f"/proc/{pid}/fd/{fd}").st_ino


def _started(pid: int) -> int:
    return proc.stat(proc.read(pid, "stat")).start_time


def wants_new_pidns(pidns: Pidns, numbers: Iterable[int]) -> bool:
    """Whether a tree with these numbers gets a pid namespace: also when one of them is 1, or plainly taken here."""
    if pidns == "same":
        return 1 in numbers
    return pidns == "new" or (pidns == "auto" and any(map(is_taken, numbers)))


def _numbers(checkpoint: Checkpoint) -> Iterator[int]:
    for task in checkpoint.tasks:
        yield task.vpid
        yield from (thread.tid for thread in task.threads[1:])


def is_taken(number: int) -> bool:
    """Whether a process or thread of our pid namespace plainly has this number."""
    return number == 1 or os.path.exists(f"/proc/{number}")


def timens_text(clocks: Clocks) -> str:
    """timens_offsets with which a new time namespace shows the tree's clocks now as they were when it was frozen."""
    ours = proc.timens_offsets(proc.read(os.getpid(), "timens_offsets"))
    monotonic = clocks.monotonic_ns - time.clock_gettime_ns(time.CLOCK_MONOTONIC) + ours.monotonic_ns
    boottime = clocks.boottime_ns - time.clock_gettime_ns(time.CLOCK_BOOTTIME) + ours.boottime_ns
    return "".join(
        f"{name} {offset // 10**9} {offset % 10**9}\n"
        for name, offset in (("monotonic", monotonic), ("boottime", boottime))
    )


@contextmanager
def built_tree(
    checkpoint: Checkpoint,
    source: PageSource,
    listener: Listener,
    *,
    pager: Pager | None,
    handed: bool = False,
    pidns: Pidns,
    cgroup: str | None = None,
    users: Users | None = None,
    birth: Birth | None = None,
    known: Callable[[LazyTree], object] = lambda tree: None,
) -> Iterator[BuiltTree]:
    """Build the tree, stopped before its first instruction; killed on leaving unless it was released.

    `source` gives the pages that have to be there at once: all of them, unless `pager`, which is to be told of them by
    `lazy.introduce`, brings the others later, or the userfaultfds are to be `handed` to somebody who does. The tree is
    in a cgroup of its own, or in `cgroup` (a path as in /proc/PID/cgroup). Its files are opened with the rights of
    `users`, otherwise with ours. `birth` is from `expecting`, where there was time for that before. `known` is called
    as soon as it is known what will be needed to complete the tree.

    Raises RestoreError naming the step, PidTaken in pid namespace "host", ImageError, UsageError for `cgroup`, and
    whatever the kernel refuses.
    """
    clock = StepClock(listener, "restore: ")
    lazy = handed or pager is not None
    if lazy:
        demand_for_tasks()
    checkpoint = _without_parent(pages.arranged(checkpoint, lazy=lazy), listener)
    with ExitStack() as stack:
        label = checkpoint.root.vpid
        try:
            new = bool(birth and birth.nursery.new_pidns) or wants_new_pidns(pidns, _numbers(checkpoint))
            if birth is None or new > birth.nursery.new_pidns:
                birth = stack.enter_context(expecting(label, listener, new_pidns=new, cgroup=cgroup))
            clock.done("arrange")
            tree = stack.enter_context(
                _built(checkpoint, source, clock, listener, pager, handed, birth, users, known)
            )
        except PidTaken:  # also by somebody who came meanwhile, the nursery itself for one
            if pidns in ("host", "same"):
                raise
            birth = stack.enter_context(expecting(label, listener, new_pidns=True, cgroup=cgroup))
            tree = stack.enter_context(
                _built(checkpoint, source, clock, listener, pager, handed, birth, users, known)
            )
        except (OSError, OverflowError) as error:
            raise RestoreError(
                f"the kernel refused a part of it ({error})",
                where=f"tree of pid {checkpoint.root.vpid}",
                remedy="take the checkpoint again when images may be garbled; -v shows what it was",
            ) from error
        yield tree


@contextmanager
def expecting(label: int, listener: Listener, *, new_pidns: bool, cgroup: str | None) -> Iterator[Birth]:
    """A nursery for one tree, whose root's number in its own namespace is `label`; killed at the end unless it was let
    go with the tree. Raises RestoreError and UsageError for `cgroup`, HostLacks.
    """
    with nursery_in_group(cgroup, label, listener, pidns=new_pidns) as birth, _killed_at_end(birth.nursery):
        yield birth


@contextmanager
def ungrouped() -> Iterator[Birth]:
    """The same in a new pid namespace and in our own cgroups. Raises HostLacks."""
    with nursery(pidns=True) as made, _killed_at_end(made):
        yield Birth(made, (), Inherited.of(made))


@contextmanager
def _killed_at_end(nursery: Nursery) -> Iterator[None]:
    try:
        yield
    finally:
        if nursery.spare:
            _kill(nursery)


def _without_parent(checkpoint: Checkpoint, listener: Listener) -> Checkpoint:
    """The parent of a pid 1 is the thread that restores it, whose end must be no signal (PR_SET_PDEATHSIG)."""
    root = checkpoint.root
    if root.vpid != 1 or not any(thread.pdeath_signal for thread in root.threads):
        return checkpoint
    listener(
        Note("pid 1: is no longer told of its parent's death (PR_SET_PDEATHSIG): the parent stays behind")
    )
    threads = tuple(replace(thread, pdeath_signal=0) for thread in root.threads)
    return replace(checkpoint, tasks=(replace(root, threads=threads), *checkpoint.tasks[1:]))


@contextmanager
def _built(
    checkpoint: Checkpoint,
    source: PageSource,
    clock: StepClock,
    listener: Listener,
    pager: Pager | None,
    handed: bool,
    birth: Birth,
    users: Users | None,
    known: Callable[[LazyTree], object],
) -> Iterator[BuiltTree]:
    born = birth.nursery
    with ExitStack() as stack, _killed_at_end(born):
        offsets, is_root = timens_text(checkpoint.clocks), checkpoint.root.vpid == 1
        born.make_ready(_free_number(checkpoint), offsets, is_root=is_root)
        clock.done("nursery")
        maker = Maker(born, checkpoint, stack)
        sites = maker.make()
        clock.done("processes")
        hold = stack.enter_context(Hold(f"to_{born.pid}"))
        hold.add(flows_to_hold(checkpoint))  # nobody would answer these packets but with RST
        made = stack.enter_context(ExitStack())
        files, shared, sockets = made.enter_context(
            files_and_objects(checkpoint, born, maker, listener, users or Users())
        )
        clock.done("files")
        ranges = tuple(pages.lazy_ranges(checkpoint)) if handed or pager is not None else ()
        lazy = {r.vpid for r in ranges}
        for vpid, site in sites.items():  # one after the other: see Site.receive_later
            memory.move_in(site)
            memory.map_all(site, checkpoint, files, shared)
            if handed:
                pages.lend_userfaultfd(site)
            elif pager is not None and vpid in lazy:
                pages.keep_userfaultfd(site, pager)
            site.run()
            memory.check_vdso(site)
        objects.mark_removed(checkpoint)
        clock.done("memory map")
        userfaultfds = pages.register(sites, ranges, stack)
        if handed:
            pages.take_back(sites.values())
        pages.fill(sites, checkpoint, source, userfaultfds, shared)
        seal_memfds(checkpoint, shared)
        clock.done("eager pages")
        lazy_tree = _lazy_tree(checkpoint, birth, sites, ranges)
        known(lazy_tree)
        clock.done("identity")
        for site in sites.values():
            make_threads(site)
            if len(sites) > 1:  # one's descriptor may name another's thread (F_SETOWN_EX)
                site.run()
        for site in sites.values():
            descriptors.install(site, checkpoint, files)
            _set_paths(site, checkpoint, files)
            site.run()
            meet_threads(site, born)
        clock.done("threads")
        for site in sites.values():
            _give_state(site, birth.inherited, listener)
        sockets.fill_queues(files, {vpid: site.pid for vpid, site in sites.items()})
        clock.done("state")
        for site in reversed(sites.values()):  # a parent learns of its children's stops before its own end
            _finish(site, sites.get(site.task.ppid), checkpoint)
        clock.done("registers")
        yield BuiltTree(checkpoint, born, sites, userfaultfds, ranges, lazy_tree, sockets, made, hold)


@contextmanager
def files_and_objects(
    checkpoint: Checkpoint,
    birth: Nursery,
    maker: Maker,
    listener: Listener,
    users: Users,
) -> Iterator[tuple[Mapping[int, int], Mapping[int, int], MadeSockets]]:
    """Everything the tasks will open or map, as descriptors of ours: by OpenFile id and by SharedMemory id.

    The tasks that `maker` has made call what shows who called it. Ours are closed before the tree runs: a pipe end held
    by us would never let its reader see the end.
    """
    root = f"/proc/{birth.pid}/root"

    def open_path(path: str, flags: int, mode: int) -> int:
        return os.open(root + path, flags, mode)

    users.check_places(checkpoint, root)
    with (
        make_files(checkpoint, open_path=open_path, listener=listener, users=users) as made,
        objects.made(checkpoint, made.objects) as shared,
    ):
        files = dict(made.files)
        with make_sockets(checkpoint, files, root=root, maker=maker) as sockets:
            add_orphans(checkpoint, files)
            yield files, shared, sockets


def _free_number(checkpoint: Checkpoint) -> int:
    """A descriptor number that no task uses, for the socket that brings descriptors."""
    highest = max((d.fd for task in checkpoint.tasks for d in task.descriptors), default=0)
    most = max(_mapped(task.mm) for task in checkpoint.tasks if task.mm)
    return max(highest, most, TRANSPORT_FD - 1) + 1


def _mapped(mm: Mm) -> int:
    """How many files and objects its mappings may need at the same time, with its program."""
    return len({vma.file_id for vma in mm.vmas}) + len({vma.object_id for vma in mm.vmas}) + 1


def _set_paths(site: Site, checkpoint: Checkpoint, made: Mapping[int, int]) -> None:
    """With the next run: the last descriptors, and what is the process's as a whole."""
    task, bench = site.task, site.bench
    assert task.fs is not None
    cwd, root = numbers = descriptors.lowest_free(task, 2)
    site.receive_later([made[task.fs.cwd_id], made[task.fs.root_id]], numbers)
    keep_root = descriptors.is_our_root(checkpoint, task.fs.root_id)
    site.run_later(
        *state.fs_calls(task.fs, cwd, None if keep_root else root, bench),
        Call("close", (cwd,)),
        Call("close", (root,)),
        Call("close", (site.transport_fd,)),
        *descriptors.lock_calls(task, bench),
        *state.flag_calls(task),
        *state.timer_create_calls(task, bench),
        Call("set_tid_address", (task.leader.clear_child_tid,)),
    )


def _give_state(site: Site, inherited: Inherited, listener: Listener) -> None:
    """Everything but registers. Credentials come late: what precedes needs privileges."""
    task = site.task
    state.set_from_outside(task, site.pid, listener)
    for thread in task.threads:
        state.schedule(thread, site.threads[thread.tid].tid, inherited, listener)
    vectors.make_room(site)
    _run_in_threads(site, inherited)


def _run_in_threads(site: Site, inherited: Inherited) -> None:
    """The threads' own state, all threads at the same time, and what is left of the process's. Filters would forbid
    it: they are suspended.
    """
    task, bench = site.task, site.bench
    pairs = [(site.threads[thread.tid], thread) for thread in task.threads]
    if any(thread.seccomp_mode for thread in task.threads):
        options = ptrace.PTRACE_O_TRACESYSGOOD | ptrace.PTRACE_O_EXITKILL | ptrace.PTRACE_O_SUSPEND_SECCOMP
        for tracee, _ in pairs:
            tracee.set_options(options)
    shared = state.shared_filters(task.threads, inherited)
    if shared:
        common = task.leader.seccomp[:shared]
        bench.run(site.leader, list(state.filter_calls(common, bench, state.SECCOMP_FILTER_FLAG_TSYNC)))
    programs = [(t, list(state.thread_calls(thread, bench, inherited, shared))) for t, thread in pairs]
    assert task.mm is not None
    programs[0][1].extend(
        (
            *memory.lock_calls(task.mm.vmas),
            *state.signal_calls(task, bench),
            Call("prctl", (state.PR_SET_DUMPABLE, 1 if task.mm.dumpable == 1 else 0)),
        )
    )
    bench.run_all(programs)
    for tracee, thread in pairs:
        late = [*state.seccomp_calls(thread, bench, inherited), *state.pending_calls(task, thread, bench)]
        if late:
            bench.run(tracee, late)


def _finish(site: Site, parent: Site | None, checkpoint: Checkpoint) -> None:
    """Timers run, sleeps are resumed, the bench goes, who was stopped stops, and every thread gets its registers."""
    task = site.task
    start = list(state.timer_start_calls(task, site.bench))
    if start:
        site.run(*start)
    resumed = restarts.resume(site, checkpoint.clocks)
    _unmap_bench(site, task)
    if task.state is TaskState.STOPPED:
        stop(site, parent, checkpoint.tasks)
    ptrace.dress(
        [(site.threads[t.tid], resumed.get(t.tid, t.registers), t.xsave, t.blocked) for t in task.threads]
    )


def _unmap_bench(site: Site, task: Task) -> None:
    """The last remote call uses the vdso's own `syscall` instruction: nothing of ours is left."""
    start, length = memory.bench_range(site)
    at = _syscall_instruction(site, task)
    registers = site.leader.registers()
    site.leader.set_blocked(arch.MASK64)
    result = step(site.leader, arch.calling(registers, at, SYS["munmap"], (start, length)))
    if result != 0:
        raise RestoreError(
            f"could not unmap the bench: {os.strerror(-result)}", where=f"pid {task.vpid}", remedy="report it"
        )


def _syscall_instruction(site: Site, task: Task) -> int:
    assert task.mm is not None
    for vma in task.mm.vmas:
        if vma.kind is VmaKind.VDSO:
            at = site.memory.read(vma.start, vma.length).find(arch.SYSCALL_INSTRUCTION)
            if at >= 0:
                return vma.start + at
    raise RestoreError(
        "has no vdso to make the last call from", where=f"pid {task.vpid}", remedy="start it with one"
    )


def _kill(nursery: Nursery) -> None:
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
