"""What a checkpoint, a restore or a migration measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lazyproc.facts import asdict
from lazyproc.model import PAGE
from lazyproc.show.text import plural, size, table

if TYPE_CHECKING:
    from lazyproc.dump.checkpoint import CheckpointReport
    from lazyproc.migrate.guest_checkpoint import GuestCheckpointReport
    from lazyproc.migrate.guest_serve import GuestServed
    from lazyproc.migrate.report import MigrateReport
    from lazyproc.restore.run import RestoreReport

PLACES = ("zero", "eager", "urgent", "bulk", "dropped", "poisoned")


def report_fields(
    report: CheckpointReport | GuestCheckpointReport | GuestServed | MigrateReport | RestoreReport,
) -> dict[str, object]:
    """What `--json` prints."""
    return asdict(report)


def checkpoint_text(report: CheckpointReport, directory: str) -> str:
    return (
        f"{plural(report.tasks, 'task')} with {plural(report.threads, 'thread')} and "
        f"{size(report.pages_total * PAGE)} of memory in {directory}: {size(report.bytes)}, "
        f"frozen for {report.frozen_ms:.0f} ms"
    )


def guest_checkpoint_text(report: GuestCheckpointReport, directory: str) -> str:
    return (
        f"the guest of pid {report.pid} with {size(report.pages_total * PAGE)} of memory in {directory}, "
        f"frozen for {report.frozen_ms:.0f} ms"
    )


def guest_served_text(report: GuestServed) -> str:
    return (
        f"the guest runs at {report.target}: {report.pages_urgent} pages that it waited for, {report.pages_bulk} behind"
        f" them, in {report.total_ms:.0f} ms"
    )


def restore_text(report: RestoreReport) -> str:
    return f"runs as pid {report.root_pid} (pid {report.root_vpid} inside)"


def migrate_text(report: MigrateReport, pid: int, target: str) -> str:
    """One sentence and a table."""
    ending = "came to its own end there" if report.ended else f"runs there as pid {report.root_pid}"
    return f"pid {pid} is at {target} and {ending}\n{measures(asdict(report))}"


def resume_text(session: str, fields: Mapping[str, object]) -> str:
    """Of either side of a session that is complete."""
    return f"session {session} is complete: {fields['pages_total']} pages ({_by_way(fields)})"


def lazy_pages_text(fields: Mapping[str, object]) -> str:
    ending = ", and its processes have ended" if fields.get("ended") else ""
    return f"complete: {fields['pages_total']} pages ({_by_way(fields)}){ending}"


def measures(fields: Mapping[str, object]) -> str:
    """The figures of a migration's report, as `--json` has them, as a table."""
    rows = [
        ("frozen", f"{fields['frozen_ms']:.1f} ms"),
        ("did not run", f"{fields['blackout_ms']:.1f} ms"),
        ("all in all", f"{fields['total_ms']:.0f} ms"),
        ("pages", f"{fields['pages_total']} ({_by_way(fields)})"),
        ("on the wire", size(_number(fields["bytes_wire"]))),
    ]
    faults = fields["fault_us"]
    if isinstance(faults, Mapping) and faults.get("count"):
        names = ("p50", "p90", "p99", "max")
        rows.append(("a fault took", ", ".join(f"{name} {faults[name]:.0f} us" for name in names)))
    return table([(f"  {name}", value) for name, value in rows])


def _by_way(fields: Mapping[str, object]) -> str:
    return ", ".join(f"{fields[f'pages_{name}']} {name}" for name in PLACES if fields.get(f"pages_{name}"))


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
