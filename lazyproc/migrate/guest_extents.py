"""Which pages QEMU has for its guest: in its own memory, in the file that its RAM is mapped from, or in both."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from lazyproc.dump.memory import lazy_extents, shared_extents
from lazyproc.errors import NoSuchProcess
from lazyproc.facts import replace
from lazyproc.kernel import proc
from lazyproc.migrate.holding import mapped_object
from lazyproc.model import PAGE, Extent, MemoryObject
from lazyproc.pages.frozen import Place
from lazyproc.qemu.guest import Guest
from lazyproc.qemu.ram import Block, is_of_file, permitted


def extents_of(guest: Guest) -> dict[MemoryObject, tuple[Extent, ...]]:
    """All others are zero. Raises NoSuchProcess, PermissionDenied."""
    maps = {entry.start: entry for entry in proc.maps(proc.read(guest.pid, "maps"))}
    return {
        block.object: _extents(block, place, maps.get(block.addr))
        for block, place in zip(guest.blocks, guest.places(), strict=True)
    }


def _extents(block: Block, place: Place, entry: proc.MapsEntry | None) -> tuple[Extent, ...]:
    if entry is None:
        raise NoSuchProcess("maps the RAM of its guest no more", where=f"pid {place.pid} at {block.addr:#x}")
    if block.shared:
        return _of_file(block, place, entry.offset)
    with permitted(place.pid):
        found = lazy_extents(place.pid, [(block.addr, block.addr + block.used)], frozenset())
    own = tuple(replace(each, addr=each.addr - block.addr) for each in found)
    if not is_of_file(entry):
        return own
    # What QEMU has written to is its own, and the file's what it has not touched.
    return tuple(_merged([*own, *_of_file(block, place, entry.offset)]))


def _of_file(block: Block, place: Place, offset: int) -> tuple[Extent, ...]:
    with permitted(place.pid), mapped_object(place) as fd:
        return shared_extents(fd, block.used, lazy=True, start=offset)


def _merged(extents: Iterable[Extent]) -> Iterator[Extent]:
    """In their order; those that overlap or touch are one."""
    run: Extent | None = None
    for each in sorted(extents, key=lambda each: each.addr):
        if run is not None and each.addr <= run.end:
            run = replace(run, count=(max(run.end, each.end) - run.addr) // PAGE)
        else:
            if run is not None:
                yield run
            run = each
    if run is not None:
        yield run
