"""What the user asks for when something is to move."""

from __future__ import annotations

from lazyproc.facts import dataclass
from lazyproc.uffd.policy import named


@dataclass(frozen=True, slots=True)
class Order:
    """What the user asked for."""

    mode: str = "postcopy"  # or stopcopy: all of its memory comes before it runs there
    policy: str | None = None  # what comes next, docs/cli.md#policies; None: sequential, for a guest pivots
    bulk: bool = True  # what nobody waits for comes, too
    max_rate: int = 0  # bytes a second, 0 without limit
    tcp_close: bool = False  # TCP connections to others are given up
    release: bool = False  # memory here is freed as it is acknowledged

    def demand_known(self) -> None:
        """Raises UsageError for a policy that does not exist. One that was recorded is the destination's to name."""
        if self.policy is not None:
            named(self.policy)

    def fields(self) -> dict[str, str | int | bool]:
        fields = {name: getattr(self, name) for name in self.__slots__}
        return {**fields, "policy": self.policy or "sequential"}


USUAL = Order()
