"""What a migration measured: the fields of `migrate --json`."""

from __future__ import annotations

from lazyproc.facts import asdict, dataclass, field


@dataclass(frozen=True, slots=True)
class MigrateReport:
    """Times in ms on the source's clock, pages of 4096 bytes each counted once; see docs/cli.md."""

    session: str
    mode: str
    root_pid: int  # in the receiver's pid namespace
    root_vpid: int
    frozen_ms: float
    blackout_ms: float
    total_ms: float
    rtt_us: float
    pages_total: int
    pages_zero: int
    pages_eager: int
    pages_urgent: int
    pages_bulk: int
    pages_packed: int  # of urgent and bulk those that came compressed
    pages_dropped: int
    pages_poisoned: int  # lost: the operator there gave the source up
    bytes_wire: int
    reconnects: int
    fault_us: dict[str, float] = field(default_factory=dict)
    ended: bool = False
    steps_ms: dict[str, float] = field(default_factory=dict)
    steps_there_ms: dict[str, float] = field(default_factory=dict)

    def json(self) -> dict[str, object]:
        return asdict(self)
