"""What is in a folder of images."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from lazyproc.images.convert import from_images, memory_objects
from lazyproc.images.files import Folder
from lazyproc.model import (
    PAGE,
    Checkpoint,
    Extent,
    InetSocket,
    MemFd,
    MemoryObject,
    NetlinkSocket,
    ObjectKind,
    OpenFile,
    PipeEnd,
    RegularFile,
    Task,
    TerminalMaster,
    TerminalSlave,
    UnixSocket,
    Vma,
    VmaKind,
)
from lazyproc.pages.images import ImagePages
from lazyproc.show.text import numbers, plural, printable, size, table

TCP_STATES = {1: "established", 7: "closed", 10: "listening"}


def read_checkpoint(directory: Path) -> Checkpoint:
    """The checkpoint in a folder, without its pages. Raises ImageError, also for parents that lack pages."""
    folder = Folder(directory)
    checkpoint = from_images(folder.read())
    if folder.parent() is not None:
        ImagePages(folder, memory_objects(checkpoint)).close()
    return checkpoint


def checkpoint_fields(checkpoint: Checkpoint) -> dict[str, object]:
    """What `--json` prints. Sizes of mappings are in bytes, pages in units of 4096."""
    lazy, eager = _pages([extent for extents in checkpoint.memory.values() for extent in extents])
    return {
        "hostname": checkpoint.hostname,
        "pages_lazy": lazy,
        "pages_eager": eager,
        "tasks": [_task_fields(checkpoint, task) for task in checkpoint.tasks],
        "shared": [
            {"id": s.id, "kind": s.kind.value, "name": s.name, "size": s.size, "lazy": s.lazy}
            for s in checkpoint.shared.values()
        ],
    }


def _task_fields(checkpoint: Checkpoint, task: Task) -> dict[str, object]:
    lazy, eager = _pages(checkpoint.memory.get(MemoryObject(ObjectKind.TASK, task.vpid), ()))
    return {
        "vpid": task.vpid,
        "ppid": task.ppid,
        "pgid": task.pgid,
        "sid": task.sid,
        "state": task.state.value,
        "comm": task.comm,
        "threads": [thread.tid for thread in task.threads],
        "mappings": {kind: {"count": count, "bytes": length} for kind, count, length in _by_kind(task)},
        "pages_lazy": lazy,
        "pages_eager": eager,
        "files": [
            {"fd": row.fd, "file": file_text(checkpoint.files[row.file_id])} for row in task.descriptors
        ],
    }


def checkpoint_text(checkpoint: Checkpoint) -> str:
    """The tree, and for each task what it has."""
    parts = [_head(checkpoint)]
    for task in checkpoint.tasks:
        name = printable(task.comm)
        parts.append(f"{'  ' * _depth(checkpoint, task)}{task.vpid} {name} ({task.state.value})")
        parts.extend(f"    {line}" for line in _task_lines(checkpoint, task))
    return "\n".join(parts)


def _head(checkpoint: Checkpoint) -> str:
    lazy, eager = _pages([extent for extents in checkpoint.memory.values() for extent in extents])
    threads = sum(len(task.threads) for task in checkpoint.tasks)
    where = f" from {printable(checkpoint.hostname)}" if checkpoint.hostname else ""
    return (
        f"{plural(len(checkpoint.tasks), 'task')}, {plural(threads, 'thread')}{where}; "
        f"{size(lazy * PAGE)} lazy, {size(eager * PAGE)} eager"
    )


def _task_lines(checkpoint: Checkpoint, task: Task) -> Iterator[str]:
    if not task.threads:
        return
    yield f"threads   {numbers(sorted(thread.tid for thread in task.threads))}"
    yield f"mappings  {', '.join(f'{count} {kind} ({size(length)})' for kind, count, length in _by_kind(task))}"
    lazy, eager = _pages(checkpoint.memory.get(MemoryObject(ObjectKind.TASK, task.vpid), ()))
    yield f"pages     {lazy} lazy, {eager} eager"
    rows = [(f"fd {row.fd}", printable(file_text(checkpoint.files[row.file_id]))) for row in task.descriptors]
    yield from table(rows).splitlines() if rows else ()


def _depth(checkpoint: Checkpoint, task: Task) -> int:
    parents = {other.vpid: other.ppid for other in checkpoint.tasks}
    depth, vpid = 0, parents[task.vpid]
    while vpid in parents and depth < len(parents):
        depth, vpid = depth + 1, parents[vpid]
    return depth


def _by_kind(task: Task) -> list[tuple[str, int, int]]:
    """Kind of mapping, how many, and their length in bytes; in the order of VmaKind."""
    vmas: Sequence[Vma] = task.mm.vmas if task.mm else ()
    counts = Counter(vma.kind for vma in vmas)
    return [
        (kind.value, counts[kind], sum(vma.length for vma in vmas if vma.kind is kind))
        for kind in VmaKind
        if counts[kind]
    ]


def _pages(extents: Sequence[Extent]) -> tuple[int, int]:
    """How many pages are lazy, and how many are not."""
    lazy = sum(extent.count for extent in extents if extent.lazy)
    return lazy, sum(extent.count for extent in extents) - lazy


def file_text(file: OpenFile) -> str:
    """One open file in a few words."""
    match file.resource:
        case RegularFile(path=path):
            return f"{path} at {file.pos}" if file.pos else path
        case PipeEnd(pipe_id=number):
            return f"pipe {number}, {'writing' if file.flags & os.O_ACCMODE == os.O_WRONLY else 'reading'}"
        case UnixSocket(name=name, state=state):
            text = os.fsdecode(name).replace("\0", "@", 1)
            return f"unix socket {TCP_STATES.get(state, '')} {text}".rstrip()
        case InetSocket(local=local, remote=remote, state=state):
            ends = " -> ".join(_end(end) for end in (local, remote) if end is not None)
            return f"inet socket {TCP_STATES.get(state, str(state))} {ends}"
        case NetlinkSocket(protocol=protocol, port=port):
            return f"netlink socket of protocol {protocol}, port {port}"
        case MemFd(object_id=number):
            return f"memfd {number}"
        case TerminalMaster(number=number):
            return f"master of terminal /dev/pts/{number}"
        case TerminalSlave(number=number):
            return f"terminal /dev/pts/{number}"
        case other:
            return type(other).__name__.lower()


def _end(end: tuple[bytes, int]) -> str:
    from ipaddress import ip_address

    address = ip_address(end[0])
    return f"[{address}]:{end[1]}" if address.version == 6 else f"{address}:{end[1]}"
