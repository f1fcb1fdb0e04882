"""Address spaces and shared memory: mm-<vpid>.img and memfd.img (CRIU 4.2: images/mm.proto, memfd.proto).

CRIU 4 writes every shared mapping, anonymous ones too, as a mapping of a memfd: the mapping names an open
file of type MEMFD, the file names the memfd's inode, and the inode's shmid names the pagemap-shmem image. The
writer makes such a file for every object, and the reader drops those that only mappings hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType

from lazyproc.errors import ImageError
from lazyproc.facts import dataclass, replace
from lazyproc.images.extras import Extras
from lazyproc.images.files import ImageWriter, garbled, record, records, to_bytes, to_text
from lazyproc.images.pb import lazyproc_pb2 as own
from lazyproc.images.pb import process_pb2 as pb
from lazyproc.model import (
    DROPPABLE,
    Mm,
    MmFlags,
    OpenFile,
    SharedKind,
    SharedMemory,
    Task,
    Vma,
    VmaKind,
)

MEMFD = "memfd.img"

# vma_entry.status, criu/include/image.h
_REGULAR = 1 << 0
_STACK = 1 << 1
_VSYSCALL = 1 << 2
_VDSO = 1 << 3
_HEAP = 1 << 5
_FILE_PRIVATE = 1 << 6
_FILE_SHARED = 1 << 7
_ANON_SHARED = 1 << 8
_ANON_PRIVATE = 1 << 9
_SYSVIPC = 1 << 10
_VVAR = 1 << 12
_AIORING = 1 << 13
_MEMFD = 1 << 14
_SPECIAL = {
    VmaKind.VDSO: _REGULAR | _VDSO | _ANON_PRIVATE,
    VmaKind.VVAR: _REGULAR | _VVAR | _ANON_PRIVATE,
    VmaKind.VVAR_VCLOCK: _REGULAR | _VVAR | _ANON_PRIVATE,
    VmaKind.AIO: _AIORING,
}
_KINDS = (  # the first that has a bit in the status
    (_VDSO, VmaKind.VDSO),
    (_VVAR, VmaKind.VVAR),
    (_AIORING, VmaKind.AIO),
    (_MEMFD | _SYSVIPC | _ANON_SHARED, VmaKind.SHARED),
    (_FILE_PRIVATE | _FILE_SHARED, VmaKind.FILE),
    (_ANON_PRIVATE, VmaKind.ANON),
)
_KNOWN = (
    _REGULAR | _STACK | _VSYSCALL | _VDSO | _HEAP | _FILE_PRIVATE | _FILE_SHARED | _ANON_SHARED
    | _ANON_PRIVATE | _SYSVIPC | _VVAR | _AIORING | _MEMFD
)  # fmt: skip

_MAP_PRIVATE, _MAP_ANONYMOUS, _MAP_GROWSDOWN, _MAP_LOCKED = 0x2, 0x20, 0x100, 0x2000
_MAP_NORESERVE, _MAP_HUGETLB, _MAP_DROPPABLE = 0x4000, 0x40000, 0x8
_PROT_WRITE = 2
_O_ACCMODE, _O_RDWR = 3, 2
_S_IFREG = 0o100000
# VmFlags of proc_pid_smaps(5) that CRIU keeps: as the number of an advice to madvise(2), or as a MAP_ flag.
_ADVICE = {"rr": 1, "sr": 2, "dc": 10, "mg": 12, "hg": 14, "nh": 15, "dd": 16, "wf": 18}
_MAP_FLAGS = {
    "gd": _MAP_GROWSDOWN,
    "lo": _MAP_LOCKED,
    "nr": _MAP_NORESERVE,
    "ht": _MAP_HUGETLB,
    DROPPABLE: _MAP_DROPPABLE,
}

# CRIU's own: it maps what is no file with these flags and no descriptor, and locks memory by them (criu/mem.c).
_CRIUS_FLAGS = {
    VmaKind.VDSO: _MAP_ANONYMOUS,
    VmaKind.VVAR: _MAP_ANONYMOUS,
    VmaKind.VVAR_VCLOCK: _MAP_ANONYMOUS,
}
_NO_NOTE = own.VmaExtra()
_AUXV_WORDS = 44  # for which CRIU has room (criu/arch/x86/include/asm/types.h, AT_VECTOR_SIZE)

_ANON_NAME = b"/dev/zero"  # CRIU's name of a memfd that stands for shared anonymous memory
_MM_FIELDS = (
    "start_code", "end_code", "start_data", "end_data", "start_stack", "start_brk", "brk",
    "arg_start", "arg_end", "env_start", "env_end",
)  # fmt: skip


# --- shared memory ------------------------------------------------------------------------------------------


def write_shared(shared: Mapping[int, SharedMemory], writer: ImageWriter, extras: own.Extras) -> None:
    """memfd.img, and what it cannot hold into `extras`."""
    for memory in shared.values():
        extra = extras.shared.add(id=memory.id, lazy=memory.lazy)
        if memory.kind is SharedKind.SYSV:
            extra.sysv.key, extra.sysv.shmid, extra.sysv.size = (
                memory.sysv_key,
                memory.sysv_shmid,
                memory.size,
            )
            extra.sysv.mode, extra.sysv.uid, extra.sysv.gid = memory.mode, memory.uid, memory.gid
            continue
        name = to_bytes(memory.name)
        if memory.kind is SharedKind.ANON:
            name = _ANON_NAME
        elif name == _ANON_NAME:
            extra.memfd = True
        entry = pb.memfd_inode_entry(
            name=name, uid=memory.uid, gid=memory.gid, size=memory.size, shmid=memory.id, seals=memory.seals
        )
        entry.inode_id = memory.id
        entry.mode = _S_IFREG | memory.mode
        writer.add(MEMFD, entry)


@dataclass(frozen=True, slots=True)
class SharedTable:
    """The shared memory of a set of images, and the numbers by which mappings and files name it."""

    objects: dict[int, SharedMemory]
    by_inode: Mapping[int, int]  # inode_id of memfd.img -> object id
    by_shmid: Mapping[int, int]  # SysV shmid -> object id

    def of_inode(self, inode: int) -> int:
        if inode not in self.by_inode:
            raise garbled(MEMFD, f"there is no memfd {inode}")
        return self.by_inode[inode]


def read_shared(images: Mapping[str, bytes], extras: Extras) -> SharedTable:
    objects: dict[int, SharedMemory] = {}
    by_inode: dict[int, int] = {}
    for entry, _ in records(images, MEMFD, pb.memfd_inode_entry):
        if entry.hugetlb_flag:
            raise ImageError("a memfd with huge pages", where=MEMFD, remedy="restore it with criu")
        by_inode[entry.inode_id] = entry.shmid
        objects[entry.shmid] = _memfd(entry, extras.shared.get(entry.shmid))
    by_shmid = {}
    for extra in extras.shared.values():
        if extra.HasField("sysv"):
            sysv = extra.sysv
            by_shmid[sysv.shmid] = extra.id
            objects[extra.id] = SharedMemory(
                extra.id, SharedKind.SYSV, sysv.size, mode=sysv.mode, uid=sysv.uid, gid=sysv.gid,
                sysv_key=sysv.key, sysv_shmid=sysv.shmid, lazy=extra.lazy,
            )  # fmt: skip
    return SharedTable(objects, by_inode, by_shmid)


def _memfd(entry: pb.memfd_inode_entry, extra: own.SharedExtra | None) -> SharedMemory:
    anon = entry.name == _ANON_NAME and not (extra and extra.memfd)
    return SharedMemory(
        id=entry.shmid,
        kind=SharedKind.ANON if anon else SharedKind.MEMFD,
        size=entry.size,
        name="" if anon else to_text(entry.name, MEMFD),
        seals=entry.seals,
        mode=entry.mode & 0o7777 if entry.HasField("mode") else 0o777,
        uid=entry.uid,
        gid=entry.gid,
        # Without our word for it anybody may still hold a descriptor of a memfd.
        lazy=extra.lazy if extra else anon,
    )


# --- writing an address space -------------------------------------------------------------------------------


class FlagSets:
    """The distinct sets of VmFlags of a checkpoint; mappings name theirs by number."""

    def __init__(self, extras: own.Extras) -> None:
        self._message = extras.vm_flag_sets
        self._numbers: dict[frozenset[str], int] = {}

    def number(self, flags: frozenset[str]) -> int:
        if flags not in self._numbers:
            self._numbers[flags] = len(self._message)
            self._message.append(" ".join(sorted(flags)).encode("latin-1"))
        return self._numbers[flags]


@dataclass(frozen=True, slots=True)
class WrittenMappings:
    """The mappings of an address space as the images have them; `extra` numbers the sets of VmFlags as `sets` does."""

    vmas: tuple[Vma, ...]
    start_stack: int  # which of them is the stack
    access: Mapping[int, int]  # O_ACCMODE of the files that they map, by file id
    entry: pb.mm_entry
    extra: own.TaskExtra
    sets: tuple[frozenset[str], ...]

    def are_of(self, mm: Mm, access: Mapping[int, int]) -> bool:
        """Whether `mm` has these very mappings, and its files, opened as `access` says, are opened the same."""
        if self.vmas is not mm.vmas or self.start_stack != mm.start_stack:
            return False
        return self.access.items() <= access.items()


@dataclass(frozen=True, slots=True)
class Behind:
    """What mappings refer to: the access mode of each file, shared objects, and the MEMFD file of each of these."""

    access: Mapping[int, int]
    shared: Mapping[int, SharedMemory]
    memfd_files: Mapping[int, int]


def write_mappings(vmas: tuple[Vma, ...], start_stack: int, behind: Behind) -> WrittenMappings:
    """Of an address space, now or beforehand."""
    entry, extra = pb.mm_entry(mm_start_stack=start_stack), own.TaskExtra()
    previous: Vma | None = None
    sets: dict[frozenset[str], tuple[int, int]] = {}  # number, and CRIU's `madv`
    numbers = []
    for index, vma in enumerate(vmas):
        flags = vma.vm_flags
        if flags not in sets:
            sets[flags] = len(sets), sum(1 << number for flag, number in _ADVICE.items() if flag in flags)
        number, advice = sets[flags]
        numbers.append(number)
        if vma.kind is VmaKind.VVAR_VCLOCK:
            extra.vvar_vclock.append(vma.start)
        if _continues(previous, vma):
            entry.vmas[-1].end = vma.end
        else:
            _write_vma(vma, advice, behind, entry)
        if vma.kind is VmaKind.AIO:
            # The ring has the events asked for, doubled, plus two (fs/aio.c, aio_setup_ring).
            entry.aios.add(
                id=vma.start, nr_req=max(vma.length // 32 - 3, 0) // 2, ring_len=vma.length & 0xFFFFFFFF
            )
        if vma.name or vma.huge_pages or vma.guards or vma.reserved or vma.flags & _MAP_GROWSDOWN:
            _write_note(index, vma, entry, extra)
        previous = vma
    extra.vm_flags.extend(numbers)
    mapped = {vma.file_id for vma in vmas if vma.kind is VmaKind.FILE}
    access = {number: behind.access[number] for number in mapped}
    return WrittenMappings(vmas, start_stack, access, entry, extra, tuple(sets))


def access_modes(files: Mapping[int, OpenFile]) -> dict[int, int]:
    """O_ACCMODE by file id."""
    return {number: file.flags & _O_ACCMODE for number, file in files.items()}


def write_mm(
    task: Task,
    mm: Mm,
    behind: Behind,
    writer: ImageWriter,
    extra: own.TaskExtra,
    sets: FlagSets,
    written: WrittenMappings | None = None,
    *,
    foreseen: bool = False,
) -> None:
    """mm-<vpid>.img. `written` are mappings that may be those of `mm`; if they are, and the reader has them
    (`foreseen`), it is only said that they are.
    """
    entry = pb.mm_entry(exe_file_id=mm.exe_id, dumpable=mm.dumpable, thp_disabled=mm.flags.thp_disabled)
    still = written is not None and written.are_of(mm, behind.access)
    if still and foreseen:
        extra.foreseen = True
    else:
        mappings = written if written and still else write_mappings(mm.vmas, mm.start_stack, behind)
        _write_mappings(mappings, entry, extra, sets)
    for name in _MM_FIELDS:
        setattr(entry, f"mm_{name}", getattr(mm, name))
    _write_auxv(mm.auxv, entry, extra)
    extra.vdso_build_id = mm.vdso_build_id
    if mm.future_locks:
        extra.future_locks = mm.future_locks
    _write_flags(mm.flags, extra)
    writer.add(f"mm-{task.vpid}.img", entry)


def _write_flags(flags: MmFlags, extra: own.TaskExtra) -> None:
    """But for what CRIU has a field for."""
    if flags.thp_exceptions:
        extra.thp_exceptions = flags.thp_exceptions
    if flags.mdwe:
        extra.mdwe = flags.mdwe
    if flags.merges:
        extra.merges = True
    if flags.coredump_filter is not None:
        extra.coredump_filter = flags.coredump_filter


def _write_auxv(auxv: Sequence[int], entry: pb.mm_entry, extra: own.TaskExtra) -> None:
    entry.mm_saved_auxv.extend(auxv[:_AUXV_WORDS])
    if len(auxv) > _AUXV_WORDS:
        extra.auxv.extend(auxv)


def _write_mappings(
    mappings: WrittenMappings, entry: pb.mm_entry, extra: own.TaskExtra, sets: FlagSets
) -> None:
    entry.MergeFrom(mappings.entry)
    extra.MergeFrom(mappings.extra)
    numbers = [sets.number(flags) for flags in mappings.sets]
    if numbers != list(range(len(numbers))):
        extra.vm_flags[:] = [numbers[number] for number in mappings.extra.vm_flags]


def _write_note(index: int, vma: Vma, entry: pb.mm_entry, extra: own.TaskExtra) -> None:
    """What the last of CRIU's mappings does not say of `vma`."""
    name_given = vma.name != _implied_name(entry.vmas[-1], entry)
    if name_given or vma.huge_pages or vma.guards or vma.reserved:
        guards = [bound for guard in vma.guards for bound in guard]
        note = extra.vmas.add(index=index, huge_pages=vma.huge_pages, guards=guards)
        if vma.reserved:
            note.reserved = True
        if name_given:
            note.name = to_bytes(vma.name)


