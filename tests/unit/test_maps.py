"""MAP, whatever its size, for a peer of whatever revision."""

from __future__ import annotations

import pytest

from lazyproc.errors import ProtocolError
from lazyproc.model import PAGE, Extent, MemoryObject, ObjectKind
from lazyproc.pages.remote import Maps, maps_of
from lazyproc.wire.native import MAP_MAX, MAP_PART, PARTS, Map, MapEntry

FIRST, SECOND = (MemoryObject(ObjectKind.TASK, number) for number in (1, 2))


def runs(count: int) -> tuple[Extent, ...]:
    return tuple(Extent(2 * number * PAGE, 1, lazy=True) for number in range(count))


@pytest.mark.parametrize("count", [0, 1, MAP_PART - 1, MAP_PART, MAP_PART + 1, 3 * MAP_PART])
@pytest.mark.parametrize("revision", [PARTS - 1, PARTS])
def test_what_is_said_is_heard(count: int, revision: int) -> None:
    extents = {FIRST: runs(count), SECOND: (Extent(0, 7, lazy=True), Extent(9 * PAGE, 1, lazy=False))}
    maps, said = Maps(revision), list(maps_of(extents, revision))
    assert [maps.hear(part) for part in said] == [False] * (len(said) - 1) + [True]
    assert maps.extents() == {obj: tuple(e for e in row if e.lazy) for obj, row in extents.items() if row}
    assert len(said) == (1 if revision < PARTS else (count + 1) // MAP_PART + 1)


def test_a_map_without_end_is_refused() -> None:
    maps, part = Maps(PARTS), Map([MapEntry(FIRST.key, 0, 1)] * MAP_PART)
    for _ in range(MAP_MAX // MAP_PART):
        assert not maps.hear(part)
    with pytest.raises(ProtocolError, match="more than"):
        maps.hear(part)
