"""What a command has to say at its end; main prints it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lazyproc.facts import dataclass, field


@dataclass(frozen=True, slots=True)
class Outcome:
    """`text` for people, `fields` for --json, and the exit code."""

    text: str = ""
    fields: Mapping[str, object] | Sequence[Mapping[str, object]] = field(default_factory=dict)
    status: int = 0
