"""How many faults a second restore of the same images has less, when the first one recorded what was waited for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import Goal, Result, Samples
from benchmarks.receiver import lazyproc
from benchmarks.touching import Cargo
from tests.live.programs import running

CARGO = Cargo("think", 512)  # goes on alike after every restore, a visit a millisecond


def _checkpoint(directory: Path) -> Path:
    images = directory / "images"
    arguments = (directory / "board", *CARGO.arguments())
    with running("touch", *arguments, directory=directory, binary=CARGO.binary) as program:
        command = lazyproc("checkpoint", program.pid, "-D", images)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        program.process.wait()
    return images


def _restore(images: Path, *options: object) -> dict[str, Any]:
    """The report of a restore, once all is there; its tree is killed."""
    command = lazyproc("restore", "-D", images, "--lazy", "--detach", "--json", *options)
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    report: dict[str, Any] = json.loads(done.stdout)
    root = report["root_pid"]
    os.kill(root, signal.SIGKILL)
    while os.path.exists(f"/proc/{root}"):
        time.sleep(0.001)
    return report


def run(rounds: int) -> Result:
    first, second = [], []
    with tempfile.TemporaryDirectory(prefix="lazyproc-bench-", dir="/var/tmp") as name:
        images, record = _checkpoint(Path(name)), Path(name) / "record"
        for _ in range(rounds):
            first.append(float(_restore(images, "--record", record)["pages_urgent"]))
            second.append(float(_restore(images, "--policy", f"recorded:{record}")["pages_urgent"]))
            record.unlink()
    samples = {
        "faults, first restore": Samples("faults", tuple(first)),
        "faults, second restore": Samples("faults", tuple(second)),
    }
    goal = Goal.of("faults of the second / of the first", 0.1, *reversed(samples.values()))
    return Result("a recorded working set", samples, [goal])
