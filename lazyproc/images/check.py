"""What holds in every checkpoint: references lead somewhere, numbers are possible. Pure.

Images come from disks and networks. What is checked here is not checked again by whoever restores.
"""

from __future__ import annotations

from collections.abc import Iterator

from lazyproc.errors import ImageError
from lazyproc.model import (
    PAGE,
    Checkpoint,
    Epoll,
    InetSocket,
    MemFd,
    Mm,
    OpenFile,
    PipeEnd,
    RegularFile,
    Task,
    TerminalMaster,
    TerminalSlave,
    UnixSocket,
    VmaKind,
)

_SIGINFO = 128  # sizeof(siginfo_t)
_PATH_MAX = 4096
_TERMINALS = 1 << 20  # NR_UNIX98_PTY_MAX


def check(checkpoint: Checkpoint) -> None:
    """Raises ImageError for the first thing that cannot be."""
    _demand_none(_problems(checkpoint))


def check_forecast(part: Checkpoint) -> None:
    """The same of numbers, mappings and files alone."""
    if not part.tasks:
        _demand_none(iter(["there are no tasks"]))
    _demand_none(_number_problems(part))
    for task in part.tasks:
        if task.mm is not None:
            _demand_none(_mm_problems(task.vpid, task.mm, part))
    for file in part.files.values():
        _demand_none(_file_problems(file, part))


def _demand_none(problems: Iterator[str]) -> None:
    for problem in problems:
        raise ImageError(
            problem,
            where="images",
            remedy="take the checkpoint again, or copy it again when it came from elsewhere",
        )


def _problems(checkpoint: Checkpoint) -> Iterator[str]:
    if not checkpoint.root.threads:
        yield f"the root {checkpoint.root.vpid} has ended: nothing of it can run"
    yield from _number_problems(checkpoint)
    for task in checkpoint.tasks:
        yield from _task_problems(task, checkpoint)
    for file in checkpoint.files.values():
        yield from _file_problems(file, checkpoint)
    yield from _terminal_problems(checkpoint)
    for content in checkpoint.contents.values():
        if any(offset + len(data) > content.size for offset, data in content.data):
            yield f"the content {content.id} is longer than its {content.size} bytes"


def _terminal_problems(checkpoint: Checkpoint) -> Iterator[str]:
    resources = [file.resource for file in checkpoint.files.values()]
    masters = [each for each in resources if isinstance(each, TerminalMaster)]
    numbers = [each.number for each in masters]
    for number in {each.number for each in resources if isinstance(each, TerminalSlave)}.difference(numbers):
        yield f"the other end of the terminal /dev/pts/{number} is not in it"
    if len(set(numbers)) != len(numbers) or len({m.session for m in masters if m.session}) != sum(
        m.session > 0 for m in masters
    ):
        yield "two terminals have one number, or one session"
    leaders = {task.vpid for task in checkpoint.tasks if task.sid == task.vpid and task.threads}
    for each in masters:
        if not each.path.startswith("/") or each.number >= _TERMINALS:
            yield f"there can be no terminal /dev/pts/{each.number} of {each.path!r}"
        if each.session and not (each.session in leaders and each.foreground):
            yield f"the session {each.session} cannot have /dev/pts/{each.number} as its terminal"


def _number_problems(checkpoint: Checkpoint) -> Iterator[str]:
    seen: set[int] = set()
    for index, task in enumerate(checkpoint.tasks):
        if index and task.ppid not in seen:
            yield f"the parent {task.ppid} of task {task.vpid} does not stand before it"
        for tid in {task.vpid, *(thread.tid for thread in task.threads)}:
            if tid in seen:
                yield f"two tasks or threads have the number {tid}"
            seen.add(tid)


def _task_problems(task: Task, checkpoint: Checkpoint) -> Iterator[str]:
    files = checkpoint.files
    fds = [descriptor.fd for descriptor in task.descriptors]
    if len(set(fds)) != len(fds):
        yield f"task {task.vpid} has a descriptor twice"
    references = [descriptor.file_id for descriptor in task.descriptors]
    if task.fs is not None:
        references += [task.fs.cwd_id, task.fs.root_id]
    if task.mm is not None:
        references.append(task.mm.exe_id)
        references += [vma.file_id for vma in task.mm.vmas if vma.kind is VmaKind.FILE]
        yield from _mm_problems(task.vpid, task.mm, checkpoint)
    for file_id in references:
        if file_id not in files:
            yield f"task {task.vpid} refers to the missing file {file_id}"
    pending = [*task.pending, *(siginfo for thread in task.threads for siginfo in thread.pending)]
    if any(len(siginfo) != _SIGINFO for siginfo in pending):
        yield f"a pending signal of task {task.vpid} is not {_SIGINFO} bytes"


def _mm_problems(vpid: int, mm: Mm, checkpoint: Checkpoint) -> Iterator[str]:
    end = 0
    for vma in mm.vmas:
        if vma.start < end or vma.start >= vma.end or (vma.start | vma.end | vma.offset) % PAGE:
            yield f"task {vpid} has an impossible mapping {vma.start:#x}-{vma.end:#x}"
        if vma.kind is VmaKind.SHARED and vma.object_id not in checkpoint.shared:
            yield f"the mapping {vma.start:#x} of task {vpid} is of the missing shared memory {vma.object_id}"
        end = vma.end


def _file_problems(file: OpenFile, checkpoint: Checkpoint) -> Iterator[str]:
    match file.resource:
        case RegularFile(path, content_id=content_id):
            if not (path.startswith("/") or file.outside) or len(path) >= _PATH_MAX:
                yield f"file {file.id} has no absolute path"
            if content_id and content_id not in checkpoint.contents:
                yield f"file {file.id} refers to the missing content {content_id}"
        case PipeEnd(pipe_id):
            if pipe_id not in checkpoint.pipes:
                yield f"file {file.id} refers to the missing pipe {pipe_id}"
        case MemFd(object_id):
            if object_id not in checkpoint.shared:
                yield f"file {file.id} refers to the missing shared memory {object_id}"
        case Epoll(targets):
            yield from _missing(file.id, [target.file_id for target in targets], checkpoint)
        case UnixSocket() | InetSocket():
            yield from _missing(
                file.id, [number for packet in file.resource.queue for number in packet.file_ids], checkpoint
            )
        case _:
            pass


def _missing(file_id: int, references: list[int], checkpoint: Checkpoint) -> Iterator[str]:
    for number in references:
        if number not in checkpoint.files:
            yield f"file {file_id} refers to the missing file {number}"
