"""A saved guest goes on in a QEMU that waits: how soon it beats, alone and in eight at once. Beside it QEMU, which
reads all of its own file before the guest runs."""

from __future__ import annotations

import json
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import Goal, Result, Samples
from benchmarks.receiver import DEADLINE_S, lazyproc
from tests.qemu.guests import Serial, Shape, beating, monitor, saved, started, waiting

LARGE = Shape(memory=1024, visited=512)
CLONED = Shape(memory=256, visited=64)
CLONES = 8
BEATS = 40  # of each
FIRST_MS, MEDIAN_MS, LAST_MS = 100, 200, 500
ALONE, WHOLE, QEMU = "first beat, 1 GiB", "whole, 1 GiB", "first beat, 1 GiB, QEMU from its own file"
MEDIAN, LAST, ALL = f"median first beat of {CLONES}", f"last first beat of {CLONES}", f"whole, {CLONES}"


@dataclass(frozen=True, slots=True)
class Served:
    """Since the first byte of the stream, in ms: each guest's first beat, in order, and until the last page."""

    first_beats: Sequence[float]
    whole: float


def kept(shape: Shape, folder: Path) -> Path:
    """A guest that beats, in a folder of images."""
    with beating(shape, folder) as guest:
        words = lazyproc("checkpoint", "--qemu", guest.qmp, "-D", folder / "images")
        subprocess.run(words, check=True, capture_output=True, timeout=DEADLINE_S)
    return folder / "images"


def served(images: Path, shapes: Sequence[Shape]) -> Served:
    """The saved guest goes on in QEMUs of these shapes that wait already. No beat may be missing and no page wrong."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        lines = [stack.enter_context(Serial(folder / f"serial{number}")) for number in range(len(shapes))]
        targets = [
            stack.enter_context(waiting(shape, line, folder / f"there{number}"))[1]
            for number, (shape, line) in enumerate(zip(shapes, lines, strict=True))
        ]
        began, whole = _stream(images, targets)
        for line in lines:
            line.wait(BEATS)
            line.check()
        firsts = sorted((line.beats()[0].at - began) * 1e3 for line in lines)
    return Served(firsts, (whole - began) * 1e3)


def _stream(images: Path, targets: Sequence[str]) -> tuple[float, float]:
    """When its first byte was sent, and the last page was there, by time.monotonic()."""
    words = lazyproc(
        "qemu-serve", "-D", images, *(word for each in targets for word in ("--to", each)), "--json", "-v"
    )
    serving = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert serving.stderr is not None
    at = {line.strip(): time.monotonic() for line in serving.stderr}
    out = serving.communicate(timeout=DEADLINE_S)[0]
    ended = time.monotonic()
    if serving.returncode:
        raise RuntimeError(f"lazyproc qemu-serve: exit {serving.returncode}: {'; '.join(at)}")
    report: dict[str, Any] = json.loads(out)
    first = report["guests"][0] if "guests" in report else report
    return at["running"] - first["run_ms"] / 1e3, ended


def by_qemu(file: Path, shape: Shape) -> float:
    """ms from the word to take the guest in to its first beat."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (
            Serial(folder / "serial") as serial,
            started(shape, serial, folder, "-incoming", "defer") as guest,
            monitor(guest) as qmp,
        ):
            began = time.monotonic()
            qmp.execute("migrate-incoming", {"uri": f"exec:cat {file}"})
            serial.wait(BEATS)
            return (serial.check()[0].at - began) * 1e3


def run(rounds: int) -> Result:
    values: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name, each) for each in ("large", "cloned", "file")]
        for folder in folders:
            folder.mkdir()
        large, cloned = kept(LARGE, folders[0]), kept(CLONED, folders[1])
        file = saved(LARGE, folders[2])
        for _ in range(rounds):
            alone = served(large, [LARGE])
            values[ALONE].append(alone.first_beats[0])
            values[WHOLE].append(alone.whole)
            values[QEMU].append(by_qemu(file, LARGE))
            clones = served(cloned, [CLONED] * CLONES)
            values[MEDIAN].append(statistics.median(clones.first_beats))
            values[LAST].append(clones.first_beats[-1])
            values[ALL].append(clones.whole)
    samples = {name: Samples("ms", tuple(found)) for name, found in values.items()}
    goals = [
        Goal.of(f"{what}, ms", limit, samples[what])
        for what, limit in ((ALONE, FIRST_MS), (MEDIAN, MEDIAN_MS), (LAST, LAST_MS))
    ]
    return Result("a saved guest goes on", samples, goals)
