"""A restore that knows what the last one waited for, of a program that visits that at once: 16 MiB of 128."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from benchmarks.local_fault import Cargo
from benchmarks.measure import Goal, Result, Samples

VISITED, MORE = 16 << 8, 112 << 8  # pages
UNITS = {
    "faults": "faults",
    "first visit, mean": "us",
    "first visit, p99": "us",
    "until all are visited": "ms",
}

# Runs in a process of its own, as `restore --lazy` does; told that all is visited it says how many faults there were.
RESTORE = """
import sys
from pathlib import Path
from lazyproc.events import ignore
from lazyproc.restore import run
images, policy, record, place_s, bulk = sys.argv[1:]
run.PLACE_S = float(place_s)
with run.restore(Path(images), lazy=True, pidns="auto", policy=policy, record=record or None, bulk=bulk == "bulk",
                 listener=ignore) as restored:
    print(restored.root_pid, flush=True)
    sys.stdin.readline()
    if bulk == "bulk":
        restored.wait_drained()
    print(restored.counters().fault_us.count, flush=True)
"""


def run(rounds: int) -> Result:
    """Without a record, with one that bulk begins with, and with one that is there before the first instruction."""
    values: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="lazyproc-bench-", dir="/var/tmp") as name:
        cargo = Cargo(Path(name), VISITED, MORE)
        record = Path(name) / "record"
        restored(cargo, "sequential", record, bulk=False)
        for _ in range(rounds):
            for policy, place_s in (
                ("sequential", 0.0),
                (f"recorded:{record}", 0.0),
                (f"recorded:{record}", 0.1),
            ):
                found = restored(cargo, policy, place_s=place_s)
                label = policy.partition(":")[0] + (", placed before" if place_s else "")
                for key, value in found.items():
                    values[f"{label}: {key}"].append(value)
    samples = {name: Samples(UNITS[name.rpartition(": ")[2]], tuple(found)) for name, found in values.items()}
    goal = Goal.of(
        "faults of the second / of the first",
        0.1,
        samples["recorded, placed before: faults"],
        samples["sequential: faults"],
    )
    return Result("a recorded working set", samples, [goal])


def restored(
    cargo: Cargo, policy: str, record: Path | None = None, *, bulk: bool = True, place_s: float = 0.0
) -> dict[str, float]:
    """One restore of a cargo that visits its set as soon as it runs."""
    arguments = (cargo.images, policy, record or "", str(place_s), "bulk" if bulk else "demand")
    cargo.set(go=1, done=1)
    begun = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-c", RESTORE, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as pager:
        cargo.wait_done(2)
        took = time.monotonic() - begun
        assert pager.stdout is not None
        root = int(pager.stdout.readline())
        out, _ = pager.communicate("\n")
        os.kill(root, signal.SIGKILL)
    board = cargo.read()
    visits = (float(out), board.mean / 1e3, board.p99 / 1e3, took * 1e3)
    return dict(zip(UNITS, visits, strict=True))
