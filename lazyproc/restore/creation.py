"""Making the processes and threads of a tree: clone3 with the original numbers, from the nursery downwards."""

from __future__ import annotations

import errno
import os
import resource
import signal
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from lazyproc.errors import PidTaken, RestoreError
from lazyproc.kernel import arch_x86_64 as arch
from lazyproc.kernel import proc
from lazyproc.kernel import sys as kernel
from lazyproc.kernel import tracee as ptrace
from lazyproc.kernel.arch_x86_64 import SYS
from lazyproc.kernel.nursery import STOP_MS, Nursery
from lazyproc.kernel.remote import ENDINGS, SYSCALL, Bench, Call
from lazyproc.kernel.tracee import WALL, Tracee
from lazyproc.model import Task, TaskState, TerminalMaster
from lazyproc.restore.plan import Dismiss, Exit, Fork, JoinGroup, NewSession, StandIn, creation_steps
from lazyproc.restore.site import Site, host_tids
from lazyproc.restore.terminals import bring_to_foreground, take

# include/uapi/linux/sched.h
CLONE_VM, CLONE_FS, CLONE_FILES, CLONE_SIGHAND, CLONE_PTRACE = 0x100, 0x200, 0x400, 0x800, 0x2000
CLONE_THREAD, CLONE_SYSVSEM, CLONE_CHILD_CLEARTID = 0x10000, 0x40000, 0x200000
THREAD_FLAGS = CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM | CLONE_PTRACE
SIG_IGN, SA_NOCLDSTOP = 1, 1  # of the kernel's struct sigaction
# flags pidfd child_tid parent_tid exit_signal stack size tls set_tid n cgroup
CLONE_ARGS = struct.Struct("<11Q")


def pending_signals(task: Task) -> set[int]:
    """The signals that wait for the task or one of its threads."""
    queues = (task.pending, *(thread.pending for thread in task.threads))
    return {struct.unpack_from("<i", info)[0] for queue in queues for info in queue}


def ending_for(task: Task) -> int:
    """The signal that ends the task's programs: none that is pending for it (see kernel/remote.py)."""
    pending = pending_signals(task)
    return next((sig for sig in ENDINGS if sig not in pending), signal.SIGURG)


def _clone_args(
    bench: Bench, flags: int, tid: int, *, exit_signal: int = 0, clear_tid: int = 0
) -> tuple[int, int]:
    set_tid = bench.place(struct.pack("<i", tid))
    flags |= CLONE_CHILD_CLEARTID if clear_tid else 0
    args = CLONE_ARGS.pack(flags, 0, clear_tid, 0, exit_signal, 0, 0, 0, set_tid, 1, 0)
    return bench.place(args), len(args)


def _check_made(number: int, result: int) -> None:
    """A number is also taken while a process group or session has it, though nothing in /proc shows it."""
    if result == -errno.EEXIST or (result == -errno.EINVAL and number >= proc.pid_max()):
        raise pid_taken(number)
    if result == -errno.EPERM:
        raise RestoreError(
            "only root may choose the number of a process (CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE)",
            where=f"pid {number}",
            remedy="run as root; in a container, privileged",
        )
    if result < 0:
        raise RestoreError(
            f"could not be created: {os.strerror(-result)}",
            where=f"pid {number}",
            remedy="look at the limits of processes (ulimit -u, pids.max)",
        )


def pid_taken(number: int) -> PidTaken:
    """What to say of a number that cannot be had."""
    limit = proc.pid_max()
    if number >= limit:
        return PidTaken(
            f"no process can have its number on this host (kernel.pid_max is {limit})",
            where=f"pid {number}",
            remedy="use --pidns auto or new, before Linux 6.14 sysctl kernel.pid_max=4194304",
        )
    return PidTaken(
        "its number is taken on this host", where=f"pid {number}", remedy="use --pidns auto or new"
    )


def _stand_in(vpid: int, member: int) -> Task:
    """A process that tells nobody of its end."""
    return Task(vpid, member, vpid, 0, TaskState.ALIVE, "", exit_signal=0)


