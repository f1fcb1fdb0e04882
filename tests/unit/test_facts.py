"""lazyproc.facts does what the standard library's dataclasses do: the same classes are made by both and compared."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import pytest

from lazyproc import facts


def _classes(maker: Any) -> dict[str, Any]:
    """One class of each kind the project has."""

    @maker.dataclass(frozen=True, slots=True)
    class Frozen:
        addr: int
        name: str = ""
        sizes: Mapping[str, int] = maker.field(default_factory=dict)
        secret: str = maker.field(default="s", repr=False)

        @property
        def end(self) -> int:
            return self.addr + 1

    @maker.dataclass(slots=True)
    class Mutable:
        addr: int
        later: int = maker.field(init=False)
        seen: list[int] = maker.field(default_factory=list, init=False)
        limit: int = maker.field(default=3, kw_only=True)

        def __post_init__(self) -> None:
            self.seen.append(self.addr)

    @maker.dataclass(slots=True, kw_only=True)
    class Derived(Mutable):
        extra: int

    class Undecorated(Frozen):
        """A subclass that adds nothing."""

    @maker.dataclass(frozen=True, slots=True)
    class Empty:
        pass

    return {c.__name__: c for c in (Frozen, Mutable, Derived, Undecorated, Empty)}


OURS, THEIRS = _classes(facts), _classes(dataclasses)


@facts.dataclass(frozen=True, slots=True)
class Nested:
    """At the top of a module, where pickle finds it."""

    inner: tuple[Nested, ...] = ()
    number: int = 0


def _outcome(act: Callable[[dict[str, Any]], object], classes: dict[str, Any]) -> str:
    """What it gives, or the error, as text; the names of the two functions that make the classes left out."""
    try:
        return repr(act(classes))
    except (TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}".replace("_classes.<locals>.", "")


def _filled(value: Any) -> Any:
    value.later = 9
    return value


@pytest.mark.parametrize(
    "act",
    [
        lambda c: c["Frozen"](1),
        lambda c: c["Frozen"](1, "x", {"a": 1}, "hidden"),
        lambda c: c["Frozen"](1).secret,
        lambda c: c["Frozen"](1).end,
        lambda c: c["Frozen"](addr=1) == c["Frozen"](1),
        lambda c: c["Frozen"](1) == c["Frozen"](2),
        lambda c: c["Frozen"](1) == c["Undecorated"](1),
        lambda c: c["Frozen"](1) == 1,
        lambda c: c["Undecorated"](1, name="x"),
        lambda c: hash(c["Empty"]()) == hash(c["Empty"]()),
        lambda c: c["Frozen"](1, sizes=()) in {c["Frozen"](1, sizes=()): 0},
        lambda c: {c["Mutable"](1)},
        lambda c: c["Mutable"](1).later,
        lambda c: _filled(c["Mutable"](1)),
        lambda c: _filled(c["Mutable"](1, limit=4)),
        lambda c: _filled(c["Derived"](1, extra=2)),
        lambda c: c["Mutable"](1).seen is c["Mutable"](1).seen,
        lambda c: c["Frozen"](),
        lambda c: c["Frozen"](1, adr=2),
        lambda c: c["Mutable"](1, 2),
        lambda c: c["Derived"](1),
        lambda c: setattr(c["Frozen"](1), "addr", 2),
        lambda c: delattr(c["Frozen"](1), "addr"),
        lambda c: c["Mutable"](1).__dict__,
        lambda c: [c[name].__match_args__ for name in c],
        lambda c: [c[name].__slots__ for name in ("Frozen", "Mutable", "Derived")],
        lambda c: copy.deepcopy(c["Frozen"](1, sizes={"a": 1})),
    ],
)
def test_like_the_standard_library(act: Callable[[dict[str, Any]], object]) -> None:
    for _ in range(2):  # the first instance of a class compiles its __init__
        assert _outcome(act, OURS) == _outcome(act, THEIRS)


@pytest.mark.parametrize("maker", [facts, dataclasses], ids=["ours", "theirs"])
def test_a_copy_with_changes(maker: ModuleType) -> None:
    classes = OURS if maker is facts else THEIRS
    changed = maker.replace(classes["Frozen"](1, "x"), addr=2)
    assert (changed.addr, changed.name) == (2, "x")
    assert maker.replace(_filled(classes["Mutable"](1, limit=7)), addr=2).limit == 7
    with pytest.raises(TypeError):
        maker.replace(changed, adr=2)


def test_the_standard_library_takes_ours_for_its_own() -> None:
    value = Nested((Nested(number=1),), 2)
    assert dataclasses.is_dataclass(value)
    assert [field.name for field in dataclasses.fields(Nested)] == ["inner", "number"]
    assert facts.asdict(value) == {"inner": ({"inner": (), "number": 1},), "number": 2}
    assert dataclasses.replace(value, number=3) == Nested((Nested(number=1),), 3)
    assert [field.kw_only for field in dataclasses.fields(OURS["Derived"])] == [
        False,
        False,
        False,
        True,
        True,
    ]


def test_the_annotations_of_all_fields() -> None:
    """Of inherited ones too, as they are written."""
    for name, kind in _classes(facts).items():
        ours = facts.annotations_of(kind)
        standard = dataclasses.fields(_classes(dataclasses)[name])
        assert ours == {field.name: str(field.type) for field in standard}


def test_pickled_and_back() -> None:
    value = Nested((Nested(number=1),), 2)
    assert pickle.loads(pickle.dumps(value)) == value
