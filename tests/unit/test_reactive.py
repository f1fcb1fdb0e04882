"""Reactions name what their names promise, whatever the faults are; and what comes of that on a computed link."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyproc.model import PAGE, MemoryObject, ObjectKind
from lazyproc.uffd.policy import Chunk, Page
from lazyproc.uffd.reactive import (
    FIRST_DEPTH,
    LOOK_BACK,
    NEIGHBOURS,
    PIVOTS,
    STREAMS,
    Adaptive,
    Around,
    Pivots,
    Reaction,
    Strides,
    in_turn,
    pieces,
)

HEAP, OTHER = MemoryObject(ObjectKind.TASK, 1), MemoryObject(ObjectKind.SHARED, 2)
START = 1 << 34
MOST = 512  # runs that are looked at, as planner.py does

faults = st.lists(
    st.builds(
        lambda obj, number: Page(obj, number * PAGE), st.sampled_from([HEAP, OTHER]), st.integers(0, 1 << 35)
    ),
    max_size=60,
)
near = st.lists(st.builds(lambda number: Page(HEAP, number * PAGE), st.integers(0, 300)), max_size=60)
reactions = pytest.mark.parametrize(
    "reaction", [Around(), Strides(), Pivots(), Adaptive()], ids=lambda each: type(each).__name__
)


def named(reaction: Reaction, most: int = MOST) -> list[Page]:
    return [
        Page(obj, addr + index * PAGE)
        for obj, addr, pages in islice(reaction.ahead(), most)
        for index in range(pages)
    ]


def heap(numbers: Sequence[int]) -> list[Page]:
    return [Page(HEAP, START + number * PAGE) for number in numbers]


# --- what holds of each ---------------------------------------------------------------------------------


@given(faults | near)
@reactions
def test_runs_are_whole_pages_of_what_was_waited_for(reaction: Reaction, waited: list[Page]) -> None:
    for obj, addr, pages in islice(reaction.after(waited).ahead(), MOST):
        assert obj in {page.obj for page in waited}
        assert pages > 0
        assert addr >= 0
        assert addr % PAGE == 0


@given(faults | near)
@reactions
def test_no_page_twice_by_one_place_of_work(reaction: Reaction, waited: list[Page]) -> None:
    for page in waited[:1]:
        order = named(reaction.after([page]), 16)
        assert len(set(order)) == len(order)
        assert page not in order


@given(faults | near, st.integers(0, 60))
@reactions
def test_it_does_not_matter_how_faults_are_told(reaction: Reaction, waited: list[Page], cut: int) -> None:
    assert reaction.after(waited[:cut]).after(waited[cut:]) == reaction.after(waited)
    assert reaction == type(reaction)()  # nothing has changed in place


@given(faults | near)
@reactions
def test_what_is_known_does_not_grow_without_end(reaction: Reaction, waited: list[Page]) -> None:
    known = reaction.after(waited)
    assert sum(1 for _ in islice(known.ahead(), 10_000)) < 10_000
    if isinstance(known, Strides):
        assert len(known.streams) <= STREAMS
        assert len(known.latest) <= LOOK_BACK
    if isinstance(known, Pivots):
        assert len(known.pivots) <= PIVOTS


@given(st.integers(0, 200), st.integers(0, 5000), st.sampled_from([1, -1]))
def test_pieces_are_the_next_pages_in_their_order(number: int, count: int, step: int) -> None:
    chunks = list(pieces(HEAP, number * PAGE, count, step))
    if step > 0:
        covered = [chunk.addr // PAGE + at for chunk in chunks for at in range(chunk.pages)]
        assert covered == list(range(number + 1, number + 1 + count))
    else:
        covered = [chunk.addr // PAGE + at for chunk in reversed(chunks) for at in range(chunk.pages)]
        assert covered == list(range(max(0, number - count), number))


@given(st.lists(st.lists(st.integers(0, 9), max_size=5), max_size=5))
def test_in_turn_takes_one_of_each(numbers: list[list[int]]) -> None:
    sources = [[Chunk(HEAP, number * PAGE, index + 1) for number in row] for index, row in enumerate(numbers)]
    order = list(in_turn(map(iter, sources)))
    assert sorted(order) == sorted(chunk for source in sources for chunk in source)
    for index, source in enumerate(sources):
        assert [chunk for chunk in order if chunk.pages == index + 1] == source
    firsts = [source[0] for source in sources if source]
    assert order[: len(firsts)] == firsts


# --- around ---------------------------------------------------------------------------------------------


def test_neighbours_of_the_last_fault_come_first() -> None:
    order = named(Around().after(heap([5000, 100])))
    assert order[: 2 * NEIGHBOURS] == heap(
        [*range(101, 101 + NEIGHBOURS), *range(84, 100), *range(100 - NEIGHBOURS, 84)]
    )
    assert set(heap([5001, 4999])) <= set(order)


# --- strides --------------------------------------------------------------------------------------------


@given(st.integers(-500, 500).filter(bool), st.integers(0, 1000))
def test_four_at_equal_distances_are_a_stride(step: int, begin: int) -> None:
    begin += 100_000
    three = Strides().after(heap([begin + step * number for number in range(3)]))
    assert named(three) == []
    order = named(three.after(heap([begin + 3 * step])))
    assert set(heap([begin + step * number for number in range(4, 12)])) == set(order)
    assert order[0] == heap([begin + 4 * step])[0] or step == -1  # a run is walked upwards


@given(st.lists(st.sampled_from([1, -1, 3, -7, 64, -100]), min_size=2, max_size=5, unique=True))
def test_interleaved_strides_are_told_apart(steps: list[int]) -> None:
    begins = [1_000_000 * (index + 1) for index in range(len(steps))]
    visits = [begin + step * time for time in range(4) for begin, step in zip(begins, steps, strict=True)]
    streams = Strides().after(heap(visits)).streams
    assert {stream.step // PAGE for stream in streams} == set(steps)
    assert {stream.addr for stream in streams} == {page.addr for page in heap(visits[-len(steps) :])}


def test_a_stream_that_was_right_reaches_farther_and_skips_what_has_come() -> None:
    known = Strides().after(heap([0, 7, 14, 21]))
    reach = len(named(known))
    farther = known.after(heap([21 + 7 * (reach + 1)]))
    assert len(named(farther)) == 2 * reach
    assert len(farther.streams) == 1


def test_no_stride_is_seen_where_there_is_none() -> None:
    assert named(Strides().after(heap([2**number for number in range(20)]))) == []


def test_who_goes_anywhere_hardly_ever_strides_by_chance() -> None:
    """Of 64 MiB at random: three in a row come once in 90 faults, four once in some 10,000."""
    anywhere = random.Random(1)
    known, found = Strides(), 0
    for page in heap([anywhere.randrange(16_384) for _ in range(5_000)]):
        before, known = known.streams, known.after([page])
        found += known.streams != before and known.streams[0].depth == FIRST_DEPTH
    assert found <= 5


# --- pivots ---------------------------------------------------------------------------------------------


def test_a_bubble_grows_on_both_sides() -> None:
    order = named(Pivots().after(heap([10_000])), 4)
    assert order == heap(
        [*range(10_001, 10_017), *range(9_984, 10_000), *range(10_017, 10_033), *range(9_968, 9_984)]
    )


@pytest.mark.parametrize("side", [1, -1])
def test_a_bubble_leans_to_where_its_pivot_moves(side: int) -> None:
    order = named(Pivots().after(heap([10_000, 10_000 + side, 10_000 + 2 * side])), 4)
    assert all((page.addr - START) // PAGE * side > (10_000 + 2 * side) * side for page in order)


def test_each_place_of_work_has_its_bubble() -> None:
    known = Pivots().after(heap([10_000, 50_000, 10_010]))
    assert [pivot.addr for pivot in known.pivots] == [page.addr for page in heap([10_010, 50_000])]
    assert set(heap([10_011, 50_001])) <= set(named(known, 2))


# --- both -----------------------------------------------------------------------------------------------


@given(near)
def test_what_is_sure_comes_before_bubbles(waited: list[Page]) -> None:
    strides, pivots = Strides().after(waited), Pivots().after(waited)
    assert list(Adaptive().after(waited).ahead()) == [*strides.ahead(), *pivots.ahead()]


# --- on a link ------------------------------------------------------------------------------------------


def waits(reaction: Reaction | None, visits: Sequence[int], pages: int, brought: int = 4) -> int:
    """How many visits wait where each costs the time in which the link brings `brought` other pages: those that the
    reaction names first, as of the last fault but one, and then from the lowest on.
    """
    missing, faults = dict.fromkeys(range(pages)), 0
    ahead: list[int] = []
    for number in visits:
        if number in missing:
            del missing[number]
            faults += 1
            if reaction is not None:
                ahead = [(page.addr - START) // PAGE for page in named(reaction, 16)]
                reaction = reaction.after(heap([number]))
        first = [page for page in dict.fromkeys(ahead) if page in missing][:brought]
        for page in first or list(islice(missing, brought)):
            del missing[page]
    return faults


SCAN, BACK = list(range(1500, 1900)), list(range(1500, 1100, -1))
TWO_SCANS = [number for pair in zip(SCAN, BACK, strict=True) for number in pair]
WIDE = list(range(1000, 2900, 7))


@pytest.mark.parametrize(
    ("reaction", "visits"),
    [
        (Around(), SCAN),
        (Around(), BACK),
        (Strides(), SCAN),
        (Strides(), BACK),
        (Strides(), TWO_SCANS),
        (Strides(), WIDE),
        (Strides(), WIDE[::-1]),
        (Adaptive(), TWO_SCANS),
        (Adaptive(), WIDE),
        (Pivots(), SCAN),
        (Pivots(), BACK),
        (Pivots(), TWO_SCANS),
    ],
    ids=lambda value: type(value).__name__,
)
def test_who_is_followed_waits_less(reaction: Reaction, visits: list[int]) -> None:
    assert waits(reaction, visits, 4000) < waits(None, visits, 4000) / 3
