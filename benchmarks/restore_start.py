"""From the start of the command to the cargo's first heartbeat: `restore --lazy` of 512 MiB beside CRIU 4.2."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.measure import Goal, Result, interleaved
from tests.live.programs import Watch, running
from tests.peer import criu

MIB = 512
# An installed program has its bytecode.
AS_INSTALLED = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
PACE_US = 1000
DEADLINE_S = 20.0


def _checkpoint(directory: Path, engine: list[str]) -> Watch:
    """A stopped program in images; its status block shows the restored one's heartbeat."""
    with running("memory_random", MIB, 2, PACE_US, directory=directory) as program:
        subprocess.run([*engine, str(program.pid)], check=True, stdout=subprocess.DEVNULL)
        program.process.wait()
        return program.watch


def _until_beat(watch: Watch, start: Callable[[], object]) -> float:
    """Milliseconds from just before `start` until a heartbeat has moved."""
    before = watch.read().beats
    begun = time.monotonic()
    start()
    while watch.read().beats == before:
        if time.monotonic() - begun > DEADLINE_S:
            raise RuntimeError(f"no heartbeat within {DEADLINE_S} s")
        time.sleep(0.0002)
    return (time.monotonic() - begun) * 1e3


@contextmanager
def _killed_afterwards(watch: Watch) -> Iterator[None]:
    try:
        yield
    finally:
        pid = watch.read().pid
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        while os.path.exists(f"/proc/{pid}"):
            time.sleep(0.001)


def _lazyproc_once(images: Path, watch: Watch) -> float:
    command = [sys.executable, "-m", "lazyproc.cli.main", "restore", "-D", str(images), "--lazy"]
    commands: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        commands.append(subprocess.Popen(command, env=AS_INSTALLED, stderr=subprocess.DEVNULL))

    try:
        with _killed_afterwards(watch):
            return _until_beat(watch, start)
    finally:
        for process in commands:
            process.wait()


def _criu_once(images: Path, watch: Watch) -> float:
    """Both commands: the daemon has to listen before restore connects, and says so on its status descriptor."""
    daemons: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        read, write = os.pipe()
        daemon = [*criu(), "lazy-pages", "-D", str(images), "--status-fd", str(write)]
        daemons.append(subprocess.Popen(daemon, pass_fds=[write], stderr=subprocess.DEVNULL))
        os.close(write)
        os.read(read, 1)
        os.close(read)
        restore = [
            *criu(),
            "restore",
            "-D",
            str(images),
            "--lazy-pages",
            "--restore-detached",
            "-o",
            "restore.log",
        ]
        subprocess.run(restore, check=True)

    try:
        with _killed_afterwards(watch):
            return _until_beat(watch, start)
    finally:
        for process in daemons:
            process.wait()


def run(rounds: int) -> Result:
    with tempfile.TemporaryDirectory(prefix="lazyproc-bench-", dir="/var/tmp") as name:
        ours, theirs = Path(name) / "lazyproc", Path(name) / "criu"
        for folder in (ours, theirs, theirs / "images"):
            folder.mkdir()
        dump = [sys.executable, "-m", "lazyproc.cli.main", "checkpoint", "-D", str(ours / "images")]
        our_watch = _checkpoint(ours, dump)
        their_watch = _checkpoint(theirs, [*criu(), "dump", "-D", str(theirs / "images"), "-t"])
        _lazyproc_once(ours / "images", our_watch)  # writes the bytecode, where there was none
        samples = interleaved(
            {
                "lazyproc restore --lazy": lambda: _lazyproc_once(ours / "images", our_watch),
                "criu lazy-pages + restore --lazy-pages": lambda: _criu_once(theirs / "images", their_watch),
            },
            rounds,
            "ms",
        )
    mine, peer = samples.values()
    return Result(
        "restore to first heartbeat, 512 MiB",
        samples,
        [Goal.of("lazyproc / CRIU", 1.5, mine, peer)],
    )