def _continues(previous: Vma | None, vma: Vma) -> bool:
    """CRIU knows one VVAR mapping: the kernel's [vvar] and the [vvar_vclock] behind it."""
    return (
        vma.kind is VmaKind.VVAR_VCLOCK
        and previous is not None
        and previous.kind is VmaKind.VVAR
        and previous.end == vma.start
        and (previous.prot, previous.flags, previous.offset) == (vma.prot, vma.flags, vma.offset)
    )


def _write_vma(vma: Vma, advice: int, behind: Behind, mm: pb.mm_entry) -> None:
    entry = mm.vmas.add(
        start=vma.start, end=vma.end, pgoff=vma.offset, prot=vma.prot,
        flags=vma.flags | _CRIUS_FLAGS.get(vma.kind, 0) | _MAP_LOCKED * ("lo" in vma.vm_flags),
        fd=-1, shmid=0, status=_REGULAR | _ANON_PRIVATE,
    )  # fmt: skip
    if advice:
        entry.madv = advice
    mapped = _FILE_PRIVATE if vma.flags & _MAP_PRIVATE else _FILE_SHARED
    if vma.kind is VmaKind.FILE:
        entry.status = _REGULAR | mapped
        entry.shmid = vma.file_id
        entry.fdflags = behind.access[vma.file_id]
    elif vma.kind is VmaKind.SHARED:
        memory = behind.shared[vma.object_id]
        if memory.kind is SharedKind.SYSV:
            entry.status, entry.shmid = _REGULAR | _ANON_SHARED | _SYSVIPC, memory.sysv_shmid
        else:
            entry.status, entry.shmid = _REGULAR | _MEMFD | mapped, behind.memfd_files[vma.object_id]
            writable = "mw" in vma.vm_flags or vma.prot & _PROT_WRITE
            entry.fdflags = _O_RDWR if writable and mapped == _FILE_SHARED else 0
    elif vma.kind is not VmaKind.ANON:
        entry.status = _SPECIAL[vma.kind]
    elif vma.name == "[heap]":
        entry.status |= _HEAP


