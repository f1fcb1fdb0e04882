"""Does the blackout grow with memory? The same program with 64 MiB and with 1 GiB, moved between two hosts."""

from __future__ import annotations

import json
import signal
import subprocess
import tempfile
from pathlib import Path

from benchmarks.measure import Goal, Result, Samples
from benchmarks.receiver import lazyproc, receiving
from lazyproc.hosts import Pair, pair_of_hosts
from tests.live.programs import running

SIZES_MIB = (64, 1024)
THREADS = 4
PACE_US = 1000


def move(pair: Pair, mib: int, directory: Path) -> dict[str, object]:
    """One move of a fresh program; the report of `migrate --json`."""
    with running("memory_random", mib, THREADS, PACE_US, directory=directory, host=pair.source) as program:
        with receiving(pair, "--insecure") as address:
            done = pair.source.run(
                lazyproc("migrate", pair.source.vpid(program.pid), address, "--insecure", "--json"),
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
        report: dict[str, object] = json.loads(done.stdout)
        program.watch.wait_beats()
        pair.destination.run(["kill", f"-{signal.SIGKILL.value}", str(report["root_pid"])], check=True)
        return report


def run(rounds: int) -> Result:
    frozen: dict[int, list[float]] = {mib: [] for mib in SIZES_MIB}
    blackout: dict[int, list[float]] = {mib: [] for mib in SIZES_MIB}
    for _ in range(rounds):
        for mib in SIZES_MIB:
            with pair_of_hosts() as pair, tempfile.TemporaryDirectory(dir=pair.shared) as directory:
                report = move(pair, mib, Path(directory))
            frozen[mib].append(float(str(report["frozen_ms"])))
            blackout[mib].append(float(str(report["blackout_ms"])))
    samples: dict[str, Samples] = {}
    for name, values in (("frozen_ms", frozen), ("blackout_ms", blackout)):
        samples |= {f"{name} {mib} MiB": Samples("ms", tuple(values[mib])) for mib in SIZES_MIB}
    small, large = SIZES_MIB
    goals = [
        Goal.of(
            f"{name}, {large} MiB against {small} MiB",
            1.5,
            samples[f"{name} {large} MiB"],
            samples[f"{name} {small} MiB"],
        )
        for name in ("frozen_ms", "blackout_ms")
    ]
    return Result("blackout against memory", samples, goals)
