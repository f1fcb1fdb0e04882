"""What would stop a dump, said before anything is stopped: which process, what of it, why, and the way out.

Reading (survey.py) and deciding are apart: the decisions here are pure functions of what was seen.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress

from lazyproc.dump import aio
from lazyproc.dump.apart import OUTSIDE, of_the_first
from lazyproc.dump.copies import bytes_of_copies
from lazyproc.dump.descriptors import look_at_descriptors
from lazyproc.dump.guests import point_to_guests, qemus_of
from lazyproc.dump.memory import has_guards, lazy_bytes, refused_mappings
from lazyproc.dump.needs import limits_of, needs_of, objects_of
from lazyproc.dump.permits import MOVED, Permits
from lazyproc.dump.registry import Refused, Registry, TaskRef
from lazyproc.dump.room import shortages
from lazyproc.dump.space import NOTHING, Seen, Space, space_before
from lazyproc.dump.supervisor import warnings
from lazyproc.dump.survey import ProcessFacts, ThreadFacts, TreeFacts, survey
from lazyproc.errors import CannotBeDone, NoSuchProcess, Obstacle, TraceeError
from lazyproc.events import Listener, Note, ignore
from lazyproc.facts import dataclass
from lazyproc.kernel import host, proc, tracee
from lazyproc.kernel.sys import pidfd_open
from lazyproc.needs import FeatureNeed, Wanted

SCHED_DEADLINE = 6
LOOKS = 3
LOOK_AGAIN_S = 0.02
ELF_32 = 1
# Namespaces in which a tree may live without being moved with them; of pid and time the dump takes care.
BORROWED = ("mnt", "net", "ipc", "uts", "cgroup")
FOR_CHILDREN = "_for_children"


def explain(
    pid: int, *, tcp_close: bool = False, permits: Permits = MOVED, listener: Listener = ignore
) -> tuple[Obstacle, ...]:
    """Everything that would stop a checkpoint or a move of the tree under `pid`; empty when nothing would.

    It only reads, within milliseconds, and the tree runs on: what a process does afterwards is not in it. What the
    user should know and nothing can be done about goes to `listener` as Note. Raises NoSuchProcess, UsageError (the
    number of a thread), PermissionDenied, HostLacks.
    """
    return examine(pid, tcp_close=tcp_close, permits=permits, listener=listener).obstacles


@dataclass(frozen=True, slots=True)
class Examined:
    """What a look at a running tree has shown: what stands in its way, and what it needs elsewhere."""

    obstacles: tuple[Obstacle, ...]
    wanted: tuple[Wanted, ...]
    smaps: Mapping[int, tuple[proc.SmapsEntry, ...]]  # by pid
    seen: Seen


def examine(
    pid: int, *, tcp_close: bool = False, permits: Permits = MOVED, listener: Listener = ignore
) -> Examined:
    """See `explain`."""
    if not permits.first and (found := tuple(of_the_first(pid))):
        return Examined(found, (), {}, NOTHING)
    facts = survey(pid)
    if (
        facts.root.ours and facts.root.pid != facts.our_pid
    ):  # whatever else there is to say of it helps nobody
        return Examined(tuple(_of_process(facts.root, facts)), (), {}, NOTHING)
    host.pagemap_scan()
    host.map_files()
    for text in notes(facts):
        listener(Note(text))
    alive = {process.pid: process for process in facts.processes if process.alive}
    guarded = frozenset(_guarded(alive.values()))
    of_resources, wanted, seen = _resources(facts, tcp_close, permits, guarded)
    guards = tuple(Wanted(FeatureNeed("guard regions"), pid, "process") for pid in sorted(guarded)[:1])
    smaps = {pid: process.smaps for pid, process in alive.items()}
    of_tree = [*obstacles(facts)]
    of_tree += () if permits.led_from_outside else _led_from_outside(facts)
    of_tree += () if permits.private_limit is None else too_much_private(facts, permits.private_limit)
    of_tree += () if permits.outside else _shared_outside(facts)
    of_tree += () if permits.net_apart else _net_apart(facts)
    found = point_to_guests((*of_tree, *of_resources), qemus_of(alive))
    return Examined(found, (*wanted, *guards), smaps, seen)


def examine_again(
    pid: int, *, tcp_close: bool = False, permits: Permits = MOVED, listener: Listener = ignore
) -> Examined:
    """See `examine`. What stands in the way may be over in a moment (a child before its exec, or that ends), so it is
    looked at again. Raises CannotBeDone with all obstacles that are left.
    """
    for attempt in range(LOOKS):
        if attempt:
            time.sleep(LOOK_AGAIN_S)
        examined = examine(
            pid, tcp_close=tcp_close, permits=permits, listener=ignore if attempt else listener
        )
        if not examined.obstacles:
            return examined
    raise CannotBeDone(examined.obstacles)


def _guarded(processes: Iterable[ProcessFacts]) -> Iterator[int]:
    for process in processes:
        with suppress(OSError, Refused):  # it has ended, or will not be moved anyway
            if has_guards(process.pid, process.smaps):
                yield process.pid


def obstacles(facts: TreeFacts) -> Iterator[Obstacle]:
    """What of the processes and threads stands in the way. Pure."""
    if facts.root.kernel_thread:
        yield Obstacle(facts.root.pid, "process", "is a kernel thread", "name a process")
        return
    if facts.root.zombie:
        yield Obstacle(facts.root.pid, "process", "has ended (zombie)", "nothing is left to move")
    for process in facts.processes:
        yield from _of_process(process, facts)
        if process.alive:
            yield from _of_namespaces(process, facts)
            for thread in process.threads:
                yield from _of_thread(process, thread, facts.stuck.get(thread.tid))
    for pid, other, what in facts.sharing:
        remedy = "wait until it has called exec (vfork), or start the processes with fork(2)"
        yield Obstacle(pid, "process", f"shares {what} with process {other}", remedy)
    for pid, kind, number in facts.ipc_uses:
        yield Obstacle(
            pid, "process", f"used System V {kind} {number}, which stays on this host",
            "let the program remove it, or use what lives in its own memory (sem_init(3), pipes)",
        )  # fmt: skip


def _of_process(process: ProcessFacts, facts: TreeFacts) -> Iterator[Obstacle]:
    def obstacle(why: str, remedy: str) -> Obstacle:
        return Obstacle(process.pid, "process", why, remedy)

    if process.zombie and process.stat.num_threads > 1:
        yield obstacle(
            "its first thread has ended and others run on", "start it so that main() joins its threads"
        )
    if not process.alive:
        return
    if process.pid == facts.our_pid:
        yield obstacle("is lazyproc itself", OUTSIDE)
    elif process.ours:
        yield obstacle(
            f"is at work for lazyproc ({process.stat.comm})",
            "name the process that is to move; what lazyproc works on is in lazyproc sessions",
        )
    if any(thread.parked for thread in process.threads):
        yield obstacle(
            "is parked: an earlier move of it is not over, which alone knows where it goes on",
            "see lazyproc sessions, then lazyproc resume or lazyproc abort",
        )
    if process.frozen_group:
        yield obstacle(
            f"is in a frozen cgroup, {process.frozen_group}: nothing can be asked of it",
            "let it run first (docker unpause, systemctl thaw, or echo 0 > cgroup.freeze)",
        )
    if process.elf_class == ELF_32:
        yield obstacle("is a 32-bit program", "use its 64-bit build")
    if process.stat.policy == SCHED_DEADLINE:
        yield obstacle(
            "runs under SCHED_DEADLINE, whose budget cannot be promised elsewhere", "chrt --other 0 -p PID"
        )
    if not any(entry.entry.path == "[vdso]" for entry in process.smaps):
        yield obstacle(
            "has no [vdso] mapping", "start it without unmapping it, and the kernel without vdso=0"
        )
    for short in shortages(process.smaps, process.limits, len(process.threads), process.timers):
        yield obstacle(
            f"has mapped {short.taken} bytes, may have {short.limit} (RLIMIT_{short.name.upper()}),"
            f" and would need {short.wanted} more while it is asked for its state",
            f"give it room: prlimit --pid {process.pid} --{short.name}={short.taken + short.wanted}:",
        )


def _of_namespaces(process: ProcessFacts, facts: TreeFacts) -> Iterator[Obstacle]:
    """A tree lives in one set of namespaces. Only the first process in another one is named."""
    root = facts.root.namespaces
    parent = next((each.namespaces for each in facts.processes if each.pid == process.stat.ppid), {})
    # A pid namespace for children has no inode before the first of them is born.
    for name, inode in {"pid" + FOR_CHILDREN: 0, **process.namespaces}.items():
        of = name.removesuffix(FOR_CHILDREN)
        if inode == parent.get(name) or (name != of and inode == process.namespaces.get(of)):
            continue
        if name == "user" and inode != facts.our_namespaces[name]:
            yield Obstacle(
                process.pid, "process", "is in another user namespace than lazyproc",
                "start lazyproc in it: nsenter --target PID --user …",
            )  # fmt: skip
        elif inode != root.get(of, inode) and (name != of or process is not facts.root):
            whose = "its future children are" if name != of else "is"
            first = "the first one in there" if name != of else process.pid
            yield Obstacle(
                process.pid, "process", f"{whose} in another {of} namespace than the root of the tree",
                f"name a process whose whole tree is in one, such as {first}",
            )  # fmt: skip


def _of_thread(process: ProcessFacts, thread: ThreadFacts, stuck: str | None) -> Iterator[Obstacle]:
    def obstacle(why: str, remedy: str) -> Obstacle:
        return Obstacle(process.pid, f"thread {thread.tid}", why, remedy)

    if thread.tracer and not thread.parked:  # by who keeps it, which is said
        yield obstacle(
            f"is traced by process {thread.tracer}", "detach it (a debugger, strace, another lazyproc)"
        )
    if stuck is not None:
        yield obstacle(
            stuck,
            "wait until its I/O is done, or its vfork child has called exec, and try again",
        )
    for what in thread.apart:
        yield obstacle(
            f"does not share its process's {what}", "start the program without unshare(2) in threads"
        )
    for name, inode in thread.namespaces.items():
        if not name.endswith(FOR_CHILDREN) and process.namespaces.get(name, inode) != inode:
            yield obstacle(f"is in another {name} namespace than its process", "wait until it has come back")


def notes(facts: TreeFacts) -> Iterator[str]:
    """What changes with a move and is no obstacle. Pure."""
    yield from (f"pid {each.pid}: {each.why}" for each in _led_from_outside(facts))
    apart = [n for n in BORROWED if facts.root.namespaces.get(n) not in (None, facts.our_namespaces[n])]
    if apart:
        yield (
            f"pid {facts.root.pid}: its namespaces ({', '.join(apart)}) stay here; "
            "it is restored in those of the command that restores it"
        )
    yield from _note_of_copies(facts)
    yield from warnings(facts.root.pid, facts.supervisor)


def _led_from_outside(facts: TreeFacts) -> Iterator[Obstacle]:
    """As obstacles, for those who do not want it."""
    pids = {process.pid for process in facts.processes}
    for process in filter(lambda process: process.alive, facts.processes):
        for what, number in (("process group", process.stat.pgrp), ("session", process.stat.session)):
            if number not in pids:
                why = f"the leader of its {what} ({number or 'unknown here'}) is not in the tree"
                yield Obstacle(
                    process.pid, "process", why, "start it with setsid, or say that it is a job of a shell"
                )


def _shared_outside(facts: TreeFacts) -> Iterator[Obstacle]:
    for pid, other, what in facts.shared_outside:
        why = f"shares {what} with process {other}, which is not in the tree: each would go on with its own"
        yield Obstacle(pid, "process", why, "move that process too (give the pid that started both)")


def too_much_private(facts: TreeFacts, limit: int) -> Iterator[Obstacle]:
    """Whose share is the largest, when all of them have more. Pure."""
    sizes = {process.pid: lazy_bytes(process.smaps) for process in facts.processes if process.alive}
    if (total := sum(sizes.values())) > limit:
        yield Obstacle(
            max(sizes, key=lambda pid: sizes[pid]), "process",
            f"has much address space: the tree has {total / (1 << 40):.2f} TiB of private memory, and "
            f"no more than {limit / (1 << 40):.2f} can follow it",
            "let it map less, or forbid access to what it only reserves (PROT_NONE)",
        )  # fmt: skip


def _net_apart(facts: TreeFacts) -> Iterator[Obstacle]:
    if facts.root.namespaces.get("net") not in (None, facts.our_namespaces["net"]):
        why = (
            "is in a network namespace of its own, of which only the packets of its connections are held back"
        )
        yield Obstacle(facts.root.pid, "process", why, "leave out --network-lock")


def _note_of_copies(facts: TreeFacts) -> Iterator[str]:
    more = bytes_of_copies([process.smaps for process in facts.processes if process.alive]) >> 20
    if more:
        yield (
            f"pid {facts.root.pid}: the tree needs up to {more} MiB more memory where it is restored: its processes "
            "share them since a fork (copy-on-write), and each gets a copy of its own"
        )


def _resources(
    facts: TreeFacts, tcp_close: bool, permits: Permits, guarded: frozenset[int]
) -> tuple[list[Obstacle], tuple[Wanted, ...], Seen]:
    """Descriptors and mappings, by the rules of the dump itself."""
    with ExitStack() as stack:
        refs = []
        for process in facts.processes:
            if not process.alive or process.pid == facts.our_pid:
                continue
            with suppress(ProcessLookupError):
                pidfd = pidfd_open(process.pid)
                stack.callback(os.close, pidfd)
                refs.append(TaskRef(process.pid, process.vpid, pidfd))
        if not refs:
            return [], (), NOTHING
        registry = Registry(tuple(refs), contents_wanted=False, permits=permits)
        for process in facts.processes:
            refused_mappings(registry, process.pid, process.smaps)
            registry.obstacles.extend(_unfetched(process))
        look_at_descriptors(registry, tcp_close=tcp_close)
        wanted = tuple(needs_of(registry, facts))
        spaces = dict(_spaces(registry, facts))
        registry.obstacles.extend(_too_many(facts.root.pid, spaces))
        wanted += tuple(limits_of(registry, spaces))
        return registry.obstacles, wanted, Seen(spaces, registry.looked, registry.files, guarded)


def _too_many(root: int, spaces: Mapping[int, Space]) -> Iterator[Obstacle]:
    """Shared objects: each is open here as long as its pages may be asked for. A quarter is left for all the rest."""
    objects = set[object]().union(*map(objects_of, spaces.values()))
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if len(objects) > most * 3 // 4:
        why = f"has {len(objects)} shared memory objects, and lazyproc may have {most} descriptors (RLIMIT_NOFILE)"
        yield Obstacle(
            root, "tree", why, f"raise the hard limit: prlimit --nofile={2 * len(objects)} lazyproc ..."
        )


def _spaces(registry: Registry, facts: TreeFacts) -> Iterator[tuple[int, Space]]:
    pids = {ref.pid for ref in registry.tasks}
    for process in facts.processes:
        if process.pid in pids:
            space = space_before(registry, process.pid, process.locked_kib, process.smaps)
            if space is not None:
                yield process.pid, space


def _unfetched(process: ProcessFacts) -> list[Obstacle]:
    """Of a running process a ring may go, or all its memory, while it is looked at."""
    entries = [smaps.entry for smaps in process.smaps if smaps.entry.path == aio.NAME]
    found: list[Obstacle] = []
    if entries:
        with suppress(NoSuchProcess, TraceeError), tracee.memory(process.pid) as memory:
            rings = [aio.Ring(process.pid, entry.start, entry.end) for entry in entries]
            found.extend(aio.unfetched(rings, memory))
    return found