# --- reading an address space -------------------------------------------------------------------------------


def read_mm(
    vpid: int,
    images: Mapping[str, bytes],
    extras: Extras,
    shared: SharedTable,
    memfd_files: Mapping[int, int],
    foreseen: Mapping[int, tuple[Vma, ...]] = MappingProxyType({}),
) -> tuple[Mm, dict[int, int]]:
    """The address space, and for each file that it maps shared the access mode that the mapping needs.

    `memfd_files` tells the object of each MEMFD file, `foreseen` the mappings that came before, by vpid. Shared
    anonymous memory of CRIU < 4, which has no record of its own, is added to `shared`.
    """
    name = f"mm-{vpid}.img"
    entry = record(images, name, pb.mm_entry)
    extra = extras.tasks.get(vpid, own.TaskExtra(vpid=vpid))
    access: dict[int, int] = {}
    if not extra.foreseen:
        vmas = tuple(_read_vmas(entry, extra, extras, shared, memfd_files, access, name))
    elif vpid in foreseen:
        vmas = foreseen[vpid]
    else:
        raise garbled(name, "its mappings are said to be foreseen, and nobody has them")
    mm = Mm(
        **{field: getattr(entry, f"mm_{field}") for field in _MM_FIELDS},
        auxv=tuple(extra.auxv or entry.mm_saved_auxv),
        exe_id=entry.exe_file_id,
        dumpable=entry.dumpable if entry.HasField("dumpable") else 1,
        vmas=vmas,
        vdso_build_id=extra.vdso_build_id,
        future_locks=extra.future_locks,
        flags=MmFlags(
            entry.thp_disabled,
            extra.thp_exceptions,
            extra.mdwe,
            extra.merges,
            extra.coredump_filter if extra.HasField("coredump_filter") else None,
        ),
    )
    return mm, access


