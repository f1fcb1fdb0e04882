"""Guests of 512 MiB and 2 GiB in every way that lazyproc has for them. No beat may be missing and no page wrong."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from benchmarks.engines import timed_migrate
from benchmarks.measure import Result, Samples
from benchmarks.qemu import by_lazyproc
from benchmarks.receiver import DEADLINE_S, lazyproc, receiving
from benchmarks.saved_guest import kept, served
from benchmarks.wires import hosts
from tests.qemu.guests import Guest, Shape, beating, empty_disk, longest_gap, waiting

BEFORE, AFTER = 40, 60  # beats
CLONES = 2
SHAPES = {
    "pc, 512 MiB": Shape(memory=512, visited=128, net=True),
    "q35, 2 CPUs, 2 GiB in a memfd": Shape("q35", memory=2048, visited=512, cpus=2, shared=True, net=True),
    "pc, 2 CPUs, 2 GiB": Shape(memory=2048, visited=512, cpus=2, net=True),
    "q35, 512 MiB in a memfd": Shape("q35", memory=512, visited=128, shared=True, net=True),
}
IN_EVERY_WAY = tuple(SHAPES)[:2]
Readings = Mapping[str, float]  # ms by what they are


def by_its_monitor(shape: Shape) -> Readings:
    with hosts() as pair:
        shape = replace(shape, disk=empty_disk(pair.shared))
        with beating(shape, pair.shared, host=pair.source) as guest:
            guest.serial.wait(BEFORE)
            with by_lazyproc(pair, guest) as span:
                return _moved(guest, span.begun, span.whole)


def as_a_process(shape: Shape) -> Readings:
    with hosts() as pair:
        shape = replace(shape, disk=empty_disk(pair.shared))
        with beating(shape, pair.shared, host=pair.source) as guest:
            guest.serial.wait(BEFORE)
            with receiving(pair, "--insecure") as address:
                begun, vpid = time.monotonic(), pair.source.vpid(guest.pid)
                _, at = timed_migrate(pair.source, vpid, address, "--insecure")
                return _moved(guest, begun, at["released"])


def to_a_qemu_that_waits(shape: Shape) -> Readings:
    """A running guest, over QEMU's own protocol."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shape = replace(shape, disk=empty_disk(folder))
        with (
            beating(shape, folder) as guest,
            waiting(shape, guest.serial, folder / "there", capabilities=["postcopy-preempt"]) as (_, where),
        ):
            guest.serial.wait(BEFORE)
            begun = time.monotonic()
            words = lazyproc("qemu-serve", guest.qmp, "--to", where, "--preempt")
            subprocess.run(words, check=True, capture_output=True, timeout=DEADLINE_S)
            return _moved(guest, begun, time.monotonic())


def _moved(guest: Guest, begun: float, whole: float) -> Readings:
    guest.serial.wait(AFTER)
    beats = guest.serial.check()
    return {"longest gap": longest_gap(beats, begun) * 1e3, "total": (whole - begun) * 1e3}


def saved_and_cloned(shape: Shape) -> Readings:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shape = replace(shape, disk=empty_disk(folder))
        images = kept(shape, folder)
        disks = [Path(shutil.copy(folder / "disk", folder / f"disk{number}")) for number in range(CLONES)]
        alone = served(images, [shape])
        clones = served(images, [replace(shape, disk=disk) for disk in disks])
    return {
        "saved, first beat": alone.first_beats[0],
        "saved, total": alone.whole,
        f"last first beat of {CLONES}": clones.first_beats[-1],
        f"total of {CLONES}": clones.whole,
    }


Way = Callable[[Shape], Readings]
WAYS: Mapping[str, Way] = {
    "as a process": as_a_process,
    "to a QEMU that waits": to_a_qemu_that_waits,
    "from a folder": saved_and_cloned,
}


def run(rounds: int) -> Result:
    values: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        for name, shape in SHAPES.items():
            ways = {"migrate --qemu": by_its_monitor, **(WAYS if name in IN_EVERY_WAY else {})}
            for way, move in ways.items():
                for what, value in move(shape).items():
                    values[f"{name}, {way}: {what}"].append(value)
    samples = {name: Samples("ms", tuple(found)) for name, found in values.items()}
    return Result("guests of 512 MiB and 2 GiB, in every way", samples, [])
