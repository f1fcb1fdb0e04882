"""A checkpoint as images and back. Pure: no file is opened, no syscall made.

The layout is that of CRIU 4.2, so that `criu restore` and crit take what lazyproc wrote and lazyproc takes
what `criu dump` wrote. Every task has ids, descriptor table, fs and signal handlers of its own and lives in
the namespaces of whoever restores it.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType

from lazyproc.errors import ImageError
from lazyproc.facts import replace
from lazyproc.images import check, foreign, locks, memory, tasks, threads
from lazyproc.images.contents import read_contents, write_contents
from lazyproc.images.extras import VERSION, Extras, read_extras
from lazyproc.images.files import (
    EXTRAS,
    GUEST,
    INVENTORY,
    ImageWriter,
    M,
    demand,
    garbled,
    open_image,
    record,
    records,
    to_bytes,
    to_text,
)
from lazyproc.images.openfiles import FileWriter
from lazyproc.images.openfiles_read import FileReader
from lazyproc.images.pagemap import read_pagemap, to_extents, write_pagemap
from lazyproc.images.pb import lazyproc_pb2 as own
from lazyproc.images.pb import process_pb2 as pb
from lazyproc.images.sums import check_sums
from lazyproc.model import (
    Checkpoint,
    Clocks,
    Descriptor,
    Fs,
    MemoryObject,
    Mm,
    ObjectKind,
    SharedMemory,
    Task,
    TaskState,
    Vma,
)
from lazyproc.runs import Extents

PSTREE = "pstree.img"
CGROUP = "cgroup.img"
SECCOMP = "seccomp.img"
TIMENS = "timens-0.img"
_IMG_VERSION = 2  # CRTOOLS_IMAGES_V1_1
_COMPRESSED_VERSION = 3  # CRTOOLS_IMAGES_V1_2 of CRIU's development branch: pages may be compressed
_NETWORK_LOCK_SKIP = 2  # lazyproc leaves no firewall rule behind for CRIU to take away
_NAMESPACES = ("pid", "net", "ipc", "uts", "mnt", "user", "cgroup", "time")
_OWN_NAMESPACES = ("net", "ipc", "uts", "mnt", "user", "cgroup")  # which a restore by lazyproc does not build
_NO_LOGINUID = 0xFFFFFFFF


# --- writing ------------------------------------------------------------------------------------------------


def to_images(
    checkpoint: Checkpoint,
    *,
    lazy_elsewhere: bool = False,
    written: Iterable[memory.WrittenMappings] = (),
    foreseen: Collection[int] = (),
    for_criu: bool = True,
) -> dict[str, bytes]:
    """Every image but the pages, by name. With `lazy_elsewhere` lazy pages are said to be at a page server. `written`
    are mappings that were encoded beforehand, taken where they are still those of the checkpoint; the reader has had
    those of the tasks `foreseen` (vpids) in a forecast. Unless they are `for_criu` too, they cost less.

    Raises ImageError when the checkpoint breaks a rule of the format (resource limits with a gap).
    """
    writer, extras = ImageWriter(), own.Extras(version=VERSION)
    extras.realtime_ns = checkpoint.clocks.realtime_ns
    extras.hostname = to_bytes(checkpoint.hostname)
    if checkpoint.held:
        extras.held = to_bytes(checkpoint.held)
    cgroups, seccomp = tasks.CgroupTable(), threads.SeccompTable(shared=_threads_share_filters(checkpoint))
    files = FileWriter(checkpoint, writer, extras)
    root_cgroups = cgroups.add(checkpoint.root.cgroups)
    _write_inventory(writer, root_cgroups)
    files.write_files()
    behind = memory.Behind(memory.access_modes(checkpoint.files), checkpoint.shared, files.write_memfds())
    files.write_pipes()
    memory.write_shared(checkpoint.shared, writer, extras)
    write_contents(checkpoint, writer, extras)
    sets = memory.FlagSets(extras)
    known = {id(each.vmas): each for each in written}
    for number, task in enumerate(checkpoint.tasks, start=2):
        _write_cores(task, root_cgroups, seccomp, writer, extras, for_criu=for_criu)
        extra = extras.tasks.add(vpid=task.vpid, exit_signal=task.exit_signal)
        if (number_of_cgroups := cgroups.add(task.cgroups)) != root_cgroups:
            extra.cgroup_set = number_of_cgroups
        if task.xfeatures:
            extra.xfeatures = task.xfeatures
        if task.mce_kill != extra.mce_kill:
            extra.mce_kill = task.mce_kill
        if task.state is not TaskState.ZOMBIE:
            _write_alive(task, number, files, writer)
        if task.mm is not None:
            mappings = known.get(id(task.mm.vmas))
            said = task.vpid in foreseen
            memory.write_mm(task, task.mm, behind, writer, extra, sets, mappings, foreseen=said)
    locks.write(checkpoint.tasks, writer)
    if cgroups.message.sets:
        writer.add(CGROUP, cgroups.message)
    writer.add(SECCOMP, seccomp.message)
    clocks = checkpoint.clocks
    writer.add(
        TIMENS,
        pb.timens_entry(monotonic=_timespec(clocks.monotonic_ns), boottime=_timespec(clocks.boottime_ns)),
    )
    images = writer.finish() | pagemap_images(checkpoint, lazy_elsewhere=lazy_elsewhere)
    extras.images.extend(name.encode() for name in images)
    writer.add(EXTRAS, extras)
    return images | writer.finish()


def memory_objects(checkpoint: Checkpoint) -> list[MemoryObject]:
    """Everything that has a pagemap; the pages of the first are in pages-1.img and so on."""
    return _objects(checkpoint.tasks, checkpoint.shared)


def _objects(found: Sequence[Task], shared: Mapping[int, SharedMemory]) -> list[MemoryObject]:
    objects = [MemoryObject(ObjectKind.TASK, task.vpid) for task in found if task.mm is not None]
    # CRIU has no pagemap for a memfd of size 0.
    return objects + [MemoryObject(ObjectKind.SHARED, number) for number, held in shared.items() if held.size]


def pagemap_images(checkpoint: Checkpoint, *, lazy_elsewhere: bool = False) -> dict[str, bytes]:
    """The pagemaps alone."""
    writer = ImageWriter()
    for pages_id, obj in enumerate(memory_objects(checkpoint), start=1):
        extents = checkpoint.memory.get(obj, ())
        write_pagemap(writer, pagemap_name(obj), pages_id, extents, lazy_elsewhere=lazy_elsewhere)
    return writer.finish()


def pagemap_name(obj: MemoryObject) -> str:
    return f"pagemap-shmem-{obj.id}.img" if obj.kind is ObjectKind.SHARED else f"pagemap-{obj.id}.img"


def _ids(number: int) -> pb.task_kobj_ids_entry:
    """Ids of a task that shares nothing; those of namespaces are the same for all, the inventory included."""
    ids = pb.task_kobj_ids_entry(vm_id=number, files_id=number, fs_id=number, sighand_id=number)
    for namespace, namespace_id in zip(_NAMESPACES, range(1, 9), strict=True):
        setattr(ids, f"{namespace}_ns_id", namespace_id)
    return ids


def _write_inventory(writer: ImageWriter, root_cgroups: int) -> None:
    inventory = pb.inventory_entry(
        img_version=_IMG_VERSION,
        fdinfo_per_id=True,
        ns_per_id=True,
        root_ids=_ids(1),
        lsmtype=pb.NO_LSM,
        network_lock_method=_NETWORK_LOCK_SKIP,
        plugins_entry=pb.plugins_entry(),
    )
    if root_cgroups:
        inventory.root_cg_set = root_cgroups
    writer.add(INVENTORY, inventory)


def _write_cores(
    task: Task,
    cgroup_set: int,
    seccomp: threads.SeccompTable,
    writer: ImageWriter,
    extras: own.Extras,
    *,
    for_criu: bool,
) -> None:
    """pstree and core-<tid> of every thread; a zombie has one core."""
    tids = [thread.tid for thread in task.threads] or [task.vpid]
    writer.add(
        PSTREE, pb.pstree_entry(pid=task.vpid, ppid=task.ppid, pgid=task.pgid, sid=task.sid, threads=tids)
    )
    if not task.threads:
        core = pb.core_entry()
        tasks.write_task(task, core)
        writer.add(f"core-{task.vpid}.img", core)
    for index, thread in enumerate(task.threads):
        core = pb.core_entry()
        extra = extras.threads.add(tid=thread.tid)
        threads.write_thread(thread, core, extra, seccomp, leads=not index, for_criu=for_criu)
        if cgroup_set:
            core.thread_core.cg_set = cgroup_set
        if not index:
            tasks.write_task(task, core)
        writer.add(f"core-{thread.tid}.img", core)


def _threads_share_filters(checkpoint: Checkpoint) -> bool:
    return all(
        len({(thread.seccomp_mode, thread.seccomp) for thread in task.threads}) < 2
        for task in checkpoint.tasks
    )


def _write_alive(task: Task, number: int, files: FileWriter, writer: ImageWriter) -> None:
    """ids, fs and the descriptor table of a task that is no zombie."""
    writer.add(f"ids-{task.vpid}.img", _ids(number))
    files.write_descriptors(f"fdinfo-{number}.img", task.descriptors)
    if task.fs is not None:
        fs = pb.fs_entry(cwd_id=task.fs.cwd_id, root_id=task.fs.root_id, umask=task.fs.umask)
        writer.add(f"fs-{task.vpid}.img", fs)


def _timespec(nanoseconds: int) -> pb.timespec:
    seconds, rest = divmod(nanoseconds, tasks.SECOND_NS)
    return pb.timespec(tv_sec=seconds, tv_nsec=rest)


# --- reading ------------------------------------------------------------------------------------------------


def from_images(
    images: Mapping[str, bytes], foreseen: Mapping[int, tuple[Vma, ...]] = MappingProxyType({})
) -> Checkpoint:
    """The checkpoint that the images describe, those of CRIU's included. `foreseen` are the mappings of tasks, by vpid,
    that came in a forecast.

    Raises ImageError when an image is missing, truncated, garbled or contradicts another, and when the
    checkpoint has something that lazyproc cannot restore: nothing is left out in silence.
    """
    if GUEST in images:
        raise ImageError(
            "holds the guest of a QEMU, and no process",
            where=GUEST,
            remedy="resume it with lazyproc qemu-serve -D",
        )
    try:
        checkpoint = _from_images(images, foreseen)
        check.check(checkpoint)
    except (OverflowError, struct.error) as error:
        # A number that no field of the kernel's has; which image it was in is in the traceback.
        raise garbled("images", f"a number out of range ({error})") from error
    return checkpoint


def _from_images(images: Mapping[str, bytes], foreseen: Mapping[int, tuple[Vma, ...]]) -> Checkpoint:
    check_sums(images)
    inventory = record(images, INVENTORY, pb.inventory_entry)
    if inventory.img_version not in (_IMG_VERSION, _COMPRESSED_VERSION) or not inventory.fdinfo_per_id:
        raise ImageError(
            f"images of version {inventory.img_version}",
            where=INVENTORY,
            remedy="take the checkpoint with CRIU >= 3",
        )
    foreign.refuse(images, inventory)
    extras = read_extras(images)
    for name in extras.message.images:
        demand(images, to_text(name, EXTRAS))
    shared = memory.read_shared(images, extras)
    files = FileReader(images, extras, shared)
    reader = _TaskReader(images, extras, inventory, files, shared, foreseen)
    found = tuple(reader.read_tasks())
    if not found:
        raise garbled(PSTREE, "no tasks")
    opened = files.read_files([task.descriptors for task in found])
    held = {item.file_id for task in found for item in task.descriptors}
    for file_id, mode in reader.access.items():
        if file_id in opened and file_id not in held:
            opened[file_id] = memory.mapping_access(opened[file_id], mode)
    return Checkpoint(
        tasks=found,
        files=opened,
        pipes=files.read_pipes(),
        shared=shared.objects,
        contents=read_contents(images, extras),
        memory=_read_memory(images, found, shared.objects),
        clocks=_read_clocks(images, extras),
        hostname=to_text(extras.message.hostname, EXTRAS),
        held=to_text(extras.message.held, EXTRAS),
    )


class _TaskReader:
    """Reads the tasks. `access` collects the access modes that mappings need of the files they map."""

    def __init__(
        self,
        images: Mapping[str, bytes],
        extras: Extras,
        inventory: pb.inventory_entry,
        files: FileReader,
        shared: memory.SharedTable,
        foreseen: Mapping[int, tuple[Vma, ...]],
    ) -> None:
        self._images = images
        self._foreseen = foreseen
        self._extras = extras
        self._inventory = inventory
        self._files = files
        self._shared = shared
        self._memfd_files = files.memfd_files()
        self._cgroups = tasks.read_cgroups(_only(images, CGROUP, pb.cgroup_entry))
        self._seccomp = _only(images, SECCOMP, pb.seccomp_entry)
        self._locks = locks.read(images)
        self._owners: dict[tuple[str, int], int] = {}
        self.access: dict[int, int] = {}

    def read_tasks(self) -> Iterator[Task]:
        for entry, _ in records(self._images, PSTREE, pb.pstree_entry):
            yield self._read_task(entry)

    def _read_task(self, entry: pb.pstree_entry) -> Task:
        name = f"core-{entry.pid}.img"
        core = record(self._images, name, pb.core_entry)
        if not core.HasField("tc"):
            raise garbled(name, "no task_core")
        tc, extra = core.tc, self._extras.tasks.get(entry.pid, own.TaskExtra(vpid=entry.pid))
        task = Task(
            vpid=entry.pid, ppid=entry.ppid, pgid=entry.pgid, sid=entry.sid,
            state=tasks.state_of(tc, name),
            comm=to_text(tc.comm, name),
            exit_code=tc.exit_code,
            exit_signal=extra.exit_signal,
            stop_signal=tc.stop_signo,
            personality=tc.personality,
            oom_score_adj=tc.oom_score_adj,
            loginuid=tc.loginuid if tc.HasField("loginuid") else _NO_LOGINUID,
            child_subreaper=tc.child_subreaper,
            membarriers=tc.membarrier_registration_mask,
            xfeatures=extra.xfeatures,
            mce_kill=extra.mce_kill,
        )  # fmt: skip
        # The threads that CRIU writes down for a zombie are not initialized memory of its own.
        return task if task.state is TaskState.ZOMBIE else self._read_alive(task, entry.threads, core)

    def _read_alive(self, task: Task, tids: Sequence[int], leader: pb.core_entry) -> Task:
        name = f"core-{task.vpid}.img"
        if not tids or tids[0] != task.vpid:
            raise garbled(PSTREE, f"task {task.vpid} does not lead its threads")
        cores = [leader] + [record(self._images, f"core-{tid}.img", pb.core_entry) for tid in tids[1:]]
        descriptors = self._read_descriptors(task.vpid)
        mm, fs = self._read_mm(task.vpid), record(self._images, f"fs-{task.vpid}.img", pb.fs_entry)
        extra = self._extras.tasks.get(task.vpid, own.TaskExtra(vpid=task.vpid))
        cgroups = extra.cgroup_set if extra.HasField("cgroup_set") else tasks.cgroup_set(leader)
        read = [
            threads.read_thread(tid, core, self._extras, self._seccomp, f"core-{tid}.img")
            for tid, core in zip(tids, cores, strict=True)
        ]
        return replace(
            task,
            threads=threads.with_leaders_filters(read, leader, self._seccomp),
            mm=mm,
            fs=Fs(fs.cwd_id, fs.root_id, fs.umask),
            descriptors=descriptors,
            sigactions=tasks.read_sigactions(leader.tc, name),
            pending=tasks.read_pending(leader.tc),
            itimers=tasks.read_itimers(leader.tc.timers),
            posix_timers=tasks.read_posix_timers(leader.tc.timers),
            limits=tasks.read_limits(leader.tc.rlimits),
            cgroups=self._cgroups.get(cgroups, {}),
            locks=self._locks.get(task.vpid, ()),
        )

    def _read_descriptors(self, vpid: int) -> tuple[Descriptor, ...]:
        name = f"ids-{vpid}.img"
        ids = record(self._images, name, pb.task_kobj_ids_entry)
        for namespace in _OWN_NAMESPACES:
            field = f"{namespace}_ns_id"
            if getattr(ids, field) != getattr(self._inventory.root_ids, field):
                raise ImageError(
                    f"task {vpid} has a {namespace} namespace of its own",
                    where=name,
                    remedy="restore it with criu",
                )
        for kind, number in (
            ("vm", ids.vm_id),
            ("files", ids.files_id),
            ("fs", ids.fs_id),
            ("sighand", ids.sighand_id),
        ):
            other = self._owners.setdefault((kind, number), vpid)
            if other != vpid:
                raise ImageError(
                    f"tasks {other} and {vpid} share their {kind} (clone(2) without CLONE_THREAD)",
                    where=name,
                    remedy="restore it with criu",
                )
        return self._files.read_descriptors(f"fdinfo-{ids.files_id}.img")

    def _read_mm(self, vpid: int) -> Mm:
        mm, access = memory.read_mm(
            vpid, self._images, self._extras, self._shared, self._memfd_files, self._foreseen
        )
        for file_id, mode in access.items():
            self.access[file_id] = max(mode, self.access.get(file_id, 0))
        return mm


def _only(images: Mapping[str, bytes], name: str, kind: type[M]) -> M:
    return record(images, name, kind) if name in images else kind()


def _read_memory(
    images: Mapping[str, bytes], found: Sequence[Task], shared: Mapping[int, SharedMemory]
) -> dict[MemoryObject, Extents]:
    extents = {}
    for obj in _objects(found, shared):
        # A pagemap that is missing must not read as memory full of zeros.
        if runs := to_extents(read_pagemap(open_image(images, pagemap_name(obj)))):
            extents[obj] = runs
    return extents


def _read_clocks(images: Mapping[str, bytes], extras: Extras) -> Clocks:
    entry = record(images, TIMENS, pb.timens_entry) if TIMENS in images else pb.timens_entry()
    return Clocks(
        monotonic_ns=entry.monotonic.tv_sec * tasks.SECOND_NS + entry.monotonic.tv_nsec,
        boottime_ns=entry.boottime.tv_sec * tasks.SECOND_NS + entry.boottime.tv_nsec,
        realtime_ns=extras.message.realtime_ns,
    )