def _read_vmas(
    entry: pb.mm_entry,
    extra: own.TaskExtra,
    extras: Extras,
    shared: SharedTable,
    memfd_files: Mapping[int, int],
    access: dict[int, int],
    name: str,
) -> Iterator[Vma]:
    """The mappings; `access` gets the access modes."""
    messages = [
        message for message in _split_vvar(entry.vmas, extra.vvar_vclock) if not message.status & _VSYSCALL
    ]  # the kernel makes [vsyscall] for everybody
    if extra.vm_flags and len(extra.vm_flags) != len(messages):
        raise garbled(name, f"{len(messages)} mappings, and lazyproc.img speaks of {len(extra.vm_flags)}")
    notes = {note.index: note for note in extra.vmas}
    kinds: dict[int, VmaKind] = {}  # by status, of which thousands of mappings have a few
    for index, message in enumerate(messages):
        status = message.status
        kind = kinds[status] if status in kinds else kinds.setdefault(status, _kind(message, name))
        file_id = object_id = 0
        if kind is VmaKind.FILE:
            file_id = message.shmid
            if message.HasField("fdflags"):
                access[file_id] = max(access.get(file_id, 0), message.fdflags & _O_ACCMODE)
        elif kind is VmaKind.SHARED:
            object_id = _object_of(message, shared, memfd_files, name)
        elif kind is VmaKind.VVAR and message.start in extra.vvar_vclock:
            kind = VmaKind.VVAR_VCLOCK
        note, label = notes.get(index, _NO_NOTE), _implied_name(message, entry)
        yield Vma(
            message.start, message.end, message.prot, message.flags & ~(_CRIUS_FLAGS.get(kind, 0) | _MAP_LOCKED),
            kind, message.pgoff, file_id, object_id,
            extras.vm_flags(extra.vm_flags[index]) if extra.vm_flags else _implied_flags(message),
            to_text(note.name, name) if note.HasField("name") else label,
            note.huge_pages, _guards(note, name), note.reserved,
        )  # fmt: skip


