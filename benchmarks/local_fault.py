"""What a first touch costs when the page lies in a local image, beside a plain C loop that does no more than that;
and how much memory the pager takes for it."""

from __future__ import annotations

import mmap
import os
import re
import signal
import struct
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from benchmarks.measure import Goal, Result, Samples
from benchmarks.programs import program

PAGES = 64 << 8  # 64 MiB
MEMORY_PAGES = 1 << 18  # 1 GiB, for the pager's own memory
BOARD = struct.Struct("<IIQQQ")  # go, done, median, p99, mean: first_touch.c

# Runs in a process of its own, as `restore --lazy` does; prints the pager process's own memory when told to.
RESTORE = """
import sys, time
from pathlib import Path
from lazyproc.events import ignore
from lazyproc.restore.run import restore
trace = sys.argv[3] if len(sys.argv) > 3 else None
with restore(Path(sys.argv[1]), lazy=True, bulk=sys.argv[2] == "bulk", pidns="auto", policy="sequential",
             listener=ignore, trace=trace) as restored:
    print(restored.root_pid, flush=True)
    if sys.argv[2] == "bulk":
        restored.wait_drained()
        print(Path("/proc/self/status").read_text(), flush=True)
    sys.stdin.read()
"""


class Touches(NamedTuple):
    """The shared file of first_touch.c, but for `go`; in ns."""

    done: int
    median: int
    p99: int
    mean: int


class Cargo:
    """first_touch in images, ready to be restored any number of times."""

    def __init__(self, folder: Path, pages: int, more: int = 0) -> None:
        """`pages` to be touched, above `more` that are not."""
        self.images, self._board = folder / f"images-{pages}", folder / f"board-{pages}"
        self._board.write_bytes(bytes(mmap.PAGESIZE))
        process = subprocess.Popen(
            [program("first_touch"), self._board, str(pages), str(more)],
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.wait_done(1)
        dump: list[str | Path] = [
            sys.executable,
            "-m",
            "lazyproc.cli.main",
            "checkpoint",
            str(process.pid),
            "-D",
            self.images,
        ]
        subprocess.run(dump, check=True, stdout=subprocess.DEVNULL)
        process.wait()

    def read(self) -> Touches:
        return Touches(*BOARD.unpack_from(self._board.read_bytes())[1:])

    def wait_done(self, value: int) -> None:
        while self.read().done != value:
            time.sleep(0.001)

    def set(self, go: int, done: int) -> None:
        with open(self._board, "r+b") as file, closing(mmap.mmap(file.fileno(), mmap.PAGESIZE)) as board:
            board[:8] = struct.pack("<II", go, done)

    def touch_all(self, *trace: Path) -> Touches:
        """What first touches cost, nothing coming but what is touched. The faults go into `trace`."""
        self.set(go=0, done=1)
        with subprocess.Popen(
            [sys.executable, "-c", RESTORE, self.images, "demand", *trace],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as pager:
            assert pager.stdout is not None
            root = int(pager.stdout.readline())
            self.set(go=1, done=1)
            self.wait_done(2)
            os.kill(root, signal.SIGKILL)
            pager.communicate("")
        return self.read()

    def pager_kib(self) -> float:
        """Memory of the pager's process that no file backs, after it has moved everything."""
        with subprocess.Popen(
            [sys.executable, "-c", RESTORE, self.images, "bulk"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as pager:
            assert pager.stdout is not None
            root = int(pager.stdout.readline())
            text = "".join(iter(pager.stdout.readline, "\n"))
            os.kill(root, signal.SIGKILL)
            pager.communicate("")
        return float(sum(int(kib) for kib in re.findall(r"Rss(?:Anon|Shmem):\s+(\d+) kB", text)))


def run(rounds: int) -> Result:
    with tempfile.TemporaryDirectory(prefix="lazyproc-bench-", dir="/var/tmp") as name:
        folder = Path(name)
        cargo = Cargo(folder, PAGES)
        image = folder / "random"
        image.write_bytes(os.urandom(PAGES * mmap.PAGESIZE))
        ours, plain = [], []
        for _ in range(rounds):
            done = subprocess.run(
                [program("floor"), image, str(PAGES)], check=True, capture_output=True, text=True
            )
            plain.append(int(done.stdout.split()[0]) / 1e3)
            ours.append(cargo.touch_all().median / 1e3)
        memory = Cargo(folder, MEMORY_PAGES).pager_kib()
    samples = {
        "first touch, lazyproc": Samples("us", tuple(ours)),
        "first touch, plain C": Samples("us", tuple(plain)),
        "pager memory, 1 GiB": Samples("KiB", (memory,)),
    }
    allowed_kib = (64 << 10) + MEMORY_PAGES * mmap.PAGESIZE / 1024 / 1000
    goals = [
        Goal.of(
            "median first touch, lazyproc / plain C",
            2,
            samples["first touch, lazyproc"],
            samples["first touch, plain C"],
        ),
        Goal("pager memory / (64 MiB + 1/1000)", memory / allowed_kib, 1),
    ]
    return Result("faults from a local image", samples, goals)
