"""What `check` found."""

from __future__ import annotations

from collections.abc import Sequence

from lazyproc.facts import asdict
from lazyproc.host_check import Finding, State
from lazyproc.show.text import table


def findings_text(findings: Sequence[Finding]) -> str:
    """A table; remedies stand below it, for what is not ok."""
    rows = [(finding.name, finding.state.value, finding.detail) for finding in findings]
    remedies = [f"{f.name}: {f.remedy}" for f in findings if f.state is not State.OK and f.remedy]
    return "\n".join([table(rows), *([""] if remedies else []), *remedies])


def findings_fields(findings: Sequence[Finding]) -> dict[str, object]:
    return {
        "ok": all(finding.state is not State.MISSING for finding in findings),
        "findings": [{**asdict(finding), "state": finding.state.value} for finding in findings],
    }
