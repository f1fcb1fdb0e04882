"""What to fetch next: pure functions from what has content to the order in which bulk brings it over.

A policy is any callable that takes the map and yields chunks; the pager walks them in order, skips what is there
already, and fetches what no chunk names at the end. A new policy is added with `POLICIES[name] = function`. `around`
makes a plan for a place that has just become interesting, to be given to Pager.plan while it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from lazyproc.errors import UsageError
from lazyproc.model import PAGE, Extent, MemoryObject
from lazyproc.runs import Extents as Columns


class Chunk(NamedTuple):
    """`pages` pages of `obj` from `addr`."""

    obj: MemoryObject
    addr: int
    pages: int


Extents = Mapping[MemoryObject, Sequence[Extent]]
Policy = Callable[[Extents], Iterator[Chunk]]


def sequential(extents: Extents) -> Iterator[Chunk]:
    """Object by object, from low addresses to high ones."""
    for obj, runs in extents.items():
        for extent in runs:
            yield Chunk(obj, extent.addr, extent.count)


def smallest_first(extents: Extents) -> Iterator[Chunk]:
    """Short runs before long ones: stacks, globals and allocator metadata are touched first, arenas last."""
    yield from sorted(sequential(extents), key=lambda chunk: chunk.pages)


def around(chunks: Iterable[Chunk], obj: MemoryObject, addr: int) -> Iterator[Chunk]:
    """The same pages, but those of `obj` from `addr` on come first, then those just below it, then the rest."""
    above: list[Chunk] = []
    below: list[Chunk] = []
    rest: list[Chunk] = []
    for chunk in chunks:
        if chunk.obj != obj:
            rest.append(chunk)
            continue
        split = min(chunk.pages, max(0, (addr - chunk.addr) // PAGE))
        if split:
            below.append(Chunk(obj, chunk.addr, split))
        if split < chunk.pages:
            above.append(Chunk(obj, chunk.addr + split * PAGE, chunk.pages - split))
    yield from sorted(above, key=lambda chunk: chunk.addr)
    yield from sorted(below, key=lambda chunk: chunk.addr, reverse=True)
    yield from rest


def recorded(pages: Iterable[tuple[MemoryObject, int]]) -> Policy:
    """These pages first, in their order, then the rest as `sequential`. What the map does not have is left out."""
    order = list(dict.fromkeys(pages))

    def policy(extents: Extents) -> Iterator[Chunk]:
        columns = {obj: Columns.of(runs) for obj, runs in extents.items()}
        ahead = [(obj, at) for obj, at in order if obj in columns and columns[obj].within(at, at + PAGE)]
        yield from (Chunk(obj, addr, 1) for obj, addr in ahead)
        for obj, runs in extents.items():
            yield from _without(obj, runs, sorted(addr for of, addr in ahead if of == obj))

    return policy


def _without(obj: MemoryObject, runs: Sequence[Extent], taken: Sequence[int]) -> Iterator[Chunk]:
    """The runs, which are sorted, but for the sorted pages of `taken`, each of which is in one of them."""
    holes = iter(taken)
    hole = next(holes, None)
    for extent in runs:
        addr = extent.addr
        while hole is not None and hole < extent.end:
            if hole > addr:
                yield Chunk(obj, addr, (hole - addr) // PAGE)
            addr, hole = hole + PAGE, next(holes, None)
        if addr < extent.end:
            yield Chunk(obj, addr, (extent.end - addr) // PAGE)


POLICIES: dict[str, Policy] = {"sequential": sequential, "smallest-first": smallest_first}


def named(name: str) -> Policy:
    """The policy of that name. Raises UsageError, with all names, when there is none."""
    if name not in POLICIES:
        raise UsageError(
            "no such policy", where=f"--policy {name}", remedy=f"there are {', '.join(POLICIES)}"
        )
    return POLICIES[name]
