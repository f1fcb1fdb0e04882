"""What a tree needs, and what stands in its way, as the NEEDS and OBSTACLES frames carry them (docs/protocol.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from lazyproc.errors import Obstacle, ProtocolError
from lazyproc.facts import annotations_of
from lazyproc.needs import (
    AddressNeed,
    FeatureNeed,
    FifoNeed,
    FileNeed,
    GroupNeed,
    InterfaceNeed,
    LimitNeed,
    NameNeed,
    Need,
    NetlinkNeed,
    Options,
    PathNeed,
    PidNeed,
    PlaceNeed,
    PrivilegeNeed,
    SegmentNeed,
    SocketFileNeed,
    TerminalNeed,
    UserNeed,
    Wanted,
)
from lazyproc.wire import jsonobject
from lazyproc.wire.frame import MAX_NEEDS
from lazyproc.wire.jsonobject import JsonValue
from lazyproc.wire.native import Needs, Obstacles

KINDS: Mapping[str, type[Need]] = {
    "file": FileNeed,
    "path": PathNeed,
    "fifo": FifoNeed,
    "place": PlaceNeed,
    "socket": SocketFileNeed,
    "name": NameNeed,
    "address": AddressNeed,
    "interface": InterfaceNeed,
    "netlink": NetlinkNeed,
    "terminal": TerminalNeed,
    "segment": SegmentNeed,
    "pid": PidNeed,
    "feature": FeatureNeed,
    "user": UserNeed,
    "group": GroupNeed,
    "privilege": PrivilegeNeed,
    "limit": LimitNeed,
}
_NAMES = {cls: name for name, cls in KINDS.items()}
_ROOM = 256  # bytes of a frame that are not entries

T = TypeVar("T")


def needs_frame(wanted: Sequence[Wanted]) -> tuple[Needs, int]:
    """The frame, and how many needs there was no room for: those are found when they are missed."""
    rows = [_row(each) for each in wanted]
    kept = _fitting(rows)
    return Needs({"needs": list(kept)}), len(rows) - len(kept)


def needs_in(frame: Needs) -> tuple[Wanted, ...]:
    """Needs of a kind that is not known here are left out: a newer source may have more. Raises ProtocolError."""
    rows = [_object(row) for row in _list(frame.fields.get("needs"))]
    return tuple(_wanted(row) for row in rows if row.get("kind") in KINDS)


def obstacles_frame(obstacles: Sequence[Obstacle]) -> Obstacles:
    """As many as there is room for; the rest is counted."""
    rows: list[dict[str, JsonValue]] = [
        {"pid": each.pid, "where": each.where, "why": each.why, "remedy": each.remedy} for each in obstacles
    ]
    kept = _fitting(rows)
    return Obstacles({"obstacles": list(kept), "more": len(rows) - len(kept)})


def obstacles_in(frame: Obstacles, peer: str) -> tuple[Obstacle, ...]:
    """What stands in the way at `peer`, who speaks of its own host. Never empty. Raises ProtocolError."""
    found = []
    for row in map(_object, _list(frame.fields.get("obstacles"))):
        where, why, remedy = (_of(row, name, str) for name in ("where", "why", "remedy"))
        found.append(Obstacle(_of(row, "pid", int), where, f"{peer}: {why}", remedy))
    more = frame.fields.get("more", 0)
    if more or not found:
        found.append(Obstacle(0, "host", f"{peer}: {more} more", "mend those above, then look again"))
    return tuple(found)


def _fitting(rows: list[dict[str, JsonValue]]) -> list[JsonValue]:
    """The first rows, as far as a frame has room."""
    kept: list[JsonValue] = []
    left = MAX_NEEDS - _ROOM
    for row in rows:
        left -= len(jsonobject.encode(row)) + 1
        if left < 0:
            break
        kept.append(row)
    return kept


# --- one need -----------------------------------------------------------------------------------------------


def _row(wanted: Wanted) -> dict[str, JsonValue]:
    need = wanted.need
    row: dict[str, JsonValue] = {"kind": _NAMES[type(need)], "pid": wanted.pid, "where": wanted.where}
    for name, kind in annotations_of(type(need)).items():
        row[name] = _ENCODE.get(kind, _same)(getattr(need, name))
    return row


def _wanted(row: Mapping[str, JsonValue]) -> Wanted:
    cls = KINDS[str(row["kind"])]
    values: dict[str, Any] = {name: _DECODE[kind](row, name) for name, kind in annotations_of(cls).items()}
    return Wanted(cls(**values), _of(row, "pid", int), _of(row, "where", str))


def _same(value: T) -> T:
    return value


def _options(row: Mapping[str, JsonValue], name: str) -> Options:
    found = []
    for option in _list(row.get(name)):
        match option:
            case [int(level), int(number), str(value)]:
                found.append((level, number, _unhex(value, name)))
            case _:
                raise ProtocolError(f"an option in {name} is not level, number and value")
    return tuple(found)


def _unhex(text: str, name: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise ProtocolError(f"the {name} of a need is not hexadecimal") from None


# By the annotation of the field. Raw bytes are hexadecimal; a path that is not UTF-8 keeps its escapes (PEP 383).
_ENCODE: Mapping[str, Callable[..., JsonValue]] = {
    "bytes": bytes.hex,
    "Options": lambda options: [[level, number, value.hex()] for level, number, value in options],
}
_DECODE: Mapping[str, Callable[[Mapping[str, JsonValue], str], object]] = {
    "str": lambda row, name: _of(row, name, str),
    "int": lambda row, name: _of(row, name, int),
    "bytes": lambda row, name: _unhex(_of(row, name, str), name),
    "Options": _options,
}


def _of(row: Mapping[str, JsonValue], name: str, kind: type[T]) -> T:
    value = row.get(name)
    if type(value) is not kind:
        raise ProtocolError(f"{name} of an entry is {value!r:.40}, not {kind.__name__}")
    return value


def _list(value: JsonValue) -> list[JsonValue]:
    if not isinstance(value, list):
        raise ProtocolError("a list is missing")
    return value


def _object(value: JsonValue) -> dict[str, JsonValue]:
    if not isinstance(value, dict):
        raise ProtocolError("an entry of a list is no object")
    return value
