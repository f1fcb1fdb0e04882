"""What a source says of its tree before it stops it: processes, mappings, the files behind these. Pure.

The images are those of a checkpoint, as far as that is known: of mm-<vpid>.img the mappings and the start of the stack.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lazyproc.facts import dataclass
from lazyproc.images import check, memory
from lazyproc.images.convert import PSTREE
from lazyproc.images.extras import VERSION, Extras, read_extras
from lazyproc.images.files import EXTRAS, ImageWriter, garbled, records
from lazyproc.images.openfiles import FileWriter
from lazyproc.images.openfiles_read import FileReader
from lazyproc.images.pb import lazyproc_pb2 as own
from lazyproc.images.pb import process_pb2 as pb
from lazyproc.model import Checkpoint, Clocks, Mm, OpenFile, RegularFile, Task, TaskState, Vma, VmaKind

MOVABLE = frozenset(VmaKind) - {VmaKind.SHARED, VmaKind.AIO}  # of which all is known before


@dataclass(frozen=True, slots=True)
class Room:
    """For how much a process needs room: its highest descriptor (-1: none), how many it has, its threads."""

    highest_fd: int
    descriptors: int
    threads: int

    @classmethod
    def of(cls, task: Task) -> Room:
        highest = max((each.fd for each in task.descriptors), default=-1)
        return cls(highest, len(task.descriptors), len(task.threads))


@dataclass(frozen=True, slots=True)
class Forecast:
    """`tree` has of its processes the numbers, the exit signals and the mappings (no `mm`: they are not known), and the
    files behind these; `rooms` by vpid.
    """

    tree: Checkpoint
    rooms: Mapping[int, Room]

    @property
    def mappings(self) -> dict[int, tuple[Vma, ...]]:
        """By vpid, of the tasks of which they are known."""
        return {task.vpid: task.mm.vmas for task in self.tree.tasks if task.mm}

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Forecast:
        """What has come true."""
        return cls(checkpoint, {task.vpid: Room.of(task) for task in checkpoint.tasks})


def part(tasks: Iterable[Task], files: Mapping[int, OpenFile]) -> Checkpoint:
    """A checkpoint of which no more than this is known."""
    return Checkpoint(tuple(tasks), files, {}, {}, {}, {}, Clocks(0, 0, 0))


def bare_task(
    numbers: tuple[int, int, int, int], exit_signal: int, vmas: tuple[Vma, ...] | None, start_stack: int = 0
) -> Task:
    """Of a process whose `numbers` are vpid, ppid, pgid and sid."""
    mm = None
    if vmas is not None:
        mm = Mm(0, 0, 0, 0, 0, 0, start_stack, 0, 0, 0, 0, (), 0, 0, vmas=vmas)
    return Task(*numbers, TaskState.ALIVE, "", exit_signal=exit_signal, mm=mm)


def can_be_foreseen(vmas: Iterable[Vma], files: Mapping[int, OpenFile]) -> bool:
    """Whether an address space with these mappings can be made of them and `files` alone."""
    return all(vma.file_id in files if vma.kind is VmaKind.FILE else vma.kind in MOVABLE for vma in vmas)


def can_be_opened(file: OpenFile) -> bool:
    """Whether it can be, by its path, before the tree is stopped."""
    return isinstance(file.resource, RegularFile) and not file.resource.content_id


def forecast_images(forecast: Forecast, written: Iterable[memory.WrittenMappings] = ()) -> dict[str, bytes]:
    """The images of a forecast by name; `written` as for to_images."""
    writer, extras = ImageWriter(), own.Extras(version=VERSION)
    FileWriter(forecast.tree, writer, extras).write_files()
    behind = memory.Behind(memory.access_modes(forecast.tree.files), {}, {})
    sets, known = memory.FlagSets(extras), {id(each.vmas): each for each in written}
    for task in forecast.tree.tasks:
        writer.add(PSTREE, pb.pstree_entry(pid=task.vpid, ppid=task.ppid, pgid=task.pgid, sid=task.sid))
        room = forecast.rooms[task.vpid]
        extra = extras.tasks.add(vpid=task.vpid, exit_signal=task.exit_signal)
        extra.room.highest_fd, extra.room.descriptors, extra.room.threads = (
            room.highest_fd,
            room.descriptors,
            room.threads,
        )
        if task.mm is not None:
            memory.write_mm(task, task.mm, behind, writer, extra, sets, known.get(id(task.mm.vmas)))
    writer.add(EXTRAS, extras)
    return writer.finish()


def read_forecast(images: Mapping[str, bytes]) -> Forecast:
    """What `forecast_images` wrote. Raises ImageError for anything else."""
    extras, nothing_shared = read_extras(images), memory.SharedTable({}, {}, {})
    files = FileReader(images, extras, nothing_shared).read_files([])
    tasks, access = [], dict[int, int]()
    for entry, _ in records(images, PSTREE, pb.pstree_entry):
        vmas, start_stack = None, 0
        if f"mm-{entry.pid}.img" in images:
            mm, modes = memory.read_mm(entry.pid, images, extras, nothing_shared, {})
            vmas, start_stack = mm.vmas, mm.start_stack
            access |= {number: max(mode, access.get(number, 0)) for number, mode in modes.items()}
        numbers = (entry.pid, entry.ppid, entry.pgid, entry.sid)
        tasks.append(bare_task(numbers, _extra(extras, entry.pid).exit_signal, vmas, start_stack))
    for number, mode in access.items():
        if number in files:
            files[number] = memory.mapping_access(files[number], mode)
    rooms = {task.vpid: _room(_extra(extras, task.vpid)) for task in tasks}
    found = Forecast(part(tasks, files), rooms)
    _check(found)
    return found


def _extra(extras: Extras, vpid: int) -> own.TaskExtra:
    if vpid not in extras.tasks or not extras.tasks[vpid].HasField("room"):
        raise garbled(EXTRAS, f"no room for task {vpid}")
    return extras.tasks[vpid]


def _room(extra: own.TaskExtra) -> Room:
    return Room(extra.room.highest_fd, extra.room.descriptors, extra.room.threads)


def _check(forecast: Forecast) -> None:
    check.check_forecast(forecast.tree)
    files = forecast.tree.files
    if not all(map(can_be_opened, files.values())):
        raise garbled(EXTRAS, "a file that cannot be opened before the tree is stopped")
    for task in forecast.tree.tasks:
        if task.mm and not can_be_foreseen(task.mm.vmas, files):
            raise garbled(f"mm-{task.vpid}.img", "a mapping that cannot be made before the tree is stopped")
