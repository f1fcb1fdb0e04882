"""What can be seen of a process tree from outside while it runs. Nothing is stopped, nothing is decided here."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cmp_to_key, partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from lazyproc.dump.asleep import still_asleep, why_asleep
from lazyproc.dump.supervisor import Supervisor, supervisor_of
from lazyproc.dump.walk import tree_of
from lazyproc.errors import LazyprocError, NoSuchProcess, PermissionDenied, UsageError
from lazyproc.facts import dataclass
from lazyproc.kernel import proc
from lazyproc.kernel.cgroup import Hierarchy, frozen_group, hierarchies
from lazyproc.kernel.park import looks_parked
from lazyproc.kernel.sys import KCMP_FILES, KCMP_FS, KCMP_SIGHAND, KCMP_VM, kcmp
from lazyproc.kernel.sysvipc import LastUse, last_uses

SHARED = {KCMP_VM: "its memory (CLONE_VM)", KCMP_FS: "its directories (CLONE_FS)",
          KCMP_SIGHAND: "its signal handlers (CLONE_SIGHAND)"}  # fmt: skip
APART = {KCMP_FS: "directories (CLONE_FS)", KCMP_FILES: "descriptor table (CLONE_FILES)"}
CAP_SYS_PTRACE = 19
PF_EXITING = 0x4
PF_KTHREAD = 0x200000  # include/linux/sched.h
DISK_SLEEP_S = 1.0  # I/O ends within this, mostly
EI_CLASS = 4
CORE = "/lazyproc/kernel/_core."  # of whoever of us works on processes


@dataclass(frozen=True, slots=True)
class ThreadFacts:
    """One thread, by its number in our pid namespace."""

    tid: int
    vtid: int  # in its own
    tracer: int  # pid, 0 nobody
    namespaces: Mapping[str, int]
    apart: tuple[str, ...]  # what it does not share with its process's first thread
    parked: bool = False  # it stands in our code, for a session that is not over


@dataclass(frozen=True, slots=True)
class ProcessFacts:
    """One process of the tree. A zombie and a kernel thread have no mappings and no namespaces."""

    stat: proc.Stat
    vpid: int
    kernel_thread: bool
    locked_kib: int  # VmLck, before `smaps` was read
    smaps: tuple[proc.SmapsEntry, ...]
    threads: tuple[ThreadFacts, ...]  # the first one first
    namespaces: Mapping[str, int]
    elf_class: int  # 1: 32 bits, 2: 64 bits, 0: unknown
    limits: tuple[tuple[int, int], ...]  # RLIMIT_*, soft and hard
    timers: int  # POSIX timers
    frozen_group: str = ""  # the directory of a cgroup that keeps it from running

    @property
    def pid(self) -> int:
        return self.stat.pid

    @property
    def zombie(self) -> bool:
        return self.stat.state == "Z"

    @property
    def alive(self) -> bool:
        return not self.zombie and not self.kernel_thread

    @property
    def ours(self) -> bool:
        """A command or a helper of lazyproc. A program that uses it as a library has a name of its own."""
        named = self.stat.comm == "lazyproc" or self.stat.comm.startswith("lazyproc-")
        return named and any(CORE in each.entry.path for each in self.smaps)


class Sharing(NamedTuple):
    """Two processes with one kernel object that fork(2) would have copied."""

    pid: int
    other: int
    what: str


@dataclass(frozen=True, slots=True)
class TreeFacts:
    """A tree, parents before children, and who looks at it."""

    processes: tuple[ProcessFacts, ...]
    our_pid: int
    our_namespaces: Mapping[str, int]
    sharing: tuple[Sharing, ...]
    ipc_uses: tuple[LastUse, ...]  # of System V IPC, by processes of the tree
    supervisor: Supervisor  # of the root
    stuck: Mapping[int, str]  # why a thread does not take signals, by its number
    shared_outside: tuple[Sharing, ...] = ()  # memory that a process which is not of the tree maps too

    @property
    def root(self) -> ProcessFacts:
        return self.processes[0]


def survey(root: int) -> TreeFacts:
    """Look at the tree under `root`. Processes and threads that end meanwhile are left out.

    Raises NoSuchProcess for the root itself, UsageError when it is a thread's number, PermissionDenied for a process
    that we may not trace.
    """
    _demand_process(root)
    processes, known = [], hierarchies()
    for pid in tree_of(root):
        try:
            processes.append(_process(pid, known))
        except NoSuchProcess:
            if pid == root:
                raise
    alive = [process.pid for process in processes if process.alive]
    uses = {use for use in last_uses() if any(use.pid == process.pid for process in processes)}
    return TreeFacts(
        processes=tuple(processes),
        our_pid=os.getpid(),
        our_namespaces=proc.namespaces(os.getpid()),
        sharing=tuple(_shared(alive)),
        ipc_uses=tuple(sorted(uses)),
        supervisor=supervisor_of(root, processes[0].stat.ppid),
        stuck=dict(_stuck(alive)),
        shared_outside=tuple(_shared_outside(processes)),
    )


def _demand_process(pid: int) -> None:
    try:
        status = proc.status(proc.read(pid, "status"))
    except NoSuchProcess:
        raise NoSuchProcess(
            "there is no such process",
            where=f"pid {pid}",
            remedy="check the number, and in which pid namespace it counts" + _elsewhere(pid),
        ) from None
    if status.tgid != pid:
        raise UsageError("is a thread", where=f"pid {pid}", remedy=f"name its process, {status.tgid}")


def _process(pid: int, known: Sequence[Hierarchy]) -> ProcessFacts:
    """NoSuchProcess also for one that ends while it is looked at: it shows what it has no longer."""
    try:
        facts = _facts(pid, known)
    except (
        PermissionDenied
    ):  # its namespaces, when it has none any more (proc_ns_get_link, fs/proc/namespaces.c)
        if not _is_ending(pid):
            raise
    else:
        if not (facts.alive and _is_ending(pid)):
            return facts
    raise NoSuchProcess("is ending", where=f"pid {pid}")


def _is_ending(pid: int) -> bool:
    return bool(proc.stat(proc.read(pid, "stat")).flags & PF_EXITING)


def _facts(pid: int, known: Sequence[Hierarchy]) -> ProcessFacts:
    stat, status = proc.stat(proc.read(pid, "stat")), proc.status(proc.read(pid, "status"))
    kernel_thread = status.kernel_thread or bool(stat.flags & PF_KTHREAD)
    alive = stat.state != "Z" and not kernel_thread
    if alive:
        _demand_access(pid, status)
    return ProcessFacts(
        stat=stat,
        vpid=status.ns_pid[-1],
        kernel_thread=kernel_thread,
        locked_kib=status.locked_kib,
        smaps=proc.smaps(proc.read(pid, "smaps")) if alive else (),
        threads=tuple(_threads(pid)) if alive else (),
        namespaces=proc.namespaces(pid) if alive else {},
        elf_class=_elf_class(pid) if alive else 0,
        limits=proc.limits(proc.read(pid, "limits")) if alive else (),
        timers=len(proc.timers(proc.read(pid, "timers"))) if alive else 0,
        frozen_group=frozen_group(proc.cgroup(proc.read(pid, "cgroup")), known) if alive else "",
    )


def _demand_access(pid: int, status: proc.Status) -> None:
    """Opening mem takes what ptrace(2) takes (fs/proc/base.c, PTRACE_MODE_ATTACH), Yama's opinion included."""
    try:
        os.close(os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM):
            raise NoSuchProcess("it has ended", where=f"pid {pid}") from error
        raise _denied(pid, status) from error


