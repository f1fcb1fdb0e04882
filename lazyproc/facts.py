"""Dataclasses that cost a start next to nothing.

`dataclass`, `field`, `replace` and `asdict` mean what they mean in the standard library, and type checkers see those.
But there each class compiles its methods when it is defined: 0.6 ms of every start for each of more than a hundred
classes (docs/adr/0006). Here all share one `__eq__`, `__hash__` and `__repr__`, and `__init__` is compiled when the
first instance is made. What the project does not use is not here: all classes have slots, none an order.
"""

from __future__ import annotations

__all__ = ["annotations_of", "asdict", "dataclass", "field", "replace"]

TYPE_CHECKING = False  # typing itself costs 5 ms of every start
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

MISSING: Any = object()


class _Field:
    """What is special about a field: how its default is made, whether the caller gives it, whether it is printed."""

    __slots__ = ("default", "default_factory", "init", "kw_only", "repr")

    def __init__(
        self,
        *,
        default: Any = MISSING,
        default_factory: Any = MISSING,
        init: bool = True,
        repr: bool = True,
        kw_only: bool = False,
    ) -> None:
        self.default = default
        self.default_factory = default_factory
        self.init = init
        self.repr = repr
        self.kw_only = kw_only

    def options(self) -> dict[str, Any]:
        """The arguments of dataclasses.field for the same."""
        return {name: value for name in self.__slots__ if (value := getattr(self, name)) is not MISSING}


def _dataclass(*, slots: bool, frozen: bool = False, kw_only: bool = False) -> Callable[[type], type]:
    """The decorator. `slots` has to be True: written out, so that a reader sees the same class as a type checker."""
    assert slots

    def decorate(cls: type) -> type:
        own = {name: _spec(cls.__dict__.get(name, MISSING)) for name in cls.__annotations__}
        for spec in own.values():
            spec.kw_only |= kw_only
        return _rebuilt(cls, own, frozen)

    return decorate


def _spec(default: object) -> _Field:
    return default if isinstance(default, _Field) else _Field(default=default)


def _replace(instance: Any, /, **changes: object) -> Any:
    """A copy with other values in some fields."""
    for name, spec in instance.__facts__.items():
        if spec.init and name not in changes:
            changes[name] = getattr(instance, name)
    return type(instance)(**changes)


def _asdict(instance: Any) -> dict[str, Any]:
    """The fields as a dict, down to the dataclasses within."""
    import dataclasses

    return dataclasses.asdict(instance)


def annotations_of(kind: type) -> dict[str, str]:
    """The name of each field and what is written behind it, in order. (dataclasses.fields would import that.)"""
    return {name: str(_annotation(kind, name)) for name in kind.__facts__}  # type: ignore[attr-defined]


# --- making a class ---------------------------------------------------------------------------------------------


def _rebuilt(cls: Any, own: dict[str, _Field], frozen: bool) -> type:
    """The class once more, with slots: they cannot be added to one that exists."""
    fields: dict[str, _Field] = getattr(cls, "__facts__", {}) | own
    methods: dict[str, Any] = {"__repr__": _repr, "__eq__": _eq, "__hash__": _hash if frozen else None}
    if frozen:
        methods |= {"__setattr__": _refuse_set, "__delattr__": _refuse_delete}
        methods |= {
            "__getstate__": _values,
            "__setstate__": _set_values,
        }  # copy and pickle would set attributes
    written = {name: value for name, value in cls.__dict__.items() if name not in own}
    for name in ("__dict__", "__weakref__"):
        written.pop(name, None)
    made: Any = type(cls)(
        cls.__name__,
        cls.__bases__,
        methods
        | written
        | {
            "__qualname__": cls.__qualname__,
            "__slots__": tuple(own),
            "__match_args__": tuple(name for name, spec in fields.items() if spec.init and not spec.kw_only),
            "__facts__": fields,
            "__dataclass_fields__": _StandardFields(),
        },
    )
    made.__init__ = _compiled_when_called(made, frozen)
    return made  # type: ignore[no-any-return]


