"""An address space from its model: everything else unmapped, each mapping where it was, the mm's own fields."""

from __future__ import annotations

import functools
import mmap
import os
import struct
from collections.abc import Iterator, Mapping, Sequence

from lazyproc.errors import RestoreError, TraceeError
from lazyproc.kernel import arch_x86_64 as arch
from lazyproc.kernel import elf
from lazyproc.kernel.nursery import DATA, DATA_SIZE, TEXT
from lazyproc.kernel.remote import BLOB, MAP_FIXED_NOREPLACE, Bench, Call, find_hole
from lazyproc.model import PAGE, Mm, SharedKind, SharedMemory, Vma, VmaKind
from lazyproc.restore import aio
from lazyproc.restore.site import Site

PR_SET_MM, PR_SET_MM_MAP = 35, 14
PR_SET_THP_DISABLE, PR_SET_MDWE, PR_SET_MEMORY_MERGE = 41, 65, 67
PR_SET_VMA, PR_SET_VMA_ANON_NAME = 0x53564D41, 0
MM_MAP = struct.Struct("<12QIi")  # struct prctl_mm_map, include/uapi/linux/prctl.h
MLOCK_ONFAULT = 1
SHM_RDONLY, SHM_EXEC = 0o10000, 0o100000
ROWS_PER_VMA, ROWS_PER_DESCRIPTOR = 6, 3
ROW_BYTES = 64
BYTES_PER_THREAD = 8192  # its calls and their arguments

# VmFlags -> madvise(2) advice that sets them. Those of huge pages may be unknown to the kernel.
ADVICE = {"rr": 1, "sr": 2, "dc": 10, "mg": 12, "hg": 14, "nh": 15, "dd": 16, "wf": 18}
MADV_GUARD_INSTALL = 102  # Linux 6.13
NO_FD = arch.MASK64  # -1
VDSO_KINDS = (VmaKind.VDSO, VmaKind.VVAR, VmaKind.VVAR_VCLOCK)


def move_in(site: Site, size: int) -> None:
    """Map a bench with `size` bytes in a hole of the *future* address space, go there, and unmap everything else (with
    the next run).
    """
    mm = site.task.mm
    assert mm is not None
    old = [(TEXT, TEXT + PAGE), (DATA, DATA + DATA_SIZE)]
    hole = find_hole(sorted([*old, *((v.start, v.end) for v in mm.vmas), _stack_of(site)]), PAGE + size)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED_NOREPLACE
    site.run(
        Call("mmap", (hole, PAGE, mmap.PROT_READ | mmap.PROT_EXEC, flags, -1, 0)),
        Call("mmap", (hole + PAGE, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)),
    )
    site.memory.write(hole, BLOB)
    site.bench = Bench(site.memory, hole, hole + PAGE, size, site.bench.ending)
    end = hole + PAGE + size
    site.run_later(
        Call("munmap", (0, hole)),
        Call("munmap", (end, arch.TASK_SIZE - end)),
    )


def bench_range(site: Site) -> tuple[int, int]:
    """Start and length of the bench, for the munmap that is the process's last call of ours."""
    return site.bench.code, PAGE + site.bench.size


def _stack_of(site: Site) -> tuple[int, int]:
    sp = site.leader.registers().sp
    return (sp & -PAGE, (sp & -PAGE) + PAGE) if sp > DATA + DATA_SIZE else (TEXT, TEXT)


def bench_size(vmas: Sequence[Vma], descriptors: int, threads: int) -> int:
    """What a process with so much needs for all that is called in it."""
    rows = len(vmas) * ROWS_PER_VMA + sum(len(vma.guards) for vma in vmas)
    size = (rows + descriptors * ROWS_PER_DESCRIPTOR) * ROW_BYTES + threads * BYTES_PER_THREAD + (1 << 18)
    return (size + PAGE - 1) & -PAGE