def _denied(pid: int, status: proc.Status) -> PermissionDenied:
    """With the capability it is not the user (__ptrace_may_access, kernel/ptrace.c)."""
    why = f"belongs to uid {status.uid.real} and may not be traced by uid {os.geteuid()}"
    remedy = "run lazyproc as root (CAP_SYS_PTRACE)"
    if proc.status(proc.read(os.getpid(), "status")).cap_effective >> CAP_SYS_PTRACE & 1:
        why += ", CAP_SYS_PTRACE or not"
        remedy = (
            "run lazyproc in the user namespace of the process, or above it, and where no security module (SELinux, "
            "AppArmor, a BPF program) forbids it"
        )
    return PermissionDenied(why, where=f"pid {pid}", remedy=remedy + _yama())


def _elsewhere(pid: int) -> str:
    """Who looks into a container reads the numbers that count there."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(NoSuchProcess):
            numbers = proc.status(proc.read(int(name), "status")).ns_pid
            if len(numbers) > 1 and numbers[-1] == pid:
                found.append(name)
    return f": in another one it is pid {' or '.join(found)} here" if found else ""


def _yama() -> str:
    try:
        scope = Path("/proc/sys/kernel/yama/ptrace_scope").read_text().strip()
    except OSError:
        return ""
    return f"; kernel.yama.ptrace_scope is {scope}" if scope != "0" else ""


def _threads(pid: int) -> Iterator[ThreadFacts]:
    for tid in proc.task_ids(pid):
        with suppress(NoSuchProcess, ProcessLookupError):
            status = proc.status(proc.read(pid, f"task/{tid}/status"))
            yield ThreadFacts(
                tid=tid,
                vtid=status.ns_pid[-1],
                tracer=status.tracer_pid,
                namespaces=proc.namespaces(tid),
                apart=tuple(words for kind, words in APART.items() if tid != pid and kcmp(pid, tid, kind)),
                parked=looks_parked(pid, status.sig_blocked),
            )


def _elf_class(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/exe", "rb") as program:
            return program.read(EI_CLASS + 1)[EI_CLASS]
    except (OSError, IndexError):
        return 0


def _stuck(pids: Iterable[int]) -> Iterator[tuple[int, str]]:
    for pid, tid in still_asleep(pids, DISK_SLEEP_S):
        yield tid, why_asleep(pid, tid)


def _shared(pids: Sequence[int]) -> Iterator[Sharing]:
    """kcmp(2) gives an order of kernel objects: sorted by it, those who share one stand side by side."""
    for kind, words in SHARED.items():
        ordered = sorted(pids, key=cmp_to_key(partial(_compare, kind)))
        for one, other in pairwise(ordered):
            if _compare(kind, one, other) == 0:
                yield Sharing(max(one, other), min(one, other), words)


# Memory that has no path: the last columns of a line of maps.
_OBJECT = re.compile(
    rb"s [0-9a-f]+ ([0-9a-f]+):([0-9a-f]+) (\d+) +(?:/dev/zero|/memfd:.*) \(deleted\)$", re.MULTILINE
)


def _shared_outside(processes: Sequence[ProcessFacts]) -> Iterator[Sharing]:
    """Each process that is not of the tree once, whatever it shares; but for those that we may not look at."""
    ours = {
        (*each.dev, each.inode): (process.pid, each) for process in processes for each in _objects(process)
    }
    known = {process.pid for process in processes}
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()) if ours else ():
        if pid not in known:
            with suppress(LazyprocError):
                theirs = _OBJECT.findall(proc.read(pid, "maps"))
                keys = ((int(major, 16), int(minor, 16), int(inode)) for major, minor, inode in theirs)
                if found := next((ours[key] for key in keys if key in ours), None):
                    yield Sharing(found[0], pid, f"memory at {found[1].start:#x} ({found[1].path})")


def _objects(process: ProcessFacts) -> Iterator[proc.MapsEntry]:
    for each in process.smaps:
        entry = each.entry
        if entry.perms[3] == "s" and entry.deleted and entry.path.startswith(("/dev/zero", "/memfd:")):
            yield entry


def _compare(kind: int, one: int, other: int) -> int:
    try:
        return (0, -1, 1)[kcmp(one, other, kind)]
    except ProcessLookupError:
        return one - other