def _split_vvar(entries: Iterable[pb.vma_entry], vclocks: Iterable[int]) -> Iterator[pb.vma_entry]:
    starts = set(vclocks)
    for entry in entries:
        if starts and entry.status & _VVAR:
            for start in sorted(start for start in starts if entry.start < start < entry.end):
                first = pb.vma_entry()
                first.CopyFrom(entry)
                first.end = entry.start = start
                yield first
        yield entry


def _guards(note: own.VmaExtra, name: str) -> tuple[tuple[int, int], ...]:
    if len(note.guards) % 2:
        raise garbled(name, f"{len(note.guards)} bounds of guarded memory in lazyproc.img")
    return tuple(zip(note.guards[::2], note.guards[1::2], strict=True))


def _implied_flags(entry: pb.vma_entry) -> frozenset[str]:
    """The VmFlags as far as CRIU's fields tell them."""
    flags = {flag for flag, number in _ADVICE.items() if entry.madv >> number & 1}
    return frozenset(flags | {flag for flag, bit in _MAP_FLAGS.items() if entry.flags & bit})


def _kind(entry: pb.vma_entry, name: str) -> VmaKind:
    status = entry.status
    if status & ~_KNOWN:
        raise ImageError(
            f"the mapping {entry.start:#x}-{entry.end:#x} is of a kind that lazyproc lacks ({status:#x})",
            where=name,
            remedy="restore it with criu",
        )
    for bits, kind in _KINDS:
        if status & bits:
            return kind
    raise garbled(name, f"the mapping {entry.start:#x}-{entry.end:#x} has status {status:#x}")


