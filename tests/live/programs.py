"""Compiles, starts, watches and stops the self-checking programs of tests/programs (see check.h there)."""

from __future__ import annotations

import contextlib
import enum
import os
import re
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lazyproc.hosts import Host

SOURCES = Path(__file__).parents[1] / "programs"
BINARIES = SOURCES / "bin"
UNSUPPORTED = 77  # a program's exit status when the machine lacks what it checks
WARNINGS = ("-Wall", "-Wextra", "-Werror")
ARGUMENTS = {  # of a program that is given none
    "clocks": ("20000",),  # ms: how far a clock may leap and how long a sleep may last while other tests run
    "fork_lazy": ("2",),
    "memory_random": ("8", "2", "100"),
    "sleeps": ("5000",),
    "timers": ("5000",),
}

_HEAD = struct.Struct("<8sII4QIIQ192s")
_BEATS = struct.Struct("<32Q")
_STALLS = struct.Struct("<384Q")
_FLAGS_OFFSET = 48
_EXCLUSIVE = 1


def compile_program(name: str) -> Path:
    """The executable of tests/programs/NAME.c, compiled when it or a header is newer."""
    source, binary = SOURCES / f"{name}.c", BINARIES / name
    newest = max(path.stat().st_mtime_ns for path in (source, *SOURCES.glob("*.h")))
    if binary.exists() and binary.stat().st_mtime_ns > newest:
        return binary
    BINARIES.mkdir(exist_ok=True)
    fresh = binary.with_suffix(f".{os.getpid()}")  # another test session may run the old one
    command = [os.environ.get("CC", "gcc"), "-std=gnu11", "-O2", "-g", *WARNINGS, "-D_GNU_SOURCE", "-pthread"]
    subprocess.run([*command, "-o", fresh, source, "-lrt"], check=True)
    fresh.rename(binary)
    return binary


def wait_until(condition: Callable[[], bool], what: str, deadline_s: float = 20.0) -> None:
    """Polls with growing pauses; AssertionError naming `what` when the deadline passes."""
    until, pause = time.monotonic() + deadline_s, 0.001
    while not condition():
        assert time.monotonic() < until, f"not within {deadline_s} s: {what}"
        time.sleep(pause)
        pause = min(pause * 1.5, 0.05)


class Phase(enum.IntEnum):
    STARTING = 0
    RUNNING = 1
    FINAL = 2
    ENDED = 3


@dataclass(frozen=True, slots=True)
class Status:
    """One reading of a program's status block, as check.h lays it out; `stalls` are counts per bucket."""

    pid: int
    phase: Phase
    errors: int
    bad_addr: int
    expected: int
    found: int
    slowest_ns: int
    what: str
    beats: tuple[int, ...]
    stalls: tuple[int, ...]

    def __str__(self) -> str:
        first = f"{self.what} (at {self.bad_addr:#x}: expected {self.expected:#x}, found {self.found:#x})"
        return f"{self.phase.name}, {self.errors} error(s){': ' + first if self.errors else ''}"


def stall_floor_ns(bucket: int) -> int:
    """The shortest stall that falls into a bucket of the histogram."""
    octave, step = divmod(bucket, 16)
    return (1024 << octave) * (16 + step) // 16