def map_all(
    site: Site, shared: Mapping[int, SharedMemory], files: Mapping[int, int], objects: Mapping[int, int]
) -> None:
    """Map everything, with the next run. `files` and `objects` are our descriptors by OpenFile and SharedMemory id."""
    mm = site.task.mm
    assert mm is not None
    file_ids = sorted({vma.file_id for vma in mm.vmas if vma.kind is VmaKind.FILE})
    object_ids = sorted({vma.object_id for vma in mm.vmas if vma.kind is VmaKind.SHARED})
    lent = [files[i] for i in file_ids] + [objects[i] for i in object_ids]
    numbers = range(len(lent))  # its table is empty but for the transport, which is above them
    site.receive_later(lent, numbers)
    file_fds = dict(zip(file_ids, numbers, strict=False))
    object_fds = dict(zip(object_ids, numbers[len(file_ids) :], strict=True))
    site.run_later(
        *_map_calls(mm, file_fds, object_fds, shared),
        *_vdso_calls(mm),
        *_name_calls(mm, site.bench),
        *_advice_calls(mm),
        Call("close_range", (0, site.transport_fd - 1, 0)),
    )
    aio.make_rings(site, mm.vmas)


def _map_calls(
    mm: Mm, files: Mapping[int, int], objects: Mapping[int, int], shared: Mapping[int, SharedMemory]
) -> Iterator[Call]:
    yield from aio.reserve_calls(mm.vmas)
    for vma in mm.vmas:
        if vma.kind in VDSO_KINDS or vma.kind is VmaKind.AIO:
            continue
        if vma.kind is VmaKind.SHARED and shared[vma.object_id].kind is SharedKind.SYSV:
            yield _attach(vma, shared[vma.object_id].sysv_shmid)
            continue
        fd = NO_FD
        if vma.kind is VmaKind.FILE:
            fd = files[vma.file_id]
        elif vma.kind is VmaKind.SHARED:
            fd = objects[vma.object_id]
        flags = vma.flags | MAP_FIXED_NOREPLACE
        yield Call("mmap", (vma.start, vma.end - vma.start, vma.prot, flags, fd, vma.offset))


def _attach(vma: Vma, shmid: int) -> Call:
    """shmat(2), so that the detach of the last process is the kernel's business again."""
    readonly = 0 if vma.prot & mmap.PROT_WRITE else SHM_RDONLY
    return Call("shmat", (shmid, vma.start, readonly | (SHM_EXEC if vma.prot & mmap.PROT_EXEC else 0)))


def _vdso_calls(mm: Mm) -> Iterator[Call]:
    """One call maps vvar and vdso from the lowest of the pieces on (arch/x86/entry/vdso/vma.c, map_vdso)."""
    pieces = [vma.start for vma in mm.vmas if vma.kind in VDSO_KINDS]
    if pieces:
        yield Call("arch_prctl", (arch.ARCH_MAP_VDSO_64, min(pieces)))


def check_vdso(site: Site) -> None:
    """The address given to ARCH_MAP_VDSO_64 is a hint: what is not exactly there is an error. And the C library knows
    where its functions are from the program's start: another build has them elsewhere.
    """
    mm = site.task.mm
    for vma in mm.vmas if mm else ():
        if mm is None or vma.kind is not VmaKind.VDSO:
            continue
        found = _vdso_at(site, vma)
        if found[:4] != b"\x7fELF":
            raise RestoreError(
                "the vdso could not be put at its old address", where=f"{vma.start:#x}", remedy="report it"
            )
        if mm.vdso_build_id and elf.build_id(found) != mm.vdso_build_id:
            raise RestoreError(
                "this host's kernel has another vdso",
                where=f"pid {site.task.vpid}",
                remedy="boot the same kernel build as where it was dumped, or restore it with criu",
            )


def _vdso_at(site: Site, vma: Vma) -> bytes:
    try:
        return site.memory.read(vma.start, vma.length)
    except TraceeError:  # nothing is mapped there
        return b""


