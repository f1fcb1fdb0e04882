"""Memfds: made empty, filled by whoever moves the pages, sealed after that."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping

from lazyproc.model import Checkpoint, MemFd, OpenFile, SharedKind, SharedMemory
from lazyproc.restore.workshop import Workshop, reopen, words

MFD_EXEC = 0x10  # linux 6.3: sysctl vm.memfd_noexec does not interfere


def make_objects(workshop: Workshop) -> None:
    for memory in workshop.checkpoint.shared.values():
        if memory.kind is SharedKind.MEMFD:
            with words(f"memfd {memory.name}", "cannot be created", "free some memory"):
                fd = workshop.objects[memory.id] = workshop.keep(_make_object(memory))
                workshop.originals[SharedMemory, memory.id, os.O_RDWR] = fd


def _make_object(memory: SharedMemory) -> int:
    # A memfd made without MFD_ALLOW_SEALING has exactly F_SEAL_SEAL (mm/memfd.c).
    sealing = 0 if memory.seals == fcntl.F_SEAL_SEAL else os.MFD_ALLOW_SEALING
    fd = os.memfd_create(memory.name, os.MFD_CLOEXEC | MFD_EXEC | sealing)
    os.ftruncate(fd, memory.size)
    os.fchown(fd, memory.uid, memory.gid)
    os.fchmod(fd, memory.mode)
    return fd


def make_memfd(workshop: Workshop, file: OpenFile, resource: MemFd) -> int:
    """What memfd_create(2) gave does not count as a writer, which would keep it from being executed (ETXTBSY). Its
    pages are still to come through it, and pwrite(2) would append them where O_APPEND is set.
    """
    memory = workshop.checkpoint.shared[resource.object_id]
    original = None if file.flags & os.O_APPEND else workshop.original(memory, file.flags)
    return os.dup(original) if original is not None else reopen(workshop.objects[memory.id], file.flags)


def finish_memfd(fd: int, memory: SharedMemory) -> None:
    """Apply the seals, when its pages have come. EBUSY: F_SEAL_WRITE, and it is mapped writable."""
    if memory.seals and memory.seals != fcntl.F_SEAL_SEAL:
        with words(f"memfd {memory.name}", "cannot be sealed", "report it with the seals it had"):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, memory.seals)


def seal_memfds(checkpoint: Checkpoint, objects: Mapping[int, int]) -> None:
    """finish_memfd for every memfd; `objects` are descriptors by SharedMemory id."""
    for number, memory in checkpoint.shared.items():
        if memory.kind is SharedKind.MEMFD:
            finish_memfd(objects[number], memory)
