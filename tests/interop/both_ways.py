"""Programs that one of CRIU and lazyproc dumps and the other restores, on this host and with their old numbers."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests import peer
from tests.live.programs import Program, Watch, running

LAZYPROC = (sys.executable, "-m", "lazyproc.cli.main")
_LIMIT_S = 60
_WITH_ALL = (
    "--tcp-established",
    "--skip-in-flight",
    "--file-locks",
)  # CRIU takes them along when it is told to


def criu(action: str, images: Path, *options: str) -> None:
    """A command of CRIU that must succeed."""
    log = images / f"{action}.log"
    command = [
        *peer.criu(), action, "--no-default-config", "-D", str(images), "-o", log.name, "-v4", *options,
    ]  # fmt: skip
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_LIMIT_S)
    text = log.read_text(errors="replace") if log.exists() else ""
    errors = [line for line in text.splitlines() if "Error" in line]
    assert done.returncode == 0, "\n".join([done.stdout, done.stderr, *errors])


def lazyproc(*words: object, expected: int = 0) -> str:
    """What a command of ours says, on standard output last; its exit code must be `expected`."""
    done = subprocess.run(
        [*LAZYPROC, *map(str, words)],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_LIMIT_S,
    )  # fmt: skip
    assert done.returncode == expected, f"exit code {done.returncode}: {done.stderr}"
    return done.stderr + done.stdout


@contextmanager
def started(name: str, *arguments: object, directory: Path) -> Iterator[Program]:
    """A program that checks itself; it and what was restored of it are killed at the end."""
    with running(name, *arguments, directory=directory) as program:
        program.watch.wait_beats()
        try:
            yield program
        finally:
            for pid in tree(program.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def dumped_by_criu(program: Program, images: Path, *options: str) -> None:
    images.mkdir()
    criu("dump", images, "--tree", str(program.pid), *_WITH_ALL, *options)


def gone(program: Program) -> None:
    """Waits for it and the orphans that it left us: until then their numbers are taken."""
    program.process.wait(10)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)


@contextmanager
def restored_by_criu(program: Program, images: Path, *where: str, lazy: bool = False) -> Iterator[None]:
    """Restored; the daemon that brings its pages, which is told `where` they are, has to end by itself."""
    options = (*_WITH_ALL, *(["--lazy-pages"] if lazy else []))
    with _daemon(images, *where) if lazy else contextlib.nullcontext():
        criu("restore", images, "--restore-detached", *options)
        yield


@contextmanager
def _daemon(images: Path, *options: str) -> Iterator[None]:
    ready, theirs = os.pipe()
    command = [*peer.criu(), "lazy-pages", "--no-default-config", "-D", str(images), "-o", "lazy-pages.log"]
    process = subprocess.Popen([*command, "-v4", "--status-fd", str(theirs), *options], pass_fds=[theirs])
    os.close(theirs)
    try:
        with os.fdopen(ready, "rb") as pipe:
            assert pipe.read(1) == b"\0", (images / "lazy-pages.log").read_text()
        yield
        assert process.wait(_LIMIT_S) == 0, (images / "lazy-pages.log").read_text()
    finally:
        process.kill()
        process.wait()


def restored_by_lazyproc(images: Path, *options: str) -> int:
    """The restored root's pid."""
    pidfile = images.with_suffix(".pid")
    lazyproc("restore", "-D", images, "--detach", "--pidfile", pidfile, *options)
    return int(pidfile.read_text())


def end(pid: int, watch: Watch) -> None:
    """The program checks everything once more, and ends well."""
    watch.wait_beats()
    os.kill(pid, signal.SIGTERM)
    watch.wait_ended()
    until = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists():  # our child, or that of its pid namespace's first process
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
        assert time.monotonic() < until, f"pid {pid} does not end"
        time.sleep(0.005)


def tree(pid: int) -> list[int]:
    """The process and its descendants, as far as they exist."""
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):
            for children in Path(f"/proc/{parent}/task").glob("*/children"):
                found += [int(child) for child in children.read_text().split()]
    return found
