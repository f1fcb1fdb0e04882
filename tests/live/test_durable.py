"""A process is not lost to a power cut: its images are on the disk before it ends, and it runs on when they are not."""

from __future__ import annotations

import errno
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from lazyproc.hosts import Host
from tests.live.aio import FETCH, LEAVE, POLL_MS, ask, unfetched
from tests.live.bad_luck import COMMAND_S, ended, lazyproc, says, started, unharmed
from tests.live.programs import Program, running, wait_until
from tests.live.tracees import state_of
from tests.needs import lacking, require

PACED = ("memory_random", 4, 2, 1000)
IMAGES = "images"


@dataclass(frozen=True, slots=True)
class Disk:
    """A file system of `host` at `place` that asks for every fsync(2); its files lie in `folder` for us."""

    host: Host
    place: Path
    folder: Path
    process: subprocess.Popen[bytes]

    def asks(self, command: subprocess.Popen[str]) -> Iterator[str]:
        """What is to be synced next, until the command has ended; each must be answered."""
        questions = self.process.stdout
        assert questions is not None
        assert command.stdout is not None
        while True:
            ready, _, _ = select.select([questions.fileno(), command.stdout.fileno()], [], [], COMMAND_S)
            assert ready, "neither a question of the disk nor the end of the command"
            if questions.fileno() not in ready:
                return
            yield questions.readline().decode().rstrip("\n")  # one at a time: nothing is buffered

    def answer(self, code: int) -> None:
        assert self.process.stdin is not None
        os.write(self.process.stdin.fileno(), f"{code}\n".encode())


@pytest.fixture
def disk(host: Host) -> Iterator[Disk]:
    if not os.path.exists("/dev/fuse"):
        lacking("there is no /dev/fuse", "modprobe fuse")
    place, folder = host.scratch / "place", host.outside / "behind"
    for name in ("place", "behind"):
        (host.outside / name).mkdir()
    pipe = subprocess.PIPE
    argv = [sys.executable, "-m", "tests.live.slow_disk", str(host.scratch / "behind"), str(place)]
    with ended(host.popen(argv, stdin=pipe, stdout=pipe)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield Disk(host, place, folder, process)


@pytest.fixture
def program(host: Host) -> Iterator[Program]:
    with running(*PACED, directory=host.ground.shared, host=host, exclusive=True) as started:
        yield started


@contextmanager
def checkpoint(disk: Disk, program: Program, *options: str) -> Iterator[subprocess.Popen[str]]:
    argv = ("checkpoint", disk.host.vpid(program.pid), "-D", disk.place / IMAGES, *options)
    with ended(started(disk.host, *argv)) as command:
        try:
            yield command
        except BaseException:
            disk.process.kill()  # who waits for its answer cannot be killed
            raise


def check_whole(disk: Disk, synced: list[str]) -> None:
    """Every file there is was synced, then the names of the files, then that of the folder."""
    files = sorted(path.name for path in (disk.folder / IMAGES).iterdir())
    assert {"pages-1.img", "inventory.img", "lazyproc.img", "lazyproc-sums.img"} <= set(files)
    assert sorted(synced[:-2]) == [f"{IMAGES}/{name}" for name in files]
    assert synced[-2:] == [IMAGES, "."]


def test_the_tree_ends_when_all_is_on_the_disk(disk: Disk, program: Program) -> None:
    synced: list[str] = []
    with checkpoint(disk, program) as command:
        for name in disk.asks(command):
            assert state_of(program.pid) == "t", f"while {name} is not yet on the disk"
            synced.append(name)
            disk.answer(0)
        assert command.wait(COMMAND_S) == 0
    check_whole(disk, synced)
    assert program.process.wait(COMMAND_S) == -signal.SIGKILL
    assert program.watch.read().errors == 0


def test_left_running_it_does_not_wait_for_the_disk(disk: Disk, program: Program) -> None:
    synced: list[str] = []
    with checkpoint(disk, program, "--leave-running") as command:
        for name in disk.asks(command):
            if not synced:
                program.watch.wait_beats()
            synced.append(name)
            disk.answer(0)
        assert command.wait(COMMAND_S) == 0
    check_whole(disk, synced)
    program.stop_and_verify()


@pytest.mark.parametrize("options", [(), ("--leave-running",)], ids=["", "leave-running"])
@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("images/pages-1.img", errno.EIO, "input/output error; look for the disk in the kernel log"),
        ("images/pstree.img", errno.ENOSPC, "no space left on device; make room there"),
        ("images/lazyproc.img", errno.EDQUOT, "disk quota exceeded; raise the quota"),
        ("images", errno.EIO, "input/output error"),
        (".", errno.EIO, "input/output error"),
    ],
)
def test_it_runs_on_when_the_disk_fails(
    disk: Disk, program: Program, name: str, code: int, words: str, options: tuple[str, ...]
) -> None:
    with unharmed(program):
        with checkpoint(disk, program, *options) as command:
            for asked in disk.asks(command):
                disk.answer(code if asked == name else 0)
            _, error = command.communicate(timeout=COMMAND_S)
        done = subprocess.CompletedProcess("", command.returncode, "", error)
        says(done, 1, str(disk.place / name), words)
    assert not list(disk.folder.iterdir())
    program.stop_and_verify()


