"""What to fetch next: pure functions and values, from what has content and what was waited for to what bulk brings.

A policy is an order, and for some a reaction. The *order* is any callable that takes the map and yields chunks; the
pager walks them, skips what is there already, and fetches what no chunk names at the end. The *reaction* (reactive.py)
is a value that faults change into another; what it names comes before the order. A new policy is a row of POLICIES.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from lazyproc.errors import UsageError
from lazyproc.model import PAGE, Extent, MemoryObject
from lazyproc.runs import Extents as Columns

TYPE_CHECKING = False
if TYPE_CHECKING:
    from lazyproc.uffd.reactive import Reaction


class Page(NamedTuple):
    """The page of `obj` at `addr`."""

    obj: MemoryObject
    addr: int


class Chunk(NamedTuple):
    """`pages` pages of `obj` from `addr`."""

    obj: MemoryObject
    addr: int
    pages: int


Extents = Mapping[MemoryObject, Sequence[Extent]]
Order = Callable[[Extents], Iterator[Chunk]]
RECORDED = "recorded:"  # the name of a policy, up to the name of its file
BLOCK = 4096  # recorded pages that come by address, as many at a time: 16 MiB


class Policy(NamedTuple):
    order: Order
    reaction: Callable[[], Reaction] | None = None
    first: Sequence[Page] = ()  # worth bringing before the map is known: the order begins with them


def sequential(extents: Extents) -> Iterator[Chunk]:
    """Object by object, from low addresses to high ones."""
    for obj, runs in extents.items():
        for extent in runs:
            yield Chunk(obj, extent.addr, extent.count)


def smallest_first(extents: Extents) -> Iterator[Chunk]:
    """Short runs before long ones: stacks, globals and allocator metadata are touched first, arenas last."""
    yield from sorted(sequential(extents), key=lambda chunk: chunk.pages)


def recorded(pages: Sequence[Page]) -> Policy:
    """These pages first, by `blocks`, then the rest as `sequential`. What the map does not have is left out."""

    def order(extents: Extents) -> Iterator[Chunk]:
        columns = {obj: Columns.of(runs) for obj, runs in extents.items()}
        known = [page for page in dict.fromkeys(pages) if _has(columns, page)]
        yield from blocks(known)
        for obj, runs in extents.items():
            yield from _without(obj, runs, sorted(addr for of, addr in known if of == obj))

    return Policy(order, first=pages)


def blocks(pages: Sequence[Page]) -> Iterator[Chunk]:
    """Pages without repetitions, in their order, but block by block by address: neighbours come together."""
    for at in range(0, len(pages), BLOCK):
        yield from _joined(sorted(pages[at : at + BLOCK], key=lambda page: (page.obj.key, page.addr)))


def _joined(pages: Iterable[Page]) -> Iterator[Chunk]:
    run: Chunk | None = None
    for obj, addr in pages:
        if run is not None and run.obj == obj and run.addr + run.pages * PAGE == addr:
            run = run._replace(pages=run.pages + 1)
            continue
        if run is not None:
            yield run
        run = Chunk(obj, addr, 1)
    if run is not None:
        yield run


def _has(columns: Mapping[MemoryObject, Columns], page: Page) -> bool:
    return page.obj in columns and bool(columns[page.obj].within(page.addr, page.addr + PAGE))


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


def _reaction(name: str) -> Callable[[], Reaction]:
    """A class of reactive.py, which is imported when the tree runs: its start does not wait for that."""

    def first() -> Reaction:
        from lazyproc.uffd import reactive

        value: Reaction = getattr(reactive, name)()
        return value

    return first


POLICIES: dict[str, Policy] = {
    "sequential": Policy(sequential),
    "smallest-first": Policy(smallest_first),
    "around": Policy(sequential, _reaction("Around")),
    "stride": Policy(sequential, _reaction("Strides")),
    "pivots": Policy(sequential, _reaction("Pivots")),
    "adaptive": Policy(sequential, _reaction("Adaptive")),
}


def named(name: str) -> Policy:
    """The policy of that name. Raises UsageError, with all names, when there is none."""
    if name not in POLICIES:
        raise UsageError(
            "no such policy", where=f"--policy {name}", remedy=f"there are {', '.join(POLICIES)}"
        )
    return POLICIES[name]
