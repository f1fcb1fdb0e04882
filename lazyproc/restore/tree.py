"""The order of a restore on one screen: a checkpoint becomes a stopped tree, and the stopped tree runs.

Everything is driven from outside by remote calls; no code of ours stays in a restored process. Until `outlive_us`
every process is a tracee with PTRACE_O_EXITKILL, so a failure, or our death, leaves nothing half-built behind.
"""

from __future__ import annotations

import errno
import os
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice
from types import MappingProxyType
from typing import Literal

from lazyproc.errors import NoSuchProcess, PidTaken, RestoreError, TraceeError
from lazyproc.events import Listener, Note
from lazyproc.facts import dataclass, field, replace
from lazyproc.images.forecast import Forecast
from lazyproc.kernel import arch_x86_64 as arch
from lazyproc.kernel import proc
from lazyproc.kernel import tracee as ptrace
from lazyproc.kernel.arch_x86_64 import SYS
from lazyproc.kernel.netfilter import DUMPED, Hold, release_session
from lazyproc.kernel.nursery import CLONE_NEWTIME, Nursery, nursery
from lazyproc.kernel.remote import Call, step
from lazyproc.model import Checkpoint, Clocks, Task, TaskState, VmaKind
from lazyproc.pages import PageSource
from lazyproc.restore import descriptors, memory, objects, pages, restarts, state, vectors
from lazyproc.restore.creation import make_threads, meet_threads, stop
from lazyproc.restore.epolls import add_orphans
from lazyproc.restore.files import make_files
from lazyproc.restore.given import stand_ins
from lazyproc.restore.groundwork import Groundwork, begun, kill, killed_at_end, opener
from lazyproc.restore.groups import Birth, nursery_in_group
from lazyproc.restore.inherited import Inherited
from lazyproc.restore.lazytree import LazyTask, LazyTree
from lazyproc.restore.limits import demand_limits
from lazyproc.restore.locks import TreeLocks, take_locks
from lazyproc.restore.memfds import seal_memfds
from lazyproc.restore.site import Site
from lazyproc.restore.sockets import MadeSockets, flows_to_hold, make_sockets
from lazyproc.restore.terminals import close_to_others
from lazyproc.restore.users import Users
from lazyproc.steps import Steps
from lazyproc.uffd.device import demand_for_tasks
from lazyproc.uffd.pager import Pager

NONE_GIVEN: Mapping[str, int] = MappingProxyType({})
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
    locks: TreeLocks
    _sockets: MadeSockets
    _made: ExitStack  # our descriptors of everything the tasks opened
    _hold: Hold
    released: bool = field(default=False)

    @property
    def root_pid(self) -> int:
        return self.sites[self.checkpoint.root.vpid].pid

    def demand_there(self) -> None:
        """Raises NoSuchProcess when somebody has killed a process of it, as the kernel does for want of memory."""
        for site in self.sites.values():
            for tracee in islice(site.threads.values(), 1):
                if not tracee.is_stopped():
                    raise NoSuchProcess("was killed before it ran", where=f"pid {site.pid}")

    def outlive_us(self) -> None:
        """From here on the tree is never killed for our sake: whatever becomes of us, it runs. The nursery goes first,
        as its end would be that of its pid namespace.
        """
        if self.nursery.pid != self.root_pid:
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
            if self.nursery.pid != self.root_pid:
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
    """Whether a tree with these numbers gets a pid namespace: also when one of them is 1, or cannot be had here."""
    if pidns == "same":
        return 1 in numbers
    if pidns != "auto":
        return pidns == "new"
    limit = proc.pid_max()
    return any(number >= limit or is_taken(number) for number in numbers)


def _numbers(checkpoint: Checkpoint) -> Iterator[int]:
    for task in checkpoint.tasks:
        yield task.vpid
        yield from (thread.tid for thread in task.threads[1:])


def is_taken(number: int) -> bool:
    """Whether a process or thread of our pid namespace plainly has this number."""
    return number == 1 or os.path.exists(f"/proc/{number}")


