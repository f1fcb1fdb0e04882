"""What faults say about the next ones. Pure: a reaction is a value; faults make another, and it names runs of pages.

It may name what is there already, what has no content and what no mapping covers: the pager passes over that. It is
asked a few hundred times a second at most (planner.py), never in a fault's way: that has been seen to by then.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, Self

from lazyproc.facts import dataclass, replace
from lazyproc.model import PAGE, MemoryObject
from lazyproc.uffd.policy import Chunk, Page


class Reaction(Protocol):
    def after(self, faults: Sequence[Page]) -> Self:
        """What is known when these pages, in this order, have been waited for as well."""

    def ahead(self) -> Iterator[Chunk]:
        """What to bring before everything else, the most urgent first."""


def pieces(obj: MemoryObject, addr: int, pages: int, step: int) -> Iterator[Chunk]:
    """At most `pages` pages beyond the one at `addr`, upwards or (negative `step`) downwards, nearest first, in runs
    that grow with their distance. Nothing below address 0.
    """
    done = 0
    while done < pages:
        count = min(max(FIRST_RUN, done), pages - done)
        low = addr + (done + 1) * PAGE if step > 0 else max(0, addr - (done + count) * PAGE)
        high = low + count * PAGE if step > 0 else addr - done * PAGE
        if high <= low:
            return
        yield Chunk(obj, low, (high - low) // PAGE)
        done += count


def in_turn(sources: Iterable[Iterator[Chunk]]) -> Iterator[Chunk]:
    """One of each, then again one of each, until all have ended."""
    left = list(sources)
    while left:
        going = []
        for source in left:
            for chunk in source:
                yield chunk
                going.append(source)
                break
        left = going


FIRST_RUN = 16  # pages


# --- around a fault -------------------------------------------------------------------------------------

NEIGHBOURS = 32  # pages on each side
REMEMBERED = 8  # faults


@dataclass(frozen=True, slots=True)
class Around:
    """The neighbours of the last faults, those above before those below. `latest` comes first."""

    latest: tuple[Page, ...] = ()

    def after(self, faults: Sequence[Page]) -> Self:
        return replace(self, latest=tuple(dict.fromkeys((*reversed(faults), *self.latest)))[:REMEMBERED])

    def ahead(self) -> Iterator[Chunk]:
        for obj, addr in self.latest:
            yield from pieces(obj, addr, NEIGHBOURS, +1)
            yield from pieces(obj, addr, NEIGHBOURS, -1)


# --- constant strides -----------------------------------------------------------------------------------

STREAMS = 8
# So many faults at equal distances are a stride: of a random toucher's, three are so by chance again and again.
IN_A_ROW = 4
LOOK_BACK = STREAMS * IN_A_ROW  # faults among which one is looked for
FIRST_DEPTH = 8  # steps that are brought when a stride is found; twice as many each time that it was right
DEPTH = 64
DENSE_DEPTH = 1024  # of neighbours
WIDEST = 1 << 24  # bytes of a stride


@dataclass(frozen=True, slots=True)
class Stream:
    """Visits every `step` bytes (a multiple of a page, negative: downwards), the last one at `addr`."""

    obj: MemoryObject
    addr: int
    step: int
    depth: int = FIRST_DEPTH

    def reaches(self, page: Page) -> bool:
        """Whether it is one of the steps that come next: those that were brought are not waited for."""
        steps, beside = divmod(page.addr - self.addr, self.step)
        return page.obj == self.obj and beside == 0 and 0 < steps <= 2 * self.depth

    def at(self, page: Page) -> Stream:
        most = DENSE_DEPTH if abs(self.step) == PAGE else DEPTH
        return replace(self, addr=page.addr, depth=min(2 * self.depth, most))

    def ahead(self) -> Iterator[Chunk]:
        if abs(self.step) == PAGE:
            yield from pieces(self.obj, self.addr, self.depth, self.step)
            return
        for number in range(1, self.depth + 1):
            if (addr := self.addr + number * self.step) < 0:
                return
            yield Chunk(self.obj, addr, 1)


@dataclass(frozen=True, slots=True)
class Strides:
    """Several streams at once, whichever way they go; nothing where four faults do not lie at equal distances.

    `streams` has the one that moved last first, `latest` the last faults that belong to none.
    """

    streams: tuple[Stream, ...] = ()
    latest: tuple[Page, ...] = ()

    def after(self, faults: Sequence[Page]) -> Self:
        known = self
        for page in faults:
            known = known._after(page)
        return known

    def _after(self, page: Page) -> Self:
        if page in self.latest[:1]:
            return self
        old = next((stream for stream in self.streams if stream.reaches(page)), None)
        new = old.at(page) if old else self._found(page)
        latest = (page, *self.latest[: LOOK_BACK - 1])
        if new is None:
            return replace(self, latest=latest)
        others = (stream for stream in self.streams if stream is not old)
        return replace(self, streams=(new, *others)[:STREAMS], latest=latest)

    def _found(self, page: Page) -> Stream | None:
        """The stream of which it is number `IN_A_ROW`; of several the one whose last visit is nearest in time."""
        before = [addr for obj, addr in self.latest if obj == page.obj]
        known = frozenset(before)
        for addr in before:
            step = page.addr - addr
            if not 0 < abs(step) <= WIDEST:
                continue
            if known.issuperset(range(addr - step, addr - (IN_A_ROW - 1) * step, -step)):
                return Stream(page.obj, page.addr, step)
        return None

    def ahead(self) -> Iterator[Chunk]:
        return in_turn(stream.ahead() for stream in self.streams)


# --- bubbles around pivots ------------------------------------------------------------------------------

PIVOTS = 8
FIRST_BUBBLE = 32  # pages on each side
BUBBLE = 4096
SURE = 2  # moves to one side more than to the other that make it the side to which it leans
MOST_SURE = 4


@dataclass(frozen=True, slots=True)
class Pivot:
    """Where somebody may be at work. Each fault nearby makes it surer, and its bubble larger: `pages` on each side.

    `lean` counts its last moves, upwards minus downwards.
    """

    obj: MemoryObject
    addr: int
    pages: int = FIRST_BUBBLE
    lean: int = 0

    def is_near(self, page: Page) -> bool:
        """Faults within the bubble are rare when it has come: those beyond it count as well."""
        return page.obj == self.obj and abs(page.addr - self.addr) <= 2 * self.pages * PAGE

    def at(self, page: Page) -> Pivot:
        move = (page.addr > self.addr) - (page.addr < self.addr)
        lean = max(-MOST_SURE, min(MOST_SURE, self.lean + move))
        return replace(self, addr=page.addr, pages=min(2 * self.pages, BUBBLE), lean=lean)

    def ahead(self) -> Iterator[Chunk]:
        """The bubble, from its middle on; first the side to which it leans."""
        side = 1 if self.lean >= 0 else -1
        first = pieces(self.obj, self.addr, self.pages, side)
        other = pieces(self.obj, self.addr, self.pages, -side)
        if abs(self.lean) >= SURE:
            yield from first
        yield from in_turn((first, other))


@dataclass(frozen=True, slots=True)
class Pivots:
    """Bubbles around the last places of work, in turn.

    After M. R. Hines and K. Gopalan, "Post-copy based live virtual machine migration using adaptive pre-paging and
    dynamic self-ballooning" (VEE 2009): bubbling with several pivots, both ways. There bubbles grow until they meet;
    here by faults near them, so that those of a program that goes anywhere stay small. `pivots` has the latest first.
    """

    pivots: tuple[Pivot, ...] = ()

    def after(self, faults: Sequence[Page]) -> Self:
        pivots = list(self.pivots)
        for page in faults:
            near = next((pivot for pivot in pivots if pivot.is_near(page)), None)
            if near is not None:
                pivots.remove(near)
            pivots.insert(0, near.at(page) if near is not None else Pivot(page.obj, page.addr))
            del pivots[PIVOTS:]
        return replace(self, pivots=tuple(pivots))

    def ahead(self) -> Iterator[Chunk]:
        return in_turn(pivot.ahead() for pivot in self.pivots)


# --- both -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Adaptive:
    """Strides where there are any, since those are sure, and then bubbles."""

    strides: Strides = Strides()
    pivots: Pivots = Pivots()

    def after(self, faults: Sequence[Page]) -> Self:
        return replace(self, strides=self.strides.after(faults), pivots=self.pivots.after(faults))

    def ahead(self) -> Iterator[Chunk]:
        yield from self.strides.ahead()
        yield from self.pivots.ahead()
