"""The address space of one frozen process as a model: fields, mappings, and the files and objects behind them."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from lazyproc.dump.files import gather_link, gather_mapped_file
from lazyproc.dump.freeze import FrozenTask
from lazyproc.dump.memory import kind_of, refused_mappings, vma_of
from lazyproc.dump.registry import Registry
from lazyproc.kernel import elf, proc
from lazyproc.kernel.tracee import Memory
from lazyproc.model import MemFd, Mm, SharedKind, SharedMemory, Vma, VmaKind

SYSV_PREFIX = "/SYSV"


@dataclass(slots=True)
class Objects:
    """Descriptors of ours for the tree's shared memory objects, by SharedMemory id; `stack` closes them."""

    stack: ExitStack
    fds: dict[int, int] = field(default_factory=dict)


def gather_mm(
    registry: Registry,
    frozen: FrozenTask,
    smaps: Sequence[proc.SmapsEntry],
    answers: tuple[int, bool, int],
    memory: Memory,
    objects: Objects,
) -> Mm:
    """Mm of a frozen process; `answers` are dumpable, thp_disabled and brk. Obstacles go to the registry."""
    dumpable, thp_disabled, brk = answers
    pid, stat = frozen.pid, frozen.stat
    refused_mappings(registry, pid, smaps)
    vmas = tuple(_vma(registry, pid, entry, objects) for entry in smaps if entry.entry.path != "[vsyscall]")
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
        exe_id=gather_link(registry, pid, "exe"),
        dumpable=dumpable,
        thp_disabled=thp_disabled,
        vmas=vmas,
        vdso_build_id=_vdso_build_id(vmas, memory),
    )


def _vdso_build_id(vmas: Sequence[Vma], memory: Memory) -> bytes:
    vdso = next((vma for vma in vmas if vma.kind is VmaKind.VDSO), None)
    return elf.build_id(memory.read(vdso.start, vdso.length)) if vdso else b""


def _vma(registry: Registry, pid: int, smaps: proc.SmapsEntry, objects: Objects) -> Vma:
    entry = smaps.entry
    match kind_of(entry):
        case VmaKind.FILE:
            return vma_of(smaps, file_id=gather_mapped_file(registry, pid, entry.start, entry.end, entry))
        case VmaKind.SHARED:
            return vma_of(smaps, object_id=_object(registry, pid, entry, objects))
        case _:
            return vma_of(smaps)


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
    sysv = entry.path.startswith(SYSV_PREFIX)
    registry.shared[number] = SharedMemory(
        id=number,
        kind=SharedKind.SYSV if sysv else SharedKind.ANON,
        size=status.st_size,
        mode=status.st_mode & 0o777,
        uid=status.st_uid,
        gid=status.st_gid,
        sysv_key=_signed32(int(entry.path[len(SYSV_PREFIX) :], 16)) if sysv else 0,
        sysv_shmid=entry.inode if sysv else 0,
        lazy=not sysv,  # anybody may attach a SysV segment at any time, past any userfaultfd
    )
    return number


def _signed32(value: int) -> int:
    return int(struct.unpack("<i", struct.pack("<I", value))[0])


def open_memfds(registry: Registry, descriptors: Mapping[int, int], objects: Objects) -> None:
    """Memfds that nobody maps: `descriptors` are our duplicates by object id."""
    for number, fd in descriptors.items():
        if number not in objects.fds:
            objects.fds[number] = os.dup(fd)
            objects.stack.callback(os.close, objects.fds[number])
