"""Programs that hold file locks, and whether those are held, as everybody else on this machine sees it."""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lazyproc.hosts import Host
from lazyproc.kernel.filelocks import F_OFD_SETLK
from lazyproc.kernel.proc_locks import held_locks
from tests.live.programs import SOURCES, wait_until

# By name: what the program does for it, and whether others may have the same.
LOCKS = {
    "flock": ("take('flock', opened('file'))", False),
    "flock-shared": ("take('flock', opened('file'), fcntl.F_RDLCK)", True),
    "posix": ("take('posix', opened('file'))", False),
    "posix-shared": ("take('posix', opened('file'), fcntl.F_RDLCK)", True),
    "ofd": ("take('ofd', opened('file'))", False),
    "ofd-shared": ("take('ofd', opened('file'), fcntl.F_RDLCK)", True),
    "lease": (
        "os.close(opened('file')); take('lease', os.open(_folder + '/file', os.O_RDONLY), fcntl.F_RDLCK)",
        True,
    ),
}


@dataclass(frozen=True, slots=True)
class Holder:
    """A program of tests/programs/lock_holder.py, as long as it runs where it was started."""

    process: subprocess.Popen[str]
    folder: Path  # as the test sees it

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def file(self) -> Path:
        return self.folder / "file"

    def said(self) -> list[str]:
        return (self.folder / "said").read_text().split() if (self.folder / "said").exists() else []

    def wait_said(self, word: str, times: int = 1) -> None:
        wait_until(lambda: self.said().count(word) >= times, f"it says {word!r} for the {times}th time")

    def answers(self, pid: int) -> None:
        """It runs, as `pid`."""
        times = self.said().count("here")
        os.kill(pid, signal.SIGUSR1)
        self.wait_said("here", times + 1)


@contextmanager
def holding(host: Host, folder: Path, code: str, seen: Path | None = None) -> Iterator[Holder]:
    """In a folder of the host's, which the test sees as `seen`. SIGKILL at the end, when it is still there."""
    argv = [sys.executable, str(SOURCES / "lock_holder.py"), str(folder), code]
    log = (host.outside / "holder.log").open("w")
    null = subprocess.DEVNULL
    process = host.popen(argv, stdin=null, stdout=null, stderr=log, start_new_session=True, text=True)
    holder = Holder(process, seen or folder)
    try:
        wait_until(lambda: process.poll() is not None or "holds" in holder.said(), "it holds its locks")
        assert process.poll() is None, Path(log.name).read_text()
        yield holder
    finally:
        log.close()
        process.kill()
        process.wait()


def is_free(path: Path) -> bool:
    """Whether the whole of it can be locked in each way, which is tried with descriptors of a moment."""
    fd = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.fcntl(fd, F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(fd)


def holders_of(path: Path) -> list[int]:
    """The pid, as the test sees it, of whoever has locked it, once for each lock; -1 for an open file description."""
    return [held.lock.pid for held in held_locks() if held.lock.inode == path.stat().st_ino]


def waiters_of(path: Path) -> list[int]:
    return [pid for held in held_locks() if held.lock.inode == path.stat().st_ino for pid in held.waiting]