def test_an_aio_request_that_is_complete_before_the_disk_is(disk: Disk) -> None:
    """Neither the process nor a copy would be told: nothing has happened."""
    folder = disk.host.ground.shared
    with running("aio_ring", POLL_MS, directory=folder, host=disk.host, exclusive=True) as program:
        ask(program, LEAVE)
        with unharmed(program):
            with checkpoint(disk, program) as command:
                for _ in disk.asks(command):
                    wait_until(lambda: unfetched(program.pid) == 1, "the request is complete")
                    disk.answer(0)
                _, error = command.communicate(timeout=COMMAND_S)
            says(subprocess.CompletedProcess("", command.returncode, "", error), 3, "/[aio]", "io_getevents")
        assert not list(disk.folder.iterdir())
        ask(program, FETCH)
        program.stop_and_verify()


def test_a_file_system_that_syncs_no_names(disk: Disk, program: Program) -> None:
    with checkpoint(disk, program) as command:
        for name in disk.asks(command):
            disk.answer(errno.EINVAL if (disk.folder / name).is_dir() else 0)
        assert command.wait(COMMAND_S) == 0
    assert program.process.wait(COMMAND_S) == -signal.SIGKILL


def test_a_thin_disk_that_promised_too_much(host: Host) -> None:
    """Every write(2) to its file system succeeds; that the data is lost shows when it is synced."""
    mkfs, losetup = require("mkfs.ext4"), require("losetup")
    store, disk = host.scratch / "store", host.scratch / "disk"
    for name in ("store", "disk"):
        (host.outside / name).mkdir()
    # -d leaves it until it is unmounted, at the latest with the host
    script = (
        f"mount -t tmpfs -o size=16m none {store} && truncate -s 256M {store}/image && "
        f"{mkfs} -q -O ^has_journal {store}/image && device=$({losetup} --show -f {store}/image) && "
        f"mount $device {disk} && {losetup} -d $device"
    )
    made = host.run(["sh", "-c", script], capture_output=True, text=True)
    if made.returncode:
        lacking(f"no loop device can be had ({made.stderr.strip()})", "modprobe loop, and run as root")
    argv = ("memory_random", 64, 2, 1000)
    with running(*argv, directory=host.ground.shared, host=host, exclusive=True) as program:
        with unharmed(program):
            done = lazyproc(host, "checkpoint", host.vpid(program.pid), "-D", disk / IMAGES)
            says(done, 1, f"{disk}/{IMAGES}/pages-1.img", "; ")
        assert host.run(["ls", "-A", disk], capture_output=True, text=True).stdout == "lost+found\n"
        program.stop_and_verify()
