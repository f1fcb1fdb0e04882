"""A real CRIU on the test hosts: its commands in the background, and a tree that it has restored."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lazyproc.hosts import Host
from tests import peer
from tests.live.programs import Phase, Program, Watch, compile_program, wait_until

END_S = 30
LARGE_PIPE = 4 << 20
FREE_NUMBER = 500  # that no process of a test host has by then


@dataclass(slots=True)
class Criu:
    """A command of CRIU that runs on a host, or has."""

    process: subprocess.Popen[Any]
    log: Path

    def errors(self) -> str:
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "\n".join([*(line for line in text.splitlines() if "Error" in line), text[-1500:]])

    def finish(self, expected: int = 0) -> None:
        code = self.process.wait(END_S)
        assert code == expected, f"exit {code}: {self.errors()}"


def argv(
    images: Path,
    action: str,
    *options: object,
    work: Path | None = None,
    command: Sequence[str] | None = None,
) -> list[str]:
    """`work`: where logs and sockets are put, if not among the images. `command`: what takes CRIU's place."""
    where = ["-D", str(images), *(["-W", str(work)] if work else [])]
    return [
        *(command or peer.criu()),
        action,
        "--no-default-config",
        *where,
        "-o",
        f"{action}.log",
        "-v4",
        *map(str, options),
    ]


@contextmanager
def criu(
    host: Host,
    images: Path,
    action: str,
    *options: object,
    work: Path | None = None,
    command: Sequence[str] | None = None,
) -> Iterator[Criu]:
    """A command of CRIU on `host`, which has said that it is ready; killed at the end if it still runs."""
    reading, writing = os.pipe()
    log = (work or images) / f"{action}.log"
    with suppress(FileNotFoundError):
        log.unlink()
    with (host.outside / f"criu-{action}.out").open("w") as out:
        process = host.popen(
            argv(images, action, "--status-fd", writing, *options, work=work, command=command),
            stdin=subprocess.DEVNULL, stdout=out, stderr=out, pass_fds=(writing,),
        )  # fmt: skip
    os.close(writing)
    started = Criu(process, log)
    try:
        with os.fdopen(reading, "rb") as ready:
            assert ready.read() == b"\0", started.errors()
        yield started
    finally:
        process.kill()
        process.wait()


def run_criu(
    host: Host,
    images: Path,
    action: str,
    *options: object,
    work: Path | None = None,
    command: Sequence[str] | None = None,
) -> None:
    """A command of CRIU that must succeed."""
    done = host.run(
        argv(images, action, *options, work=work, command=command),
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=END_S,
    )  # fmt: skip
    ended = Criu(done, (work or images) / f"{action}.log")  # type: ignore[arg-type]
    assert done.returncode == 0, f"{done.stdout}{done.stderr}{ended.errors()}"


@contextmanager
def restored_by_criu(host: Host, images: Path, *options: object, work: Path) -> Iterator[int]:
    """`criu restore` of the tree; its root as the test sees it, ended at the end if it still runs."""
    pidfile = work / "pid"
    with suppress(FileNotFoundError):
        pidfile.unlink()
    run_criu(host, images, "restore", "--restore-detached", "--pidfile", pidfile, *options, work=work)
    pid = host.pid(int(pidfile.read_text()))
    try:
        yield pid
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@contextmanager
def running_there(host: Host, name: str, *arguments: object, directory: Path) -> Iterator[Program]:
    """As programs.running, with all that it has open opened on the host: CRIU looks for the mounts."""
    watch = Watch.create(directory / f"{name}.status", exclusive=True)
    number_from(host, FREE_NUMBER)
    words = [str(word) for word in (compile_program(name), watch.path, *arguments)]
    argv = ["sh", "-c", 'exec "$@" < /dev/null > /dev/null 2>&1', "sh", *words]
    process = host.popen(argv, start_new_session=True)
    try:
        wait_until(lambda: process.poll() is not None or watch.read().phase >= Phase.RUNNING, "it is set up")
        yield Program(watch, process)
    finally:
        process.kill()
        process.wait()


@contextmanager
def large_pipes() -> Iterator[None]:
    """CRIU's lazy page server makes pipes of 4 MiB, and without CAP_SYS_RESOURCE fails when it cannot."""
    limit = Path("/proc/sys/fs/pipe-max-size")
    before = int(limit.read_text())
    limit.write_text(str(max(before, LARGE_PIPE)))
    try:
        yield
    finally:
        limit.write_text(str(before))


def number_from(host: Host, pid: int) -> None:
    """The next process there gets the number `pid`, or one above it: CRIU restores with the old numbers."""
    host.run(["sh", "-c", f"echo {pid - 1} > /proc/sys/kernel/ns_last_pid"], check=True)


def wait_gone(pid: int) -> None:
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), f"pid {pid} is gone", END_S)