class Maker:
    """Processes by number, as they come to be. `terminals` are those of sessions, with descriptors of ours of the
    masters. Everything it opens is closed by `stack`.
    """

    def __init__(
        self,
        nursery: Nursery,
        tasks: Sequence[Task],
        stack: ExitStack,
        terminals: Sequence[tuple[TerminalMaster, int]] = (),
    ) -> None:
        self.nursery = nursery
        self.tasks = {task.vpid: task for task in tasks}
        self.sites: dict[int, Site] = {}
        self._stack = stack
        self._terminals = {terminal.session: (terminal, fd) for terminal, fd in terminals}

    def make(self) -> dict[int, Site]:
        """All processes, each still a fork of the nursery, in their sessions and groups; zombies have ended."""
        for step in creation_steps(tuple(self.tasks.values())):
            match step:
                case Fork(vpid, parent):
                    self.sites[vpid] = self._fork(self.tasks[vpid], parent)
                case NewSession(vpid):
                    self.sites[vpid].run(Call("setsid"))
                    if vpid in self._terminals:
                        take(self.sites[vpid], self._terminals[vpid][1])
                case JoinGroup(vpid, pgid):
                    self.sites[vpid].run(Call("setpgid", (0, pgid)))
                case Exit(vpid, status):
                    self._exit(self.sites.pop(vpid), status)
                case StandIn(vpid, member):
                    self.sites[vpid] = self._fork(_stand_in(vpid, member), member)
                case Dismiss(vpid, member):
                    self._exit(self.sites.pop(vpid), 0)
                    self.sites[member].run(Call("wait4", (vpid, 0, WALL, 0)))
        for session, (terminal, fd) in self._terminals.items():
            self._bring_to_foreground(session, fd, terminal.foreground)
        return self.sites

    def _bring_to_foreground(self, session: int, terminal: int, group: int) -> None:
        """Also a group that has ended: who leads the session is about to take its terminal back."""
        if group in {task.pgid for task in self.tasks.values()}:
            bring_to_foreground(self.sites[session], terminal, group)
            return
        with self.standing_in(group, session) as site:
            site.run(Call("setpgid", (0, group)))
            bring_to_foreground(self.sites[session], terminal, group)

    @contextmanager
    def standing_in(self, vpid: int, parent: int = 0) -> Iterator[Site]:
        """A process with the number of one that has ended, for as long as it takes; a child of `parent`, else of the
        root. Raises PidTaken.
        """
        member = self.sites[parent] if parent else next(iter(self.sites.values()))
        site = self._fork(_stand_in(vpid, member.task.vpid), member.task.vpid)
        try:
            yield site
        finally:
            self._exit(site, 0)
            member.run(Call("wait4", (vpid, 0, WALL, 0)))

    def _fork(self, task: Task, parent: int) -> Site:
        if parent:
            tracee, bench = self.sites[parent].leader, self.sites[parent].bench
        else:
            tracee, bench = self.nursery.tracee, self.nursery.bench(self.nursery.memory, signal.SIGURG)
        if task.vpid == 1 or (self.nursery.sibling and not parent):
            return self._site(task, tracee)
        args = _clone_args(bench, CLONE_PTRACE, task.vpid, exit_signal=task.exit_signal)
        _check_made(task.vpid, *bench.run(tracee, [Call("clone3", args, may_fail=True)]))
        child = Tracee(self._host_pid(tracee.tid, task.vpid))
        child.wait_stop(STOP_MS)
        return self._site(task, child)

    def _host_pid(self, parent: int, vpid: int) -> int:
        """Our number of the child that `parent` has just made."""
        if number := self.nursery.number_here(vpid):
            return number
        for child in proc.children_of(parent, parent):
            if proc.status(proc.read(child, "status")).ns_pid[-1] == vpid:
                return child
        raise RestoreError("the child is not there", where=f"pid {vpid}", remedy="report it")

    def _site(self, task: Task, leader: Tracee) -> Site:
        pidfd = kernel.pidfd_open(leader.tid)
        self._stack.callback(os.close, pidfd)
        memory = self._stack.enter_context(ptrace.memory(leader.tid))
        bench = self.nursery.bench(memory, ending_for(task))
        threads = {task.vpid: leader}
        return Site(
            task, leader, pidfd, memory, bench, self.nursery.transport, self.nursery.transport_fd, threads
        )

    def _exit(self, site: Site, status: int) -> None:
        """End a process as the original ended. Once its tracer has waited for it, it is its parent's zombie."""
        leader, sig = site.leader, status & 0x7F
        if sig == signal.SIGKILL:  # needs no help, and ends a tracee in any stop
            os.kill(site.pid, sig)
        elif sig:
            resource.prlimit(site.pid, resource.RLIMIT_CORE, (0, 0))
            os.kill(site.pid, sig)
            leader.set_blocked(0)
            leader.cont()
            os.waitpid(site.pid, WALL)  # stopped with the signal, which is now delivered
            leader.cont(sig)
        else:
            stub = site.bench.code + SYSCALL
            call = (SYS["exit_group"], (status >> 8,))
            leader.set_registers(arch.calling(leader.registers(), stub, *call))
            leader.cont()
        os.waitpid(site.pid, WALL)
        if site.task.exit_signal:
            _swallow(self.sites[site.task.ppid], site.task.exit_signal)


