"""The mappings of a process and what follows from them alone: worked out while it runs, and taken over when its maps
are the same text after the freeze.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from contextlib import suppress

from lazyproc.dump.files import gather_mapped_file, is_zero_device
from lazyproc.dump.memory import place_of, refused_of, vma_of
from lazyproc.dump.registry import FileSeen, Refused, Registry
from lazyproc.errors import NoSuchProcess
from lazyproc.facts import dataclass, replace
from lazyproc.kernel import proc
from lazyproc.model import OpenFile, RegularFile, Vma, VmaKind


@dataclass(frozen=True, slots=True)
class Space:
    """`text` is /proc/PID/maps, `locked_kib` VmLck of status, which maps do not show. `vmas` are the mappings that can
    be moved, `entries` their lines; those of files have the numbers in `files` (index, number), those of shared
    objects, at the indices `objects`, none yet.
    """

    text: bytes
    locked_kib: int
    maps: tuple[proc.MapsEntry, ...]
    refused: tuple[tuple[str, Refused], ...]  # where, why
    vmas: tuple[Vma, ...]
    entries: tuple[proc.MapsEntry, ...]
    files: tuple[tuple[int, int], ...]
    objects: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Seen:
    """What was seen of a running tree, and is taken over where it is still so: `spaces` by pid, the files that its
    mappings and directories led to, and which processes use MADV_GUARD_INSTALL.
    """

    spaces: Mapping[int, Space]
    files: Mapping[FileSeen, RegularFile]
    opened: Mapping[int, OpenFile]  # by the numbers in `spaces`
    guarded: frozenset[int]


NOTHING = Seen({}, {}, {}, frozenset())


def space_of(
    text: bytes, locked_kib: int, maps: tuple[proc.MapsEntry, ...], smaps: Sequence[proc.SmapsEntry]
) -> Space:
    """Pure."""
    refused = list(refused_of(smaps))
    stuck = {each.entry.start for each, _ in refused}
    moved = [each for each in smaps if each.entry.path != "[vsyscall]" and each.entry.start not in stuck]
    vmas = tuple([vma_of(each) for each in moved])
    return Space(
        text,
        locked_kib,
        maps,
        tuple((place_of(each), why) for each, why in refused),
        vmas,
        tuple([each.entry for each in moved]),
        tuple((at, 0) for at, vma in enumerate(vmas) if vma.kind is VmaKind.FILE),
        tuple(at for at, vma in enumerate(vmas) if vma.kind is VmaKind.SHARED),
    )


def space_before(
    registry: Registry, pid: int, locked_kib: int, smaps: Sequence[proc.SmapsEntry]
) -> Space | None:
    """Of a running process whose status and then smaps were just read; None when its maps are others already, or not
    for us to see.
    """
    with suppress(NoSuchProcess, PermissionError):  # map_files is root's
        text = proc.read(pid, "maps")
        maps = proc.maps(text)
        if maps == tuple([each.entry for each in smaps]):
            return numbered(registry, pid, space_of(text, locked_kib, maps, smaps))
    return None


def space_now(pid: int, locked_kib: int, before: Space | None) -> Space:
    """Of a frozen process. smaps is read only when the maps are no longer the same: it walks all memory."""
    text = proc.read(pid, "maps")
    if before is not None and text == before.text and locked_kib == before.locked_kib:
        return before
    return space_of(text, locked_kib, proc.maps(text), proc.smaps(proc.read(pid, "smaps")))


def numbered(registry: Registry, pid: int, space: Space) -> Space:
    """With the registry's numbers of the mapped files. Obstacles go to the registry."""
    space = _zeros_anonymous(pid, space)
    files = tuple(_file_numbers(registry, pid, space))
    if files == space.files:
        return space
    vmas = list(space.vmas)
    for at, number in files:
        vmas[at] = replace(vmas[at], file_id=number)
    return replace(space, vmas=tuple(vmas), files=files)


def _zeros_anonymous(pid: int, space: Space) -> Space:
    """Mappings of /dev/zero are restored as what they are to the kernel, and no longer by that name."""
    zeros = {at for at, number in space.files if not number and is_zero_device(pid, space.entries[at])}
    if not zeros:
        return space
    vmas = list(space.vmas)
    for at in zeros:
        flags = vmas[at].flags | mmap.MAP_ANONYMOUS
        vmas[at] = replace(vmas[at], kind=VmaKind.ANON, flags=flags, offset=0)
    files = tuple((at, number) for at, number in space.files if at not in zeros)
    return replace(space, vmas=tuple(vmas), files=files)


def _file_numbers(registry: Registry, pid: int, space: Space) -> list[tuple[int, int]]:
    """Each file is looked at once. How one that is mapped shared was opened may differ from mapping to mapping."""
    known: dict[tuple[object, ...], int] = {}
    found = []
    for at, _ in space.files:
        entry = space.entries[at]
        key = entry[4:] if entry.perms[3] == "p" else entry
        if key not in known:
            known[key] = gather_mapped_file(registry, pid, entry.start, entry.end, entry)
        found.append((at, known[key]))
    return found