def _object_of(entry: pb.vma_entry, shared: SharedTable, memfd_files: Mapping[int, int], name: str) -> int:
    if entry.status & _MEMFD:
        if entry.shmid not in memfd_files:
            raise garbled(
                name, f"the mapping {entry.start:#x}-{entry.end:#x} is of the missing file {entry.shmid}"
            )
        return memfd_files[entry.shmid]
    if entry.status & _SYSVIPC:
        if entry.shmid not in shared.by_shmid:
            raise ImageError(
                f"SysV shared memory {entry.shmid} of an ipc namespace",
                where=name,
                remedy="restore it with criu",
            )
        return shared.by_shmid[entry.shmid]
    size = entry.pgoff + entry.end - entry.start
    before = shared.objects.get(entry.shmid, SharedMemory(entry.shmid, SharedKind.ANON, size))
    shared.objects[entry.shmid] = replace(before, size=max(before.size, size))
    return entry.shmid


def _implied_name(entry: pb.vma_entry, mm: pb.mm_entry) -> str:
    """The name as far as CRIU's fields tell it."""
    if entry.status & _HEAP:
        return "[heap]"
    if entry.flags & _MAP_GROWSDOWN and entry.start <= mm.mm_start_stack < entry.end:
        return "[stack]"
    return ""


def mapping_access(file: OpenFile, mode: int) -> OpenFile:
    """A file that only mappings hold, opened as they need it: CRIU writes that next to the mapping."""
    return replace(file, flags=file.flags & ~_O_ACCMODE | mode)
