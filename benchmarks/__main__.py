"""`make bench`: runs every scene, prints medians with spread, and writes them to benchmarks/results."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path

from benchmarks import (
    blackout,
    blackout_criu,
    links,
    local_fault,
    policies,
    restore_start,
    tls,
    toucher,
    trace_cost,
    working_set,
)
from benchmarks.measure import Result, load

RESULTS = Path(__file__).parent / "results"
SCENES: dict[str, Callable[[int], Result]] = {
    "local-fault": local_fault.run,
    "restore-start": restore_start.run,
    "blackout": blackout.run,
    "trace-cost": trace_cost.run,
    "tls": tls.run,
    "toucher": toucher.random,
    "toucher-think": toucher.think,
    "toucher-sequential": toucher.sequential,
    "toucher-zipf": toucher.zipf,
    "remote-fault": links.remote_fault,
    "bulk-rate": links.bulk_rate,
    "links": links.slow_links,
    "blackout-criu": blackout_criu.run,
    "policies": policies.run,
    "working-set": working_set.run,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "scenes", nargs="*", metavar="SCENE", help=f"of {', '.join(SCENES)}; all when none is named"
    )
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    results, before = [], load()
    for name in args.scenes or SCENES:
        result = SCENES[name](args.rounds)
        results.append(result)
        print(f"\n{result.scene}")
        for label, samples in result.samples.items():
            print(f"  {label:44} {samples}")
        for goal in result.goals:
            print(f"  {goal}")
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    path = RESULTS / f"{'-'.join((today, *args.scenes))}.json"  # a part does not take the place of the whole
    record = {
        "date": today,
        "command": "make bench",
        "rounds": args.rounds,
        "kernel": platform.release(),
        "cpus": os.cpu_count(),
        "load_before": before,
        "load_after": load(),
        "results": [result.fields() for result in results],
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\nwritten to benchmarks/results/{path.name}")


if __name__ == "__main__":
    main()
