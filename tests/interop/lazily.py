"""`criu restore --lazy-pages` with `lazyproc lazy-pages` in the place of CRIU's own daemon."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lazyproc.dump.checkpoint import checkpoint
from lazyproc.events import ignore
from lazyproc.images.files import Folder
from lazyproc.images.lazy import lazy_memory
from lazyproc.restore.lazytree import ANCHORS, anchor_holders, from_facts
from tests import peer
from tests.live.programs import Program, Watch, running, wait_until

NAME = "lazy-pages.socket"
DEADLINE_S = 60.0


@dataclass
class Dumped:
    """A program that CRIU has dumped and ended."""

    images: Path
    pid: int
    watch: Watch

    def criu(self, action: str, *options: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*peer.criu(), action, "--no-default-config", "-D", self.images, "-o", f"{action}.log", "-v4", *options],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def restore(self, *options: str) -> subprocess.Popen[bytes]:
        """It returns when the program runs."""
        return self.criu("restore", "--lazy-pages", "--restore-detached", *options)

    def restored(self) -> None:
        restore = self.restore()
        assert restore.wait(DEADLINE_S) == 0, self.log("restore")

    def log(self, action: str) -> str:
        return "\n".join((self.images / f"{action}.log").read_text().splitlines()[-20:])

    def stop_and_verify(self) -> None:
        """The restored program is our child, as we are the reaper of orphans."""
        os.kill(self.pid, signal.SIGTERM)
        _, status = os.waitpid(self.pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0, str(self.watch.read())
        self.watch.wait_ended()


@contextmanager
def dumped(name: str, *arguments: object, directory: Path, by_criu: bool = True) -> Iterator[Dumped]:
    """A self-checking program, dumped; what was restored of it is killed at the end."""
    with running(name, *arguments, directory=directory) as program:
        if by_criu:
            made = _dump(program, directory)
        else:
            made = Dumped(directory / "images", program.pid, program.watch)
            checkpoint(program.pid, made.images, leave_running=False, tcp_close=False, listener=ignore)
        program.process.wait()
        for each in lazy_memory(
            Folder(made.images).read()
        ):  # orphans are ours, and keep their numbers until then
            with suppress(ChildProcessError):
                os.waitpid(each.vpid, 0)
    try:
        yield made
    finally:
        _end(made.pid)


@contextmanager
def dumped_and_running(name: str, *arguments: object, directory: Path) -> Iterator[Dumped]:
    """The same, and it runs on."""
    with running(name, *arguments, directory=directory) as program:
        yield _dump(program, directory, "--leave-running")


def _dump(program: Program, directory: Path, *options: str) -> Dumped:
    images = directory / "images"
    images.mkdir()
    made = Dumped(images, program.pid, program.watch)
    assert made.criu("dump", "--tree", str(program.pid), *options).wait(DEADLINE_S) == 0, made.log("dump")
    return made


def _end(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    with suppress(ChildProcessError):
        while True:
            os.waitpid(-pid, 0)


@dataclass
class LazyPages:
    """`lazyproc lazy-pages`, which is ready for a restorer."""

    process: subprocess.Popen[str]
    state: Path
    log: Path
    output: str = field(default="", init=False)

    def finish(self, expected: int = 0) -> dict[str, Any]:
        """Its report."""
        self.output, _ = self.process.communicate(timeout=DEADLINE_S)
        assert self.process.returncode == expected, self.output + self.log.read_text()
        report: dict[str, Any] = json.loads(self.output.splitlines()[-1])
        return report

    def record(self) -> dict[str, Any]:
        """The journal of its session, {} when there is none."""
        for path in self.state.rglob("*-destination.json"):
            with suppress(FileNotFoundError, ValueError):
                found: dict[str, Any] = json.loads(path.read_text())
                return found
        return {}

    def wait_state(self, state: str) -> dict[str, Any]:
        wait_until(lambda: self.record().get("state") == state, f"the session is {state}")
        return self.record()

    def helper(self, name: str) -> int:
        wait_until(lambda: f"{name}_pid" in self.record(), f"there is a {name}")
        pid: int = self.record()[f"{name}_pid"]
        return pid

    def wait_anchored(self) -> None:
        """Its processes hold their memory themselves."""
        wait_until(lambda: self.record().get("due") == [], "the anchors are there")
        tree = from_facts(self.record()["tree"])
        for name in ANCHORS:
            holders = [pid for pid, _ in anchor_holders(tree, name)]
            assert {task.pid for task in tree.tasks} <= set(holders), name


def environment(state: Path) -> dict[str, str]:
    return {**os.environ, "XDG_STATE_HOME": str(state)}


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


@contextmanager
def lazy_pages(images: Path, *options: str, directory: Path) -> Iterator[LazyPages]:
    state, log = directory / "state", directory / "lazy-pages.log"
    command = [sys.executable, "-m", "lazyproc.cli.main", "lazy-pages", "-D", str(images), "--json", *options]
    process = subprocess.Popen(
        [*command, "--log-file", str(log)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=environment(state),
    )  # fmt: skip
    it = LazyPages(process, state, log)
    try:
        wait_until(lambda: process.poll() is not None or "waiting" in _text(log), "it listens")
        assert process.poll() is None, log.read_text()
        yield it
    finally:
        for name in ("guard", "keeper", "pager"):
            with suppress(KeyError, ProcessLookupError):
                os.kill(it.record()[f"{name}_pid"], signal.SIGKILL)
        process.kill()
        process.communicate()


@contextmanager
def serving(
    target: Path | int, *, directory: Path, port: int = 0
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """`lazyproc serve` of a folder or of a process, and its port."""
    log = directory / f"serve-{port}.log"
    command = [sys.executable, "-m", "lazyproc.cli.main", "serve", "--log-file", str(log)]
    command += ["-D", str(target)] if isinstance(target, Path) else [str(target)]
    process = subprocess.Popen(
        [*command, "--listen", f"127.0.0.1:{port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=environment(directory / "state"),
    )  # fmt: skip
    try:
        wait_until(lambda: log.exists() and "listening on port" in log.read_text(), "it serves")
        yield process, int(log.read_text().partition("listening on port ")[2].split()[0])
    finally:
        process.kill()
        process.wait()


@contextmanager
def connected(images: Path, *, uid: int = 0) -> Iterator[socket.socket]:
    """As a restorer connects."""
    with contextlib.chdir(images), socket.socket(socket.AF_UNIX) as caller:
        os.seteuid(uid)
        try:
            caller.connect(NAME)
        finally:
            os.seteuid(0)
        yield caller
