"""Which process images are of, and of which moment of it: what tells whether they may complete a tree that has lost its
source.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

from lazyproc.model import Checkpoint, MemoryObject, Mm, ObjectKind, Task, VmaKind
from lazyproc.pages import PageSource
from lazyproc.runs import Extents

CHANGES = (
    "brk",
    "vmas",
    "exe_id",
    "vdso_build_id",
    "dumpable",
    "future_locks",
    "flags",
)  # of Mm, or differ between images
LOOKED_AT = 256  # pages of data


def identity(checkpoint: Checkpoint, source: PageSource) -> dict[str, list[int]]:
    """Of each process, by its number as text, two checksums; for a journal.

    The first is of where its program, stack and arguments lie, which the kernel chose when it was executed. The second
    is of what changes all the time: the registers of its threads, and the data of its program and libraries.
    """
    return {
        str(task.vpid): [_layout(task.mm), _moment(task, checkpoint, source)] for task in checkpoint.tasks
    }


def _layout(mm: Mm | None) -> int:
    return (
        0 if mm is None else _sum([(name, getattr(mm, name)) for name in mm.__slots__ if name not in CHANGES])
    )


def _moment(task: Task, checkpoint: Checkpoint, source: PageSource) -> int:
    found = _sum([(thread.tid, *thread.registers) for thread in task.threads])
    obj, left = MemoryObject(ObjectKind.TASK, task.vpid), LOOKED_AT
    extents = Extents.of(checkpoint.memory.get(obj, ()))
    for vma in task.mm.vmas if task.mm else ():
        for extent in extents.within(vma.start, vma.end) if vma.kind is VmaKind.FILE and left else ():
            count = min(extent.count, left)
            left -= count
            found = zlib.crc32(source.read(obj, extent.addr, count), found)
    return found


def _sum(value: object) -> int:
    return zlib.crc32(repr(value).encode())


def is_same_tree(ours: Mapping[str, Sequence[int]], theirs: Mapping[str, Sequence[int]]) -> bool:
    """Whether both are of the same processes, each since its last exec. Pure."""
    return ours.keys() == theirs.keys() and all(ours[vpid][0] == theirs[vpid][0] for vpid in ours)


def is_same_moment(ours: Mapping[str, Sequence[int]], theirs: Mapping[str, Sequence[int]]) -> bool:
    """Whether nothing of what is looked at has changed between the two. Pure."""
    return all(ours[vpid][1] == theirs[vpid][1] for vpid in ours)
