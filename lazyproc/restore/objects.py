"""Shared memory objects: made once by us, mapped by the tasks."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from lazyproc.errors import RestoreError
from lazyproc.kernel._core import ffi
from lazyproc.kernel.sys import syscall
from lazyproc.kernel.sysvipc import Segment
from lazyproc.model import PAGE, Checkpoint, SharedKind, SharedMemory
from lazyproc.needs import SegmentNeed

SYS_SHMGET, SYS_SHMAT, SYS_SHMCTL, SYS_SHMDT = 29, 30, 31, 67
IPC_PRIVATE = 0
SLOTS = 1 << 15  # a number is its slot and how often that was used (ipc/util.h, IPCMNI_SHIFT)
IPC_CREAT, IPC_EXCL, IPC_RMID, IPC_SET, IPC_STAT = 0o1000, 0o2000, 0, 1, 2
SHM_DEST = 0o1000  # in the mode: removed already
SHMID_DS, UID_OFFSET = 112, 4  # struct shmid64_ds begins with struct ipc64_perm: key, uid, gid
SHM_NEXT_ID = "/proc/sys/kernel/shm_next_id"  # ipc/ipc_sysctl.c: the id of the next segment


@contextmanager
def made(checkpoint: Checkpoint, memfds: Mapping[int, int]) -> Iterator[dict[int, int]]:
    """Descriptors of all objects by id, open for reading and writing; SysV segments go again on an exception."""
    with ExitStack() as stack:
        found = dict(memfds)
        for number, shared in checkpoint.shared.items():
            if shared.kind is SharedKind.ANON:
                found[number] = _anonymous(shared, stack)
            elif shared.kind is SharedKind.SYSV:
                found[number] = _segment(shared, stack)
        yield found


def _anonymous(shared: SharedMemory, stack: ExitStack) -> int:
    """MAP_SHARED | MAP_ANONYMOUS has no name: we map it, open the object through map_files, and unmap it."""
    size = -(-shared.size // PAGE) * PAGE
    with mmap.mmap(-1, size, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS) as mapping:
        view = ffi.from_buffer(mapping)
        addr = int(ffi.cast("uintptr_t", view))
        ffi.release(view)
        return _open_mapping(addr, size, stack)


def _open_mapping(addr: int, size: int, stack: ExitStack) -> int:
    fd = os.open(f"/proc/self/map_files/{addr:x}-{addr + size:x}", os.O_RDWR | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    return fd


def _segment(shared: SharedMemory, stack: ExitStack) -> int:
    need = SegmentNeed(shared.sysv_key, shared.sysv_shmid)
    with open(SHM_NEXT_ID, "w") as file:
        file.write(str(shared.sysv_shmid))
    flags = IPC_CREAT | IPC_EXCL | shared.mode & 0o777
    try:
        number = syscall(SYS_SHMGET, shared.sysv_key, shared.size, flags)
    except FileExistsError as error:
        raise _key_taken(need) from error
    stack.push(lambda kind, *_: syscall(SYS_SHMCTL, number, IPC_RMID, 0) < 0 if kind else False)
    if number != shared.sysv_shmid:
        raise _number_taken(need)
    _give_away(shared)
    addr = syscall(SYS_SHMAT, number, 0, 0)
    try:
        return _open_mapping(addr, -(-shared.size // PAGE) * PAGE, stack)
    finally:
        syscall(SYS_SHMDT, addr)


def check_segment(need: SegmentNeed, here: Collection[Segment]) -> None:
    """Raise RestoreError when one of the segments that are `here` has the key or the number. Pure."""
    if need.key != IPC_PRIVATE and any(segment.key == need.key for segment in here):
        raise _key_taken(need)
    if any(segment.id % SLOTS == need.id % SLOTS for segment in here):
        raise _number_taken(need)


def _key_taken(need: SegmentNeed) -> RestoreError:
    return RestoreError(
        f"a segment with its key {need.key:#x} exists on this host",
        where=f"SysV segment {need.id}",
        remedy="remove it with ipcrm, or restore in an ipc namespace of its own",
    )


def _number_taken(need: SegmentNeed) -> RestoreError:
    return RestoreError(
        "its number is taken on this host", where=f"SysV segment {need.id}", remedy="free it with ipcrm"
    )


def _give_away(shared: SharedMemory) -> None:
    """Its owner; whoever made it (cuid) can only be us."""
    facts = bytearray(SHMID_DS)
    addr = int(ffi.cast("uintptr_t", ffi.from_buffer(facts)))
    syscall(SYS_SHMCTL, shared.sysv_shmid, IPC_STAT, addr)
    struct.pack_into("<II", facts, UID_OFFSET, shared.uid, shared.gid)
    syscall(SYS_SHMCTL, shared.sysv_shmid, IPC_SET, addr)


def mark_removed(checkpoint: Checkpoint) -> None:
    """Segments that were removed before (shmctl(2), IPC_RMID) go with the last of the attachments they have now."""
    for shared in checkpoint.shared.values():
        if shared.kind is SharedKind.SYSV and shared.mode & SHM_DEST:
            syscall(SYS_SHMCTL, shared.sysv_shmid, IPC_RMID, 0)