@dataclass(frozen=True, slots=True)
class Watch:
    """A status block, read where the test runs, wherever its program runs."""

    path: Path

    @classmethod
    def create(cls, path: Path, *, exclusive: bool) -> Watch:
        block = bytearray(4096)
        struct.pack_into("<I", block, _FLAGS_OFFSET, _EXCLUSIVE if exclusive else 0)
        path.write_bytes(block)
        return cls(path)

    def read(self) -> Status:
        block = self.path.read_bytes()
        _, pid, phase, errors, addr, expected, found, _, workers, slowest, what = _HEAD.unpack_from(block)
        return Status(
            pid,
            Phase(phase),
            errors,
            addr,
            expected,
            found,
            slowest,
            what.split(b"\0", 1)[0].decode(),
            _BEATS.unpack_from(block, 256)[:workers],
            _STALLS.unpack_from(block, 512),
        )

    def wait_running(self, deadline_s: float = 20.0) -> None:
        wait_until(lambda: self.read().phase >= Phase.RUNNING, f"{self.path.name}: set up", deadline_s)

    def wait_beats(self, rounds: int = 2, deadline_s: float = 20.0) -> None:
        """Until every worker has done that many more rounds of checks; AssertionError when one failed."""
        before = self.read().beats

        def moved() -> bool:
            now = self.read()
            assert now.errors == 0, str(now)
            return all(beat >= old + rounds for beat, old in zip(now.beats, before, strict=True))

        try:
            wait_until(moved, f"{self.path.name}: {rounds} rounds of every worker", deadline_s)
        except AssertionError as error:
            raise AssertionError(f"{error}; beats {before} -> {self.read().beats}; {self.read()}") from None

    def wait_ended(self, deadline_s: float = 30.0) -> None:
        """Until the program has ended its last check, and well."""
        wait_until(lambda: self.read().phase is Phase.ENDED, f"{self.path.name}: last check", deadline_s)
        assert self.read().errors == 0, str(self.read())


@dataclass(frozen=True, slots=True)
class Program:
    """A program that this test started, as long as it runs where it was started."""

    watch: Watch
    process: subprocess.Popen[Any]

    @property
    def pid(self) -> int:
        """As the test sees it; the pid inside a host is `host.vpid(pid)`."""
        return self.process.pid

    def stop(self, deadline_s: float = 30.0) -> int:
        """Asks for the last check and returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(deadline_s)

    def stop_and_verify(self, deadline_s: float = 30.0) -> None:
        returned = self.stop(deadline_s)
        assert returned == 0, f"exit status {returned}: {self.watch.read()}"
        self.watch.wait_ended()


@contextmanager
def running(
    name: str,
    *arguments: object,
    directory: Path,
    host: Host | None = None,
    exclusive: bool = False,
    binary: Path | None = None,
    streams: Mapping[str, int] = {},
) -> Iterator[Program]:
    """A program, set up and checking; killed with its whole group at the end if it still runs.

    The status block lies in `directory`, which must be visible at both ends of a move (`pair.shared`).
    `exclusive`: an error when two copies ever run at once; not for several restores of one checkpoint.
    `binary`: its executable, as the host sees it, when it lies elsewhere. `streams`: stdin, stdout or stderr, by these
    names, when they are not to be a null device and a log.
    """
    watch = Watch.create(directory / f"{name}.status", exclusive=exclusive)
    words = arguments or ARGUMENTS.get(name, ())
    argv = [str(word) for word in (binary or compile_program(name), watch.path, *words)]
    with (directory / f"{name}.log").open("w") as log:  # no terminal, which cannot be moved
        all_streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, **streams}
        start = host.popen if host else subprocess.Popen
        process = start(argv, start_new_session=True, **all_streams)
    try:
        wait_until(
            lambda: process.poll() is not None or watch.read().phase >= Phase.RUNNING, f"{name}: set up"
        )
        assert process.poll() in (None, UNSUPPORTED), f"{name} ended during its set-up: {process.returncode}"
        yield Program(watch, process)
    finally:
        _end(process)


def _end(process: subprocess.Popen[Any]) -> None:
    """With whoever traces it still: a zombie is kept from its parent until then (kernel/exit.c: wait_consider_task)."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(
        FileNotFoundError, ProcessLookupError
    ):  # the latter when it goes while it is read
        tracer = re.search(r"^TracerPid:\t([1-9]\d*)$", Path(f"/proc/{process.pid}/status").read_text(), re.M)
        if tracer:
            os.kill(int(tracer[1]), signal.SIGKILL)
    process.wait()


def stands_still(program: Program, seconds: float = 0.2) -> bool:
    """Nothing tells when nothing happens: this is the one thing that only time can show."""
    before = program.watch.read()
    time.sleep(seconds)
    return program.watch.read() == before