def timens_text(clocks: Clocks) -> str:
    """timens_offsets with which a new time namespace shows the tree's clocks now as they were when it was described."""
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
    ground: Groundwork | None = None,
    steps: Steps | None = None,
    known: Callable[[LazyTree], object] = lambda tree: None,
    given: Mapping[str, int] = NONE_GIVEN,
    sibling: bool = False,
    root: str | None = None,
    awaits_locks: bool = False,
) -> Iterator[BuiltTree]:
    """Build the tree, stopped before its first instruction; killed on leaving unless it was released.

    `source` gives the pages that have to be there at once: all of them, unless `pager`, which is to be told of them by
    `lazy.introduce`, brings the others later, or the userfaultfds are to be `handed` to somebody who does. The tree is
    in a cgroup of its own, or in `cgroup` (a path as in /proc/PID/cgroup). Its files are opened with the rights of
    `users`, otherwise with ours. Where there was time for that before, `birth` is from `expecting`, and `ground` was
    laid in it. `known` is called as soon as it is known what will be needed to complete the tree. `steps` are those of
    a larger piece of work. Of the `given` descriptors each takes the place of what has its name (lazyproc/outside.py).
    The root of a `sibling` of ours is a child of our parent, and nobody reaps it for that.
    With `root` its root directory is that one. Who `awaits_locks` that somebody else has takes them before it runs.

    Raises RestoreError naming the step, PidTaken in pid namespace "host", ImageError, UsageError for `cgroup`, and
    whatever the kernel refuses.
    """
    steps = steps or Steps(listener, "restore: ")
    lazy = handed or pager is not None
    if lazy:
        demand_for_tasks()
    checkpoint = _without_parent(pages.arranged(checkpoint, lazy=lazy), listener)
    with ExitStack() as stack:
        try:
            ground = ground and _if_it_suits(ground, checkpoint, listener)
            if ground is None:
                birth = _birth(birth, checkpoint, listener, pidns, cgroup, stack, sibling=sibling, root=root)
                ground = stack.enter_context(begun(Forecast.of(checkpoint), birth, pager, handed=handed))
            steps.done("arrange")
            tree = stack.enter_context(
                _built(checkpoint, source, steps, listener, ground, users, known, given)
            )
        except PidTaken:  # also by somebody who came meanwhile, the nursery itself for one
            if pidns in ("host", "same"):
                raise
            label = checkpoint.root.vpid
            birth = stack.enter_context(expecting(label, listener, new_pidns=True, cgroup=cgroup, root=root))
            ground = stack.enter_context(begun(Forecast.of(checkpoint), birth, pager, handed=handed))
            tree = stack.enter_context(
                _built(checkpoint, source, steps, listener, ground, users, known, given)
            )
        except (TraceeError, RestoreError):
            demand_limits(checkpoint)
            raise
        except (OSError, OverflowError, struct.error) as error:
            raise _refused(error, checkpoint) from error
        if not awaits_locks:
            tree.locks.demand_taken()
        yield tree


def _refused(error: Exception, checkpoint: Checkpoint) -> RestoreError:
    """By the kernel, or by the arguments of a call. Raises RestoreError for a limit that is too low."""
    demand_limits(checkpoint)
    if isinstance(error, OSError) and error.errno == errno.EMFILE:
        remedy = "raise the hard limit of descriptors (RLIMIT_NOFILE) of who restores or receives it"
    else:
        remedy = "take the checkpoint again when images may be garbled; -v shows what it was"
    return RestoreError(
        f"the kernel refused a part of it ({error})",
        where=f"tree of pid {checkpoint.root.vpid}",
        remedy=remedy,
    )


def _if_it_suits(ground: Groundwork, checkpoint: Checkpoint, listener: Listener) -> Groundwork | None:
    """What was laid for a tree that was foreseen; when it is another one it is killed."""
    if ground.suits(checkpoint):
        return ground
    listener(Note("the tree is another than was foreseen: what was laid for it is of no use"))
    kill(ground.birth.nursery)
    return None


