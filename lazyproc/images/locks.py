"""filelocks.img: the locks of all tasks (CRIU 4.2: images/file-lock.proto)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from lazyproc.images.files import ImageWriter, garbled, records
from lazyproc.images.pb import files_pb2 as pb
from lazyproc.model import FileLock, LockKind, Task

FILELOCKS = "filelocks.img"
_FLAGS = frozenset(map(int, LockKind))
_RDLCK, _WRLCK = 0, 1  # F_RDLCK, F_WRLCK: of every kind of lock


def write(tasks: Sequence[Task], writer: ImageWriter) -> None:
    for task in tasks:
        for lock in task.locks:
            entry = pb.file_lock_entry(
                flag=lock.kind, pid=task.vpid, fd=lock.fd, start=lock.start, len=lock.length
            )
            entry.type = _WRLCK if lock.exclusive else _RDLCK
            writer.add(FILELOCKS, entry)


def read(images: Mapping[str, bytes]) -> Mapping[int, tuple[FileLock, ...]]:
    """By vpid. Raises ImageError."""
    found: dict[int, tuple[FileLock, ...]] = defaultdict(tuple)
    for entry, _ in records(images, FILELOCKS, pb.file_lock_entry):
        if entry.flag not in _FLAGS or entry.type not in (_RDLCK, _WRLCK):
            raise garbled(FILELOCKS, f"an unknown kind of lock ({entry.flag:#x}, {entry.type})")
        kind = LockKind(entry.flag)
        found[entry.pid] += (FileLock(entry.fd, kind, entry.type == _WRLCK, entry.start, entry.len),)
    return found
