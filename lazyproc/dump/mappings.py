"""The address space of one frozen process as a model: fields, mappings, and the files and objects behind them."""

from __future__ import annotations

import mmap
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from lazyproc.dump.aio import Ring, unfetched
from lazyproc.dump.files import gather_mapped_file
from lazyproc.dump.freeze import FrozenTask
from lazyproc.dump.look import attempt
from lazyproc.dump.registry import Refused, Registry
from lazyproc.dump.space import Space, numbered
from lazyproc.facts import dataclass, field, replace
from lazyproc.kernel import elf, proc, sysvipc
from lazyproc.kernel.tracee import Memory
from lazyproc.model import PAGE, MemFd, Mm, MmFlags, SharedKind, SharedMemory, Task, Vma, VmaKind

SYSV_PREFIX = "/SYSV"
SHM_DEST = 0o1000  # removed, and gone with the last attachment
MAX_LAZY = 4096  # shared objects: half of LEDGER_INSTANCES, the rest is for processes and what they fork


@dataclass(slots=True)
class Objects:
    """Descriptors of ours for the tree's shared memory objects, by SharedMemory id; `stack` closes them."""

    stack: ExitStack
    fds: dict[int, int] = field(default_factory=dict)


def gather_mm(
    registry: Registry,
    frozen: FrozenTask,
    space: Space,
    exe: int,
    answers: tuple[int, MmFlags, int, int],
    memory: Memory,
    objects: Objects,
) -> Mm:
    """Mm of a frozen process; `exe` is the number of its program, `answers` are dumpable, flags, brk and
    future_locks. Obstacles go to the registry.
    """
    dumpable, flags, brk, future_locks = answers
    pid, stat = frozen.pid, frozen.stat
    vmas = _with_objects(registry, pid, numbered(registry, pid, space), objects)
    for where, refused in space.refused:
        registry.refuse(pid, where, refused)
    registry.obstacles.extend(unfetched(rings_of(pid, vmas), memory))
    return Mm(
        start_code=stat.start_code,
        end_code=stat.end_code,
        start_data=stat.start_data,
        end_data=stat.end_data,
        start_brk=stat.start_brk,
        brk=brk,
        start_stack=stat.start_stack,
        arg_start=stat.arg_start,
        arg_end=stat.arg_end,
        env_start=stat.env_start,
        env_end=stat.env_end,
        auxv=proc.auxv(proc.read(pid, "auxv")),
        exe_id=exe,
        dumpable=dumpable,
        vmas=vmas,
        vdso_build_id=_vdso_build_id(vmas, memory),
        future_locks=future_locks,
        flags=flags,
    )


def rings_of(pid: int, vmas: Sequence[Vma]) -> list[Ring]:
    """The AIO rings of a process."""
    return [Ring(pid, vma.start, vma.end) for vma in vmas if vma.kind is VmaKind.AIO]


def _vdso_build_id(vmas: Sequence[Vma], memory: Memory) -> bytes:
    vdso = next((vma for vma in vmas if vma.kind is VmaKind.VDSO), None)
    return elf.build_id(memory.read(vdso.start, vdso.length)) if vdso else b""


def _with_objects(registry: Registry, pid: int, space: Space, objects: Objects) -> tuple[Vma, ...]:
    if not space.objects:
        return space.vmas
    vmas = list(space.vmas)
    for at in space.objects:
        vmas[at] = replace(vmas[at], object_id=_object(registry, pid, space.entries[at], objects))
    return tuple(vmas)


def _object(registry: Registry, pid: int, entry: proc.MapsEntry, objects: Objects) -> int:
    """The number of the shared memory object behind a mapping, opened once for its pages."""
    fd = os.open(f"/proc/{pid}/map_files/{entry.start:x}-{entry.end:x}", os.O_RDONLY | os.O_CLOEXEC)
    status = os.fstat(fd)
    number, _ = registry.objects.of((status.st_dev, status.st_ino))
    if number in objects.fds:
        os.close(fd)
        return number
    objects.stack.callback(os.close, fd)
    objects.fds[number] = fd
    if entry.path.startswith("/memfd:"):
        file = registry.files[gather_mapped_file(registry, pid, entry.start, entry.end, entry)]
        assert isinstance(file.resource, MemFd)
        return file.resource.object_id
    if entry.path.startswith(SYSV_PREFIX):
        with attempt(registry, pid, f"mapping {entry.start:#x}-{entry.end:#x} {entry.path}"):
            registry.shared[number] = _segment(number, entry, status)
        return number
    registry.shared[number] = SharedMemory(
        id=number,
        kind=SharedKind.ANON,
        size=status.st_size,
        mode=status.st_mode & 0o777,
        uid=status.st_uid,
        gid=status.st_gid,
    )
    return number


def _segment(number: int, entry: proc.MapsEntry, status: os.stat_result) -> SharedMemory:
    """A SysV segment. Never lazy: anybody may attach it at any time, past any userfaultfd."""
    segment = sysvipc.segments().get(entry.inode)
    if segment is None:
        raise Refused(
            "is a segment of another ipc namespace", "start lazyproc there: nsenter --target PID --ipc …"
        )
    if entry.offset or entry.end - entry.start != -(-status.st_size // PAGE) * PAGE:
        raise Refused("is a part of a segment, which shmat(2) cannot map", "let the program attach it whole")
    return SharedMemory(
        id=number,
        kind=SharedKind.SYSV,
        size=status.st_size,
        mode=segment.mode & (0o777 | SHM_DEST),
        uid=segment.uid,
        gid=segment.gid,
        sysv_key=segment.key,
        sysv_shmid=segment.id,
        lazy=False,
    )


def settled(registry: Registry, tasks: Sequence[Task]) -> dict[int, SharedMemory]:
    """The shared memory objects, now that all their mappings are known.

    One that is also mapped private is not lazy: a page put there would be in that mapping alone. Nor is one that is
    locked anywhere: mlock(2) needs all its pages. Of thousands the smallest are not: each lazy one is a row in the
    tables of a pager (uffd/_ledger.h). A SysV segment that others have attached is an obstacle.
    """
    found = dict(registry.shared)
    mappings = [vma for task in tasks if task.mm for vma in task.mm.vmas if vma.kind is VmaKind.SHARED]
    for vma in mappings:
        if (vma.flags & mmap.MAP_PRIVATE or "lo" in vma.vm_flags) and vma.object_id in found:
            found[vma.object_id] = replace(found[vma.object_id], lazy=False)
    lazy = sorted((each for each in found.values() if each.lazy), key=lambda each: each.size, reverse=True)
    found |= {each.id: replace(each, lazy=False) for each in lazy[MAX_LAZY:]}
    segments = sysvipc.segments() if any(s.kind is SharedKind.SYSV for s in found.values()) else {}
    ours = Counter(vma.object_id for vma in mappings)
    for number, shared in found.items():
        if shared.kind is SharedKind.SYSV and segments[shared.sysv_shmid].attachments > ours[number]:
            refused = Refused(
                "is attached by processes outside the tree", "let them detach it, or move them too"
            )
            registry.refuse(registry.tasks[0].pid, f"SysV segment {shared.sysv_shmid}", refused)
    return found


def open_memfds(registry: Registry, descriptors: Mapping[int, int], objects: Objects) -> None:
    """Memfds that nobody maps: `descriptors` are our duplicates by object id. Opened anew: looking for what is no hole
    moves the position, and that of a duplicate is the tree's.
    """
    for number, fd in descriptors.items():
        if number not in objects.fds:
            objects.fds[number] = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
            objects.stack.callback(os.close, objects.fds[number])