def _birth(
    birth: Birth | None,
    checkpoint: Checkpoint,
    listener: Listener,
    pidns: Pidns,
    cgroup: str | None,
    stack: ExitStack,
    *,
    sibling: bool,
    root: str | None,
) -> Birth:
    """The nursery that waits, or another one where that is gone, or a number is taken by now."""
    spare = birth if birth is not None and birth.nursery.spare else None
    new = bool(spare and spare.nursery.new_pidns) or wants_new_pidns(pidns, _numbers(checkpoint))
    if spare is not None and new == spare.nursery.new_pidns:
        return spare
    label = checkpoint.root.vpid
    return stack.enter_context(
        expecting(label, listener, new_pidns=new, cgroup=cgroup, sibling=label if sibling else 0, root=root)
    )


@contextmanager
def expecting(
    label: int,
    listener: Listener,
    *,
    new_pidns: bool,
    cgroup: str | None,
    sibling: int = 0,
    root: str | None = None,
) -> Iterator[Birth]:
    """A nursery for one tree, whose root's number in its own namespace is `label`; killed at the end unless it was let
    go with the tree. Raises RestoreError and UsageError for `cgroup`, HostLacks.
    """
    group = nursery_in_group(cgroup, label, listener, pidns=new_pidns, sibling=sibling)
    with group as birth, killed_at_end(birth.nursery):
        if root is not None:
            birth.nursery.change_root(root)
        yield birth


@contextmanager
def ungrouped() -> Iterator[Birth]:
    """The same in a new pid namespace and in our own cgroups. Raises HostLacks."""
    with nursery(pidns=True) as made, killed_at_end(made):
        yield Birth(made, (), Inherited.of(made))


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
    steps: Steps,
    listener: Listener,
    ground: Groundwork,
    users: Users | None,
    known: Callable[[LazyTree], object],
    given: Mapping[str, int],
) -> Iterator[BuiltTree]:
    born, sites = ground.birth.nursery, ground.sites
    with ExitStack() as stack, killed_at_end(born):
        born.set_clocks(timens_text(checkpoint.clocks))
        ground.adopt(checkpoint)
        steps.done("processes")
        hold = stack.enter_context(Hold(f"to_{born.pid}"))
        hold.add(flows_to_hold(checkpoint))  # nobody would answer these packets but with RST
        made = stack.enter_context(ExitStack())
        made.enter_context(ground.masters.pop_all())
        files, shared, sockets = made.enter_context(
            files_and_objects(checkpoint, ground, listener, users or Users(), given)
        )
        steps.done("files")
        ground.map_memory(checkpoint.shared, files, shared)
        objects.mark_removed(checkpoint)
        steps.done("memory map")
        pages.fill(sites, checkpoint, source, ground.userfaultfds, shared)
        seal_memfds(checkpoint, shared)
        steps.done("eager pages")
        ranges = [each for lazy in ground.ranges.values() for each in lazy]
        lazy_tree = _lazy_tree(checkpoint, ground.birth, sites, ranges)
        known(lazy_tree)
        steps.done("identity")
        _give_threads(ground, checkpoint, files)
        steps.done("threads")
        for site in sites.values():
            _give_state(site, ground.birth.inherited, listener)
        sockets.fill_queues(files, {vpid: site.pid for vpid, site in sites.items()})
        steps.done("state")
        for site in reversed([*sites.values()]):  # a parent learns of its children's stops before its own end
            _finish(site, sites.get(site.task.ppid), checkpoint)
        steps.done("registers")
        locks = TreeLocks(sites, checkpoint.files)
        fds = ground.userfaultfds
        yield BuiltTree(checkpoint, born, sites, fds, ranges, lazy_tree, locks, sockets, made, hold)


