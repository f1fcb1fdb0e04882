"""JSON objects from strangers: what RFC 8259 allows and no more, no key twice, not deeply nested."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias, cast

from lazyproc.errors import ProtocolError

MAX_DEPTH = 16  # objects and arrays within one another

JsonValue: TypeAlias = "bool | int | float | str | list[JsonValue] | dict[str, JsonValue] | None"


def encode(fields: Mapping[str, JsonValue]) -> bytes:
    """The object in as few bytes as possible. Raises ProtocolError for what `decode` would refuse."""
    _check(dict(fields))
    return json.dumps(dict(fields), separators=(",", ":")).encode()


def decode(payload: bytes) -> dict[str, JsonValue]:
    """The object that `payload` is. Raises ProtocolError."""
    try:
        fields = json.loads(payload.decode(), object_pairs_hook=_distinct, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"the payload is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ProtocolError("the payload is not a JSON object")
    _check(fields)
    return cast(dict[str, JsonValue], fields)


def _distinct(pairs: list[tuple[str, JsonValue]]) -> dict[str, JsonValue]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key appears twice")
    return fields


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _check(fields: object) -> None:
    """Level by level, so that depth costs no stack."""
    level = [fields]
    for _ in range(MAX_DEPTH):
        level = [child for value in level for child in _children(value)]
        if not level:
            return
    raise ProtocolError(f"JSON is nested deeper than {MAX_DEPTH}")


def _children(value: object) -> Sequence[object]:
    if isinstance(value, dict):
        if not all(type(key) is str for key in value):
            raise ProtocolError("a JSON object has a key that is not a string")
        return list(value.values())
    if isinstance(value, list):
        return value
    if isinstance(value, float) and not math.isfinite(value):
        raise ProtocolError("a number is not finite")
    if value is not None and type(value) not in (bool, int, float, str):
        raise ProtocolError(f"{type(value).__name__} is not a JSON value")
    return ()
