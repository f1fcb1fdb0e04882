"""Many cases one after another, and how many ended how."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable

from tests.faults.campaign.cases import AtFrame, AtJournal, Case
from tests.faults.campaign.judge import Fault
from tests.faults.campaign.run import run


def tally(cases: Iterable[Case]) -> dict[str, object]:
    """Counts by outcome, victims and moment; `failed` has all that is known of each broken promise."""
    outcomes: Counter[str] = Counter()
    moments: Counter[str] = Counter()
    failed: list[str] = []
    slowest, started = 0.0, time.monotonic()
    for case in cases:
        begun = time.monotonic()
        try:
            outcome = str(run(case))
        except Fault as fault:
            outcome = "a promise was broken"
            failed.append(str(fault))
            print(fault, flush=True)
        took = time.monotonic() - begun
        slowest = max(slowest, took)
        outcomes[outcome] += 1
        moments[_kind(case)] += 1
        print(f"{case.number} {took:.1f} s {case}: {outcome}", flush=True)
    figures: dict[str, object] = {
        "cases": outcomes.total(),
        "outcomes": dict(outcomes.most_common()),
        "moments": dict(moments.most_common()),
        "slowest_s": round(slowest, 1),
        "minutes": round((time.monotonic() - started) / 60, 1),
    }
    return {**figures, "failed": failed} if failed else figures


def _kind(case: Case) -> str:
    return str(case.moment) if isinstance(case.moment, AtFrame | AtJournal) else "a number of bytes"