def _swallow(parent: Site, sig: int) -> None:
    """The parent got this signal of its child long ago, in its former life."""
    parent.leader.set_blocked(arch.MASK64 & ~(1 << (sig - 1)))
    parent.leader.cont()
    _, status = os.waitpid(parent.pid, WALL)
    if not os.WIFSTOPPED(status) or status >> 8 != sig:
        raise RestoreError(
            f"was to take signal {sig} of its child and has wait status {status:#x}",
            where=f"pid {parent.task.vpid}",
            remedy="report it",
        )


def stop(site: Site, parent: Site | None, tasks: Sequence[Task]) -> None:
    """Stop a process as it was stopped, for its parent (None: not in the tree) to see.

    No thread executes an instruction: the leader takes the signal before any other goes on, so that each one has to
    stop with it on its way out of the kernel (do_signal_stop, kernel/signal.c).
    """
    number = stop_signal(site.task, tasks)
    for tracee in site.threads.values():
        tracee.set_blocked(arch.MASK64)
    site.leader.set_blocked(arch.MASK64 & ~(1 << (number - 1)))
    os.kill(site.pid, number)
    for thread in site.task.threads:
        tracee = site.threads[thread.tid]
        tracee.cont()
        tracee.wait_stop(STOP_MS)
    if parent is not None and hears_of_stops(parent.task):
        _swallow(parent, signal.SIGCHLD)


def hears_of_stops(parent: Task) -> bool:
    """Whether the stop of a child sends it a SIGCHLD (do_notify_parent_cldstop, kernel/signal.c) that is not pending
    already. Pure.
    """
    deaf = any(
        action.signal == signal.SIGCHLD and (action.handler == SIG_IGN or action.flags & SA_NOCLDSTOP)
        for action in parent.sigactions
    )
    return not deaf and signal.SIGCHLD not in pending_signals(parent)


def stop_signal(task: Task, tasks: Sequence[Task]) -> int:
    """That which had stopped it, where that is sure to do so again; else SIGSTOP. Pure.

    The kernel drops the others when a handler is set, or in an orphaned process group (get_signal, kernel/signal.c),
    which it is not while a member has its parent in another group of the session.
    """
    parents = {each.vpid: each for each in tasks}
    caught = any(action.signal == task.stop_signal and action.handler for action in task.sigactions)
    watched = any(
        member.pgid == task.pgid != parents[member.ppid].pgid and member.sid == parents[member.ppid].sid
        for member in tasks
        if member.ppid in parents and member.state is not TaskState.ZOMBIE
    )
    return task.stop_signal if task.stop_signal and watched and not caught else signal.SIGSTOP


def make_threads(site: Site) -> None:
    """The other threads of a process, each stopped before its first instruction; with the next run."""
    others = site.task.threads[1:]

    def check(results: list[int]) -> None:
        for thread, result in zip(others, results, strict=True):
            _check_made(thread.tid, result)

    calls = (
        Call(
            "clone3",
            _clone_args(site.bench, THREAD_FLAGS, thread.tid, clear_tid=thread.clear_child_tid),
            may_fail=True,
        )
        for thread in others
    )
    site.run_later(*calls, check=check)


def meet_threads(site: Site, nursery: Nursery) -> None:
    """The threads that were made are known to the site, and stopped."""
    tids = [thread.tid for thread in site.task.threads[1:]]
    ours = [nursery.number_here(tid) for tid in tids]
    known = dict(zip(tids, ours, strict=True)) if all(ours) else host_tids(site.pid, tids)
    for tid in tids:
        tracee = site.threads[tid] = Tracee(known[tid])
        tracee.wait_stop(STOP_MS)