def _give_threads(ground: Groundwork, checkpoint: Checkpoint, files: Mapping[int, int]) -> None:
    """Clocks, which only who has one thread can be given; threads, descriptors, paths."""
    sites = ground.sites.values()
    for site in sites:
        assert site.task.mm is not None
        site.receive_later([ground.clocks], [0])
        site.run_later(Call("setns", (0, CLONE_NEWTIME)), Call("close", (0,)))
        memory.set_fields(site, files[site.task.mm.exe_id])
        make_threads(site)
        if len(sites) > 1:  # one's descriptor may name another's thread (F_SETOWN_EX)
            site.run()
    for site in sites:
        descriptors.install(site, checkpoint, files)
        _set_paths(site, checkpoint, files)
        site.run()
        meet_threads(site, ground.birth.nursery)
        for tid, timers in state.timer_makers(site.task).items():
            if tid != site.task.vpid:
                site.bench.run(site.threads[tid], list(state.timer_create_calls(timers, site.bench)))


@contextmanager
def files_and_objects(
    checkpoint: Checkpoint, ground: Groundwork, listener: Listener, users: Users, given: Mapping[str, int]
) -> Iterator[tuple[Mapping[int, int], Mapping[int, int], MadeSockets]]:
    """Everything the tasks will open or map, as descriptors of ours: by OpenFile id and by SharedMemory id.

    The tasks call what shows who called it. Ours are closed before the tree runs: a pipe end held by us would never let
    its reader see the end.
    """
    nursery = ground.birth.nursery
    open_path = opener(nursery)
    users.check_places(checkpoint, f"/proc/{nursery.pid}/root")
    with (
        stand_ins(checkpoint, given, listener) as there,
        make_files(
            checkpoint,
            open_path=open_path,
            listener=listener,
            users=users,
            made={**ground.files, **there},
        ) as made,
        objects.made(checkpoint, made.objects) as shared,
    ):
        files = dict(made.files)
        with make_sockets(checkpoint, files, open_path=open_path, maker=ground.maker) as sockets:
            add_orphans(checkpoint, files)
            close_to_others(checkpoint, files)
            yield files, shared, sockets


def _set_paths(site: Site, checkpoint: Checkpoint, made: Mapping[int, int]) -> None:
    """With the next run: the last descriptors, and what is the process's as a whole."""
    task, bench = site.task, site.bench
    assert task.fs is not None
    cwd, root = numbers = descriptors.lowest_free(site, 2)
    site.receive_later([made[task.fs.cwd_id], made[task.fs.root_id]], numbers)
    keep_root = descriptors.is_our_root(checkpoint, task.fs.root_id)
    site.run_later(
        *state.fs_calls(task.fs, cwd, None if keep_root else root, bench),
        Call("close", (cwd,)),
        Call("close", (root,)),
        Call("close", (site.transport_fd,)),
    )
    take_locks(site, checkpoint.files)
    site.run_later(
        *state.flag_calls(task),
        *state.timer_create_calls(state.timer_makers(task)[task.vpid], bench),
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
    """The threads' own state, all but the leader's at the same time, then what is left of the process's. Filters would
    forbid it: they are suspended.
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
    assert task.mm is not None
    (leader, first), *others = pairs
    if others:
        bench.run_all(
            [(t, list(state.thread_calls(thread, bench, inherited, shared))) for t, thread in others]
        )
    program = [
        *memory.last_calls(task.mm),
        *state.thread_calls(first, bench, inherited, shared),
        *state.signal_calls(task, bench),
        Call("prctl", (state.PR_SET_DUMPABLE, 1 if task.mm.dumpable == 1 else 0)),
        *state.late_calls(task, first, bench, inherited),
    ]
    bench.run(leader, program)
    for tracee, thread in others:
        late = list(state.late_calls(task, thread, bench, inherited))
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
    dressed = zip(task.threads, vectors.areas(task), strict=True)
    ptrace.dress(
        [(site.threads[t.tid], resumed.get(t.tid, t.registers), area, t.blocked) for t, area in dressed]
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