def _compiled_when_called(cls: Any, frozen: bool) -> Callable[..., None]:
    def __init__(self: object, *args: object, **kwargs: object) -> None:
        cls.__init__ = _compiled_init(cls, frozen)
        cls.__init__(self, *args, **kwargs)

    return __init__


def _compiled_init(cls: Any, frozen: bool) -> Callable[..., None]:
    """`__init__` with the fields as parameters, so that a wrong call reads as it does for any function."""
    names: dict[str, Any] = {"MISSING": MISSING}
    positional, keywords, lines = ["self"], ["*"], ["pass"]
    for name, spec in cls.__facts__.items():
        default, value = _default(name, spec, names)
        if spec.init:
            (keywords if spec.kw_only else positional).append(name + default)
        elif not value:
            continue  # set later, by whoever knows it
        if frozen:
            names[f"set_{name}"] = getattr(cls, name).__set__  # past __setattr__, which refuses
            lines.append(f"set_{name}(self, {value or name})")
        else:
            lines.append(f"self.{name} = {value or name}")
    if hasattr(cls, "__post_init__"):
        lines.append("self.__post_init__()")
    parameters = ", ".join(positional + (keywords if len(keywords) > 1 else []))
    text = f"def __init__({parameters}):\n " + "\n ".join(lines)
    # Compiled apart: an interrupt within exec() of a string ends Python by SIGINT, whatever is made of it.
    exec(compile(text, f"<{cls.__qualname__}>", "exec"), names)
    init: Callable[..., None] = names["__init__"]
    init.__qualname__ = f"{cls.__qualname__}.__init__"
    return init


def _default(name: str, spec: _Field, names: dict[str, Any]) -> tuple[str, str]:
    """The text behind the parameter, and the value where that is not the parameter itself; adds to `names`."""
    if spec.default_factory is not MISSING:
        names[f"make_{name}"] = spec.default_factory
        made = f"make_{name}()"
        return "=MISSING", f"{made} if {name} is MISSING else {name}" if spec.init else made
    if spec.default is not MISSING:
        names[f"default_{name}"] = spec.default
        return f"=default_{name}", "" if spec.init else f"default_{name}"
    return "", ""


# --- what all classes share -------------------------------------------------------------------------------------


def _values(self: Any) -> tuple[object, ...]:
    return tuple([getattr(self, name) for name in self.__facts__])


def _set_values(self: Any, values: tuple[object, ...]) -> None:
    for name, value in zip(self.__facts__, values, strict=True):
        object.__setattr__(self, name, value)


def _eq(self: Any, other: Any) -> Any:
    return _values(self) == _values(other) if other.__class__ is self.__class__ else NotImplemented


def _hash(self: Any) -> int:
    return hash(_values(self))


def _repr(self: Any) -> str:
    shown = [f"{name}={getattr(self, name)!r}" for name, spec in self.__facts__.items() if spec.repr]
    return f"{type(self).__qualname__}({', '.join(shown)})"


def _refuse_set(_self: object, name: str, _value: object) -> None:
    from dataclasses import FrozenInstanceError

    raise FrozenInstanceError(f"cannot assign to field {name!r}")


def _refuse_delete(_self: object, name: str) -> None:
    from dataclasses import FrozenInstanceError

    raise FrozenInstanceError(f"cannot delete field {name!r}")


class _StandardFields:
    """`__dataclass_fields__` when somebody asks, so that dataclasses.fields, asdict and is_dataclass work as ever."""

    def __get__(self, _instance: object, owner: Any) -> dict[str, Any]:
        import dataclasses

        rows = [
            (name, _annotation(owner, name), dataclasses.field(**spec.options()))
            for name, spec in owner.__facts__.items()
        ]
        standard: Any = dataclasses.make_dataclass(owner.__name__, rows)
        owner.__dataclass_fields__ = standard.__dataclass_fields__
        return dict(standard.__dataclass_fields__)


def _annotation(owner: type, name: str) -> Any:
    return next(cls.__annotations__[name] for cls in owner.__mro__ if name in vars(cls).get("__slots__", ()))


if TYPE_CHECKING:
    from dataclasses import asdict, dataclass, field, replace
else:
    dataclass, field, replace, asdict = _dataclass, _Field, _replace, _asdict