def _name_calls(mm: Mm, bench: Bench) -> Iterator[Call]:
    for vma in mm.vmas:
        if vma.kind is VmaKind.ANON and vma.name and not vma.name.startswith("["):
            name = bench.place(os.fsencode(vma.name) + b"\0")
            args = (PR_SET_VMA, PR_SET_VMA_ANON_NAME, vma.start, vma.length, name)
            yield Call("prctl", args, may_fail=True)  # a kernel without CONFIG_ANON_VMA_NAME


def _advice_calls(mm: Mm) -> Iterator[Call]:
    for vma in mm.vmas:
        if vma.kind in VDSO_KINDS:
            continue
        for advice, may_fail in _advice(vma.vm_flags):
            yield Call("madvise", (vma.start, vma.length, advice), may_fail)
        for start, end in vma.guards:
            yield Call("madvise", (start, end - start, MADV_GUARD_INSTALL))


@functools.lru_cache(maxsize=64)
def _advice(vm_flags: frozenset[str]) -> tuple[tuple[int, bool], ...]:
    return tuple((ADVICE[flag], flag in ("hg", "nh", "mg")) for flag in sorted(ADVICE.keys() & vm_flags))


def set_fields(site: Site, exe: int) -> None:
    """What belongs to an address space besides mappings, with the next run. `exe` is our descriptor of its program."""
    assert site.task.mm is not None
    site.receive_later([exe], [0])
    site.run_later(
        Call("personality", (site.task.personality,)),
        *_mm_calls(site.task.mm, site.bench, exe_fd=0),
        Call("close", (0,)),
    )


def _mm_calls(mm: Mm, bench: Bench, exe_fd: int) -> Iterator[Call]:
    """All fields in one call; the single-field form needs CAP_SYS_RESOURCE (kernel/sys.c, prctl_set_mm_map)."""
    auxv = struct.pack(f"<{len(mm.auxv)}Q", *mm.auxv)
    fields = MM_MAP.pack(
        *(mm.start_code, mm.end_code, mm.start_data, mm.end_data, mm.start_brk, mm.brk, mm.start_stack),
        *(mm.arg_start, mm.arg_end, mm.env_start, mm.env_end),
        bench.place(auxv),
        len(auxv),
        exe_fd,
    )
    yield Call("prctl", (PR_SET_MM, PR_SET_MM_MAP, bench.place(fields), len(fields), 0))
    yield Call(
        "prctl", (PR_SET_THP_DISABLE, int(mm.flags.thp_disabled), 0, 0, 0)
    )  # ours outlives fork and exec
    if mm.flags.thp_exceptions:  # of Linux 6.18; without them no memory is lost
        yield Call("prctl", (PR_SET_THP_DISABLE, 1, mm.flags.thp_exceptions, 0, 0), may_fail=True)


def last_calls(mm: Mm) -> Iterator[Call]:
    """What is only right when all of its memory is mapped, and what may take more than the rights it is to have."""
    yield from _lock_calls(mm)
    if mm.flags.merges:  # needs CAP_SYS_RESOURCE, and CONFIG_KSM; without it no memory is lost
        yield Call("prctl", (PR_SET_MEMORY_MERGE, 1, 0, 0, 0), may_fail=True)
    if mm.flags.mdwe:
        yield Call("prctl", (PR_SET_MDWE, mm.flags.mdwe, 0, 0, 0))


def _lock_calls(mm: Mm) -> Iterator[Call]:
    """mlock2(2) of locked mappings, once their pages are there, and of what will be mapped, now that we map no more."""
    for vma in mm.vmas:
        if "lo" in vma.vm_flags and vma.kind not in VDSO_KINDS:
            yield Call("mlock2", (vma.start, vma.length, MLOCK_ONFAULT if "lf" in vma.vm_flags else 0))
    if mm.future_locks:
        yield Call("mlockall", (mm.future_locks,))
