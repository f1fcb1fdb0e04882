"""`make soak`: what takes too long for a test, at full size. Each soak's runs are added to benchmarks/soak/<date>.json.

A soak is a module with NAME and runs(seed), which gives each run's name and what does it: that returns its figures,
or raises AssertionError.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.faults.soak import cuts, hostile, kills, redis

RESULTS = Path(__file__).parents[3] / "benchmarks/soak"
Run = tuple[str, Callable[[], dict[str, object]]]
SOAKS: dict[str, Callable[[int], Iterator[Run]]] = {
    soak.NAME: soak.runs for soak in (hostile, kills, cuts, redis)
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__)
    parser.add_argument(
        "soaks", nargs="*", metavar="SOAK", help=f"of {', '.join(SOAKS)}; all when none is named"
    )
    args = parser.parse_args()
    # Ignored behind the `&` of a script, and then in all that is started.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    seed = int(os.environ.get("LAZYPROC_SEED") or time.time())
    print(f"LAZYPROC_SEED={seed}")
    failed = [name for name in args.soaks or SOAKS if not soak(name, seed)]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def soak(name: str, seed: int) -> bool:
    """Whether all of it went well. A run that failed does not end the others."""
    runs: list[dict[str, object]] = []
    record = {"soak": name, "seed": seed, "started": _now(), "load_before": os.getloadavg(), "runs": runs}
    for label, run in SOAKS[name](seed):
        load = os.getloadavg()[0]
        try:
            figures = run()
        except AssertionError as error:
            figures = {"failed": str(error)[:2000]}
        runs.append({"run": label, "load": load, **figures})
        print(f"{label}: {figures}", flush=True)
    keep({**record, "load_after": os.getloadavg(), "ended": _now()})
    return not any("failed" in run for run in runs)


def keep(record: dict[str, object]) -> None:
    """Into the file of the day."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{datetime.datetime.now(datetime.UTC).date().isoformat()}.json"
    day: dict[str, Any] = {
        "command": "make soak",
        "kernel": platform.release(),
        "cpus": os.cpu_count(),
        "soaks": [],
    }
    if path.exists():
        day = json.loads(path.read_text())
    day["soaks"].append(record)
    path.write_text(json.dumps(day, indent=1) + "\n")


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


if __name__ == "__main__":
    main()
