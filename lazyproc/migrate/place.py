"""Where the two sides of a session find one another again after a link was lost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lazyproc.facts import dataclass
from lazyproc.pages.peer import Trust


@dataclass(frozen=True, slots=True)
class Place:
    """Where the source can reach this host again, and who is let in there; with `dials` where it is reached from here.
    "" when there is no source, but images.
    """

    address: str
    trust: Trust
    dials: bool = False

    def facts(self) -> dict[str, object]:
        """For the journal."""
        return {"address": self.address, "dials": self.dials, **self.trust.facts()}

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Place:
        return cls(str(facts["address"]), Trust.of(facts), bool(facts.get("dials")))
