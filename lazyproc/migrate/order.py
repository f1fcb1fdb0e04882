"""What the user asks for when something is to move."""

from __future__ import annotations

from lazyproc.facts import dataclass


@dataclass(frozen=True, slots=True)
class Order:
    """What the user asked for."""

    mode: str = "postcopy"  # or stopcopy
    policy: str | None = None  # of uffd.policy; None: sequential, for a guest pivots
    bulk: bool = True
    max_rate: int = 0  # bytes a second, 0 without limit
    tcp_close: bool = False  # TCP connections to others are given up
    release: bool = False  # memory here is freed as it is acknowledged

    def fields(self) -> dict[str, str | int | bool]:
        fields = {name: getattr(self, name) for name in self.__slots__}
        return {**fields, "policy": self.policy or "sequential"}
